"""The grammar of an answer in the format of gpt-oss: thoughts and words as the model likes, then a form, or a call.

Owns which headers may come. An answer holds one call, since it ends with that. `answer_grammar.py` calls it.
"""

import json
import re
from collections.abc import Iterator

from deployments.api.harmony import ANALYSIS, MARKERS, HarmonyRules
from deployments.api.tools.grammar import CallGrammar


def write_rules(has_form: bool, form: str, calls: CallGrammar | None, rules: HarmonyRules) -> Iterator[str]:
    """Of an answer, in Lark's notation.

    Args:
        has_form: what is shown is of a form.
        form: how its grammar is referred to.
        calls: how tools may be called; None: not at all.
        rules: of the call.
    """
    tokens = rules.tokens
    channel, message, end = f"<[{tokens.channel}]>", f"<[{tokens.message}]>", f"<[{tokens.end}]>"
    must_call = calls is not None and calls.must_call
    said = form if has_form else "TEXT?"
    ends = ([] if must_call else ["final"]) + (["call"] if calls is not None else [])
    if rules.is_body:
        yield f"start: {said}"
    else:
        # What is shown beside a form would spoil it.
        before = "thought" if has_form else "(thought | words)"
        yield f"start: {before}* ({' | '.join(ends)})"
    # A marker that is written as text would be read as one.
    yield f"TEXT: /(?s:.+)/ & ~/(?s:.*)({'|'.join(map(re.escape, MARKERS))})(?s:.*)/"
    yield f'again: {end} <[{tokens.start}]> "assistant"'
    yield f'thought: {channel} "{ANALYSIS}" {message} TEXT? again'
    yield f'words: {channel} "commentary" {message} TEXT? again'
    yield f'final: {channel} "final" {message} {said}'
    if calls is not None:
        yield f'json: " "? <[{tokens.constrain}]> "json" | " json"'
        yield f"call: {' | '.join(f'call_{number}' for number in range(len(calls.tools)))}"
        for number, (name, schema) in enumerate(calls.schemas()):
            # The recipient stands behind the role or behind the channel.
            to = f"to=functions.{name}"
            by_role, by_channel = json.dumps(f" {to}"), json.dumps(f"commentary {to}")
            header = f'{by_role} {channel} "commentary" | {channel} {by_channel}'
            yield f"call_{number}: ({header}) json? {message} arguments_{number}"
            yield f"arguments_{number}: %json {schema}"
