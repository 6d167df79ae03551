"""`truncation: auto`: a conversation that does not fit loses turns from its beginning. `reading.py` calls it."""

from collections.abc import Callable, Sequence

from deployments.api.call import Call
from deployments.api.chat_template import TemplateLimitError
from deployments.api.openai import ChatBody, Message
from deployments.errors import RequestTooLargeError

_INSTRUCTIONS = ("system", "developer")


def build_fitting(body: ChatBody, build: Callable[[ChatBody], Call], *, is_brief: bool) -> Call:
    """The call of a conversation with as many of its turns as fit, the latest ones, and the instructions before them.

    A turn begins with what a user says: what the assistant answers, calls and is given goes with it.

    Args:
        body: a chat.
        build: makes the call; each try renders and encodes what is left.
        is_brief: a template's limits are about the event loop, and not about what fits.

    Raises:
        RequestTooLargeError: not even the last turn fits.
        InvalidRequestError: as `build`.
    """

    def attempt(num_dropped: int) -> Call | RequestTooLargeError:
        try:
            return build(body.model_copy(update={"messages": _without(body.messages, num_dropped)}))
        except RequestTooLargeError as error:
            if is_brief and isinstance(error, TemplateLimitError):
                raise
            return error

    result, fails, most = attempt(0), 0, _num_turns(body.messages) - 1
    if isinstance(result, Call) or most < 1:
        return _or_raise(result)
    result = attempt(most)
    while isinstance(result, Call) and most - fails > 1:  # `fails` is too few, `most` is enough
        middle = (fails + most) // 2
        tried = attempt(middle)
        fails, most, result = (fails, middle, tried) if isinstance(tried, Call) else (middle, most, result)
    return _or_raise(result)


def _or_raise(result: Call | RequestTooLargeError) -> Call:
    if isinstance(result, RequestTooLargeError):
        raise result
    return result


def _num_turns(messages: Sequence[Message]) -> int:
    return sum(message.role == "user" for message in messages)


def _without(messages: Sequence[Message], num_turns: int) -> Sequence[Message]:
    """Messages without the first so many turns, and then without what stands before the first of the others."""
    if num_turns == 0:
        return messages
    starts = [index for index, message in enumerate(messages) if message.role == "user"]
    instructions = [message for message in messages[: starts[0]] if message.role in _INSTRUCTIONS]
    return [*instructions, *messages[starts[num_turns] :]]
