"""How models write calls of tools, by family, and which family a chat template belongs to. Knows no requests."""

from dataclasses import dataclass
from typing import Literal

# How `ingress.tool_parser` names them; `auto`: by the template.
ToolParserName = Literal["auto", "hermes", "llama3", "mistral", "harmony"]
FamilyName = Literal["hermes", "llama3", "mistral", "harmony"]


@dataclass(frozen=True, slots=True)
class Family:
    """The syntax of calls: markers around JSON objects with a name and arguments.

    Attributes:
        name: of the family.
        opening: stands before calls.
        closing: stands behind them; may be empty.
        arguments: the key of a call's arguments.
        is_bare: an object at the very beginning of an answer is a call without its opening, too.
        is_list: calls stand in one JSON list; else each within markers of its own, or behind each other.
        id_length: of the ids that calls are given; templates may ask for one.
    """

    name: FamilyName
    opening: str
    closing: str
    arguments: str
    is_bare: bool = False
    is_list: bool = False
    id_length: int = 29


HERMES = Family("hermes", "<tool_call>", "</tool_call>", "arguments")
LLAMA_3 = Family("llama3", "<|python_tag|>", "", "parameters", is_bare=True)
# Mistral's templates refuse ids of any other length.
MISTRAL = Family("mistral", "[TOOL_CALLS]", "", "arguments", is_list=True, id_length=9)
# Of gpt-oss: calls are messages to a function, which `harmony.py` reads.
HARMONY = Family("harmony", "", "", "arguments")
FAMILIES: dict[str, Family] = {family.name: family for family in (HERMES, LLAMA_3, MISTRAL, HARMONY)}

# Templates that hold a family's words, and yet have their models write calls in another way.
_OTHER_WAYS = ("<function=", "<arg_key>", "[ARGS]")


def family_of(template: str) -> Family | None:
    """The family whose syntax a chat template shows to its model; None: one that is not known here, or none."""
    if any(word in template for word in _OTHER_WAYS):
        return None
    if HERMES.opening in template:
        return HERMES
    if MISTRAL.opening in template:
        return MISTRAL
    if LLAMA_3.opening in template or ('"parameters"' in template and "ipython" in template):
        return LLAMA_3
    return None
