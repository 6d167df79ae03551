"""What a chat says of tools, and what that means for its answers: are calls looked for, and which must be there."""

from dataclasses import dataclass

from deployments.api.openai import ChatBody
from deployments.api.structured import fields_that_ask
from deployments.api.tools.families import Family
from deployments.api.tools.fields import NamedTool
from deployments.api.tools.grammar import MAX_CALLS, CallGrammar
from deployments.api.tools.parser import ToolParser
from deployments.api.tools.support import ToolSupport


@dataclass(frozen=True, slots=True)
class ToolRules:
    """Of all choices of a call.

    Attributes:
        family: how the model writes calls.
        names: of the tools that were offered.
        max_calls: further ones are left out of an answer; None: any number.
        grammar: of the calls; None: they are as the model writes them.
        marker_ids: tokens that must have a text for calls to be read.
        are_alone: an answer that begins with anything else has no calls.
    """

    family: Family
    names: frozenset[str]
    max_calls: int | None
    grammar: CallGrammar | None
    marker_ids: frozenset[int]
    are_alone: bool

    def build_parser(self) -> ToolParser:
        """For one choice."""
        return ToolParser(self.family, self.names, self.max_calls, are_alone=self.are_alone)


def read_tools(body: ChatBody, support: ToolSupport) -> ToolRules | None:
    """None: no tools are offered.

    Raises:
        InvalidRequestError: the model cannot do what is asked for; names the field.
    """
    tools = body.callable_tools
    if not tools:
        return None
    must_call = body.must_call
    family = support.family(is_forced=must_call)
    is_single = not body.parallel_tool_calls or isinstance(body.tool_choice, NamedTool)
    follows = [must_call or tool.function.strict is True for tool in tools]
    has_form = bool(fields_that_ask(body))
    grammar = None
    if any(follows) or is_single or has_form:
        grammar = CallGrammar(family, tools, follows, 1 if is_single else MAX_CALLS, must_call, support.token_of)
    return ToolRules(
        family=family,
        names=frozenset(tool.function.name for tool in tools),
        max_calls=1 if is_single else None,
        grammar=grammar,
        marker_ids=frozenset() if family.is_bare else support.marker_ids(family),
        are_alone=has_form,
    )
