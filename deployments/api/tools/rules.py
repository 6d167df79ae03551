"""What a chat says of tools, and what that means for its answers: are calls looked for, and which must be there."""

from dataclasses import dataclass

from deployments.api.openai import ChatBody
from deployments.api.tools.families import Family
from deployments.api.tools.fields import NamedTool
from deployments.api.tools.grammar import MAX_CALLS, build_grammar
from deployments.api.tools.parser import ToolParser
from deployments.api.tools.support import ToolSupport
from deployments.errors import InvalidRequestError
from deployments.messages import Grammar, ModelInfo


@dataclass(frozen=True, slots=True)
class ToolRules:
    """Of all choices of a call.

    Attributes:
        family: how the model writes calls.
        names: of the tools that were offered.
        max_calls: further ones are left out of an answer; None: any number.
        grammar: of an answer that must call; None: it may.
        marker_ids: tokens that must have a text for calls to be read.
    """

    family: Family
    names: frozenset[str]
    max_calls: int | None
    grammar: Grammar | None
    marker_ids: frozenset[int]

    def build_parser(self) -> ToolParser:
        """For one choice."""
        return ToolParser(self.family, self.names, self.max_calls)


def read_tools(body: ChatBody, support: ToolSupport, info: ModelInfo) -> ToolRules | None:
    """None: no tools are offered.

    Raises:
        InvalidRequestError: the model cannot do what is asked for; names the field.
    """
    if not body.offered_tools:
        return None
    forced = body.forced_tools
    family = support.family(is_forced=bool(forced))
    is_single = not body.parallel_tool_calls or isinstance(body.tool_choice, NamedTool)
    grammar = None
    if forced:
        for field in ("ignore_eos", "min_tokens"):
            if getattr(body, field):
                message = f"{field} cannot go with this tool_choice: the answer ends with its calls"
                raise InvalidRequestError(message, field)
        grammar = build_grammar(family, forced, 1 if is_single else MAX_CALLS, info.eos_token_ids, support.token_of)
    return ToolRules(
        family=family,
        names=frozenset(tool.function.name for tool in body.offered_tools),
        max_calls=1 if is_single else None,
        grammar=grammar,
        marker_ids=frozenset() if family.is_bare else support.marker_ids(family),
    )
