"""The grammar of calls of tools, in the syntax of the model's family: the same parser reads them.

Owns what of an answer is a call and what is text before it. Arguments follow the schemas of the functions, where that
is asked for, by the same rules as answers of a form (`structured.py`). `answer_grammar.py` has the rest of an answer.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from deployments.api.json_schema import Schema, UnsayableError, as_followed
from deployments.api.tools.families import Family
from deployments.api.tools.fields import Tool
from deployments.errors import InvalidRequestError

# In one answer. Models that are forced to call, and may go on, sometimes do so for ever.
MAX_CALLS = 16
_ANY_OBJECT: Schema = {"type": "object"}


@dataclass(frozen=True, slots=True)
class CallGrammar:
    """How an answer may call, in Lark's notation. Once it calls, calls are all that follows.

    Attributes:
        family: how calls are written.
        tools: of which each call is one.
        follows: of each, whether its arguments follow its schema; else they are any object.
        max_calls: at most so many.
        must_call: one call at least, and nothing else.
        token_of: the token that stands for a marker, if there is one; it is what the model was trained to write.
    """

    family: Family
    tools: Sequence[Tool]
    follows: Sequence[bool]
    max_calls: int
    must_call: bool
    token_of: Callable[[str], int | None]

    def rules(self, *, beside_form: bool) -> Iterator[str]:
        """Of `calls`, which is one call at least.

        Args:
            beside_form: the answer may be JSON instead, which must not be told from a call by its first characters.
        """
        family = self.family
        first = "" if family.is_bare else "opening "
        yield f"calls: {first}behind"
        yield f"behind: {_sequence(family, self.max_calls)}"
        for name, marker in () if family.is_bare else (("opening", family.opening), ("closing", family.closing)):
            if marker:
                yield f"{name}: {_marker(marker, self.token_of)}"
        yield f"call: {' | '.join(f'call_{n}' for n in range(len(self.tools)))}"
        for number, tool in enumerate(self.tools):
            if beside_form and family.is_bare:
                yield f"call_{number}: %json {_as_json(_as_object(tool, family, self._schema_of(number)), tool)}"
                continue
            before = json.dumps(f'{{"name": "{tool.function.name}", "{family.arguments}": ')
            yield f'call_{number}: {before} arguments_{number} "}}"'
            yield f"arguments_{number}: %json {_as_json(self._schema_of(number), tool)}"

    def schemas(self) -> Iterator[tuple[str, str]]:
        """Names of the tools, and the schemas of their arguments as a grammar has them."""
        for number, tool in enumerate(self.tools):
            yield tool.function.name, _as_json(self._schema_of(number), tool)

    def _schema_of(self, number: int) -> Schema:
        return _schema(self.tools[number]) if self.follows[number] else _ANY_OBJECT

    def rules_of_any(self, barred: str | None) -> Iterator[str]:
        """Of `any`, beside those of `calls`: text, in which nothing is taken for a call, and then calls or none.

        Args:
            barred: what the text may not begin with, for it would be taken for something else; None: nothing.
        """
        opening, token_id = self.family.opening, self.token_of(self.family.opening)
        allowed = f"& ~/(?s:.*){_pattern(opening)}(?s:.*)/"
        if barred is not None:
            allowed += f" & ~/[ \\t\\r\\n]*{_pattern(barred)}(?s:.*)/"
        text = r"/[ \t\r\n]*([^ \t\r\n{](?s:.*))?/" if self.family.is_bare else "/(?s:.*)/"
        yield f"TEXT: {text} {allowed}"
        bare = "GAP? calls | " if self.family.is_bare else ""
        if token_id is not None:
            yield f"any: {bare}TEXT? (<[{token_id}]> behind)?"
        elif self.family.is_bare:
            yield f"any: {bare}TEXT?"
        else:
            yield "any: TEXT? | text_and_opening behind"
            yield "text_and_opening[lazy]: TEXT_AND_OPENING"
            begun = "" if barred is None else f" & ~/[ \\t\\r\\n]*{_pattern(barred)}(?s:.*)/"
            yield f"TEXT_AND_OPENING: /(?s:.*){_pattern(opening)}/{begun}"


def _sequence(family: Family, max_calls: int) -> str:
    """Of calls, behind the opening of the first."""

    def further(between: str) -> str:
        return f" ({between}){{0,{max_calls - 1}}}" if max_calls > 1 else ""

    if family.is_list:
        return f'" "? "[" call{further(chr(34) + ", " + chr(34) + " call")} "]"'
    if family.is_bare:
        return f"call{further(chr(34) + '; ' + chr(34) + ' call')}"
    block = r'"\n" call "\n" closing'
    return block + further(rf'"\n" opening {block}')


def _marker(text: str, token_of: Callable[[str], int | None]) -> str:
    token_id = token_of(text)
    return json.dumps(text) if token_id is None else f"<[{token_id}]>"


def _pattern(text: str) -> str:
    """A text within a regular expression."""
    return re.escape(text).replace("/", r"\/")


def _schema(tool: Tool) -> Schema:
    """Of the arguments, which are an object."""
    schema = tool.schema_of_arguments()
    if schema.get("type", "object") != "object":
        message = f"tools: the parameters of {tool.function.name!r} must be a schema of the type 'object'"
        raise InvalidRequestError(message, "tools")
    return {**schema, "type": "object"}


def _as_object(tool: Tool, family: Family, arguments: Schema) -> Schema:
    """The schema of a whole call. With an id of its own, what the one of the arguments refers to is found in it."""
    own = {"$id": f"tool:{tool.function.name}", **arguments}
    return {
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, family.arguments: own},
        "required": ["name", family.arguments],
        "additionalProperties": False,
    }


def _as_json(schema: Schema, tool: Tool) -> str:
    try:
        return json.dumps(as_followed(schema, is_strict=tool.function.strict is True), allow_nan=False)
    except UnsayableError as error:
        message = f"tools: the parameters of {tool.function.name!r} cannot be followed: {error}"
        raise InvalidRequestError(message, "tools") from None
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"tools: not a JSON schema: {error}", "tools") from None
