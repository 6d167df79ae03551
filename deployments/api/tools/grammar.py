"""The grammar of an answer that calls tools, in the syntax of the model's family: the same parser reads it.

Arguments follow the schemas of the functions, by the same rules as answers of a form (`structured.py`).
"""

import json
from collections.abc import Callable, Sequence

from deployments.api.structured import FOLLOWED, source_of_lark
from deployments.api.tools.families import Family
from deployments.api.tools.fields import Tool
from deployments.errors import InvalidRequestError
from deployments.grammars import MAX_SOURCE_CHARACTERS
from deployments.messages import Grammar

# In one answer. Models that are forced to call, and may go on, sometimes do so for ever.
MAX_CALLS = 16


def build_grammar(
    family: Family,
    tools: Sequence[Tool],
    max_calls: int,
    end_token_ids: tuple[int, ...],
    token_of: Callable[[str], int | None],
) -> Grammar:
    """One call at least.

    Args:
        family: how calls are written.
        tools: of which each call is one.
        max_calls: at most so many.
        end_token_ids: those of the model.
        token_of: the token that stands for a marker, if there is one; it is what the model was trained to write.

    Raises:
        InvalidRequestError: names the field and what is wrong with it.
    """
    if not end_token_ids:
        raise InvalidRequestError("tool_choice needs a model with a token that ends a text; this one has none", "tools")
    rules = [f"start: {_start(family, max_calls)}", f"call: {' | '.join(f'call_{n}' for n in range(len(tools)))}"]
    rules += [f"{name}: {_marker(marker, token_of)}" for name, marker in _markers(family) if marker]
    for number, tool in enumerate(tools):
        before = json.dumps(f'{{"name": "{tool.function.name}", "{family.arguments}": ')
        rules.append(f'call_{number}: {before} arguments_{number} "}}"')
        rules.append(f"arguments_{number}: %json {_schema(tool)}")
    source = source_of_lark("\n".join(rules))
    if len(source) > MAX_SOURCE_CHARACTERS:
        message = f"tools make a grammar of {len(source)} characters; at most {MAX_SOURCE_CHARACTERS} may be"
        raise InvalidRequestError(message, "tools")
    return Grammar(source, end_token_ids, "tools")


def _markers(family: Family) -> tuple[tuple[str, str], ...]:
    return ("opening", "" if family.is_bare else family.opening), ("closing", family.closing)


def _start(family: Family, max_calls: int) -> str:
    def further(between: str) -> str:
        return f" ({between}){{0,{max_calls - 1}}}" if max_calls > 1 else ""

    if family.is_list:
        return f'opening " "? "[" call{further(chr(34) + ", " + chr(34) + " call")} "]"'
    if family.is_bare:
        return f"call{further(chr(34) + '; ' + chr(34) + ' call')}"
    block = r'opening "\n" call "\n" closing'
    return block + further(rf'"\n" {block}')


def _marker(text: str, token_of: Callable[[str], int | None]) -> str:
    token_id = token_of(text)
    return json.dumps(text) if token_id is None else f"<[{token_id}]>"


def _schema(tool: Tool) -> str:
    """Of the arguments, which are an object."""
    schema = tool.schema_of_arguments()
    if schema.get("type", "object") != "object":
        message = f"tools: the parameters of {tool.function.name!r} must be a schema of the type 'object'"
        raise InvalidRequestError(message, "tools")
    try:
        return json.dumps({**schema, "type": "object", "x-guidance": FOLLOWED}, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"tools: not a JSON schema: {error}", "tools") from None
