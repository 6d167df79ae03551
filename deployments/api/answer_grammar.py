"""One grammar of a whole answer: thoughts first, if the model has any, then text, a form, calls of tools, or a choice.

Owns their order, and that each part ends where the one behind it begins, so that `answer_reader.py` finds the same
parts. The grammar of a form is `structured.py`'s, that of calls `tools/grammar.py`'s. Called by `calls.py`.
"""

import json
import re
from collections.abc import Iterator

from deployments.api.harmony import HarmonyRules
from deployments.api.harmony_grammar import write_rules
from deployments.api.reasoning.parser import ThoughtRules
from deployments.api.structured import check_source, parts_of
from deployments.api.tools.grammar import CallGrammar
from deployments.errors import InvalidRequestError
from deployments.messages import Grammar

_FORM = "form"


def build_grammar(
    form: Grammar | None,
    calls: CallGrammar | None,
    thoughts: ThoughtRules | HarmonyRules | None,
    end_token_ids: tuple[int, ...],
) -> Grammar | None:
    """None: an answer of any text.

    Args:
        form: of what is said.
        calls: how tools may be called, in its place or behind other text.
        thoughts: what the model may write before; None: it has none.
        end_token_ids: those of the model.

    Raises:
        InvalidRequestError: names the field and what is wrong with it.
    """
    if form is not None and calls is not None and calls.must_call:
        form = None  # nothing is said
    thoughts = None if isinstance(thoughts, ThoughtRules) and thoughts.is_over else thoughts
    if calls is None and (form is None or thoughts is None):
        return form
    if not end_token_ids:
        message = "these tools need a model with a token that ends a text; this one has none"
        raise InvalidRequestError(message, "tools")
    if isinstance(thoughts, HarmonyRules):
        rules = [*write_rules(form is not None, "@" + _FORM, calls, thoughts)]
    else:
        rules = [*_rules(form is not None, calls, thoughts)]
    grammars: list[object] = [{"lark_grammar": "\n".join(rules)}]
    if form is not None:
        first, *others = parts_of(form.source)
        grammars += [first | {"name": _FORM}, *others]
    field = "tools" if form is None else form.field
    return Grammar(check_source(json.dumps({"grammars": grammars}), field), end_token_ids, field)


def _rules(has_form: bool, calls: CallGrammar | None, thoughts: ThoughtRules | None) -> Iterator[str]:
    yield r"GAP: /[ \t\r\n]{1,16}/"
    begin, gap, barred = "", "", None
    if thoughts is not None:
        begin, gap = "thought " if thoughts.is_open else "thought? ", "GAP? "
        barred = None if thoughts.is_open or thoughts.opening_id is not None else thoughts.opening
        yield from _thought_rules(thoughts)
    if calls is None or has_form or calls.must_call:
        said = [name for name, is_possible in (("@" + _FORM, has_form), ("calls", calls is not None)) if is_possible]
        yield f"start: {begin}{gap}({' | '.join(said)})"
    else:
        yield f"start: {begin}any"
        yield from calls.rules_of_any(barred)
    if calls is not None:
        yield from calls.rules(beside_form=has_form)


def _thought_rules(thoughts: ThoughtRules) -> Iterator[str]:
    """Thoughts end with the first closing, as their reader has it."""
    opening = "" if thoughts.is_open else f"{_marker(thoughts.opening, thoughts.opening_id)} "
    closing = re.escape(thoughts.closing).replace("/", r"\/")
    if thoughts.closing_id is None:
        yield f"thought: {opening}inner"
        yield f"inner[lazy]: /(?s:.*){closing}/"
    else:
        yield f"thought: {opening}INNER? <[{thoughts.closing_id}]>"
        yield f"INNER: /(?s:.+)/ & ~/(?s:.*){closing}(?s:.*)/"


def _marker(text: str, token_id: int | None) -> str:
    return json.dumps(text) if token_id is None else f"<[{token_id}]>"
