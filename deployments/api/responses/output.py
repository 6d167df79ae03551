"""The items of an answer, put together as its text comes, and the events that tell of them.

Owns the order of events: an item is added, grows, and is done before the next one is added. Knows neither the answer
around its items nor how events travel; `answers.py` has the one, `exchange.py` the other.
"""

import itertools
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from deployments.api.answer_reader import Part
from deployments.api.reasoning.parser import Thought
from deployments.api.responses.forms import (
    ItemStatus,
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputText,
    OutputThought,
    ReasoningPart,
)
from deployments.api.responses.items import pack_thought
from deployments.api.scores import TokenLogprob
from deployments.api.tools.parser import CallArguments, CallBegin, Content

# One of `forms.ResponseEvent`.
Event = Mapping[str, object]


class Events:
    """Numbers the events of one stream."""

    def __init__(self) -> None:
        self._numbers = itertools.count()

    def build(self, kind: str, **fields: object) -> Event:
        return {"type": kind, "sequence_number": next(self._numbers), **fields}


class _OpenItem(Protocol):
    """An item that grows."""

    def end(self, status: ItemStatus) -> Iterator[Event]:
        """It does not grow any more."""
        ...

    def item(self, status: ItemStatus) -> OutputItem: ...


class Output:
    """All items of one answer.

    Args:
        events: of the stream.
        new_call_id: gives each call of a function its own.
        packs_thoughts: they are told in an opaque form as well.

    Attributes:
        items: those that are done.
    """

    def __init__(self, events: Events, new_call_id: Callable[[], str], *, packs_thoughts: bool = False) -> None:
        self._packs_thoughts = packs_thoughts
        self._events = events
        self._new_call_id = new_call_id
        self._open: _OpenItem | None = None
        # Of tokens of which no text was shown by now.
        self._held_scores: list[TokenLogprob] = []
        self.items: list[OutputItem] = []

    def push(self, parts: Sequence[Part], scores: Sequence[TokenLogprob] = ()) -> Iterator[Event]:
        """Take what new text adds, and the logprobs of its tokens: those of calls and thoughts are left out."""
        self._held_scores += scores
        for part in parts:
            match part:
                case Content(text):
                    yield from self._say(text)
                case Thought(text):
                    self._held_scores.clear()
                    yield from self._think(text)
                case CallBegin(_, name):
                    self._held_scores.clear()
                    yield from self._begin_call(name)
                case CallArguments(_, text):
                    assert isinstance(self._open, _Call)
                    self._held_scores.clear()
                    yield from self._open.grow(text)

    def _begin_call(self, name: str) -> Iterator[Event]:
        yield from self._close("completed")
        call = _Call(self._events, len(self.items), name, self._new_call_id())
        self._open = call
        yield from call.begin()

    def finish(self, *, is_whole: bool) -> Iterator[Event]:
        """No more will come. An answer that holds nothing is an empty message."""
        if self._open is None and not self.items:
            yield from self._say("")
        if isinstance(self._open, _Message):
            self._open.logprobs += self._held_scores
        yield from self._close("completed" if is_whole else "incomplete")

    def all_items(self) -> list[OutputItem]:
        """What there is by now."""
        return [*self.items, *([] if self._open is None else [self._open.item("incomplete")])]

    def _say(self, text: str) -> Iterator[Event]:
        if not isinstance(self._open, _Message):
            yield from self._close("completed")
            self._open = _Message(self._events, len(self.items))
            yield from self._open.begin()
        if text:
            yield self._open.grow(text, self._held_scores)
            self._held_scores = []

    def _think(self, text: str) -> Iterator[Event]:
        if not isinstance(self._open, _Thought):
            yield from self._close("completed")
            self._open = _Thought(self._events, len(self.items), is_packed=self._packs_thoughts)
            yield from self._open.begin()
        yield self._open.grow(text)

    def _close(self, status: ItemStatus) -> Iterator[Event]:
        if self._open is not None:
            yield from self._open.end(status)
            self.items.append(self._open.item(status))
            self._open = None


class _Message:
    """A message with one part."""

    def __init__(self, events: Events, index: int) -> None:
        self._events = events
        self._index = index
        self._id = _new_id("msg")
        self._pieces: list[str] = []
        self.logprobs: list[TokenLogprob] = []

    def begin(self) -> Iterator[Event]:
        empty: OutputMessage = {**self.item("in_progress"), "content": []}
        yield self._tell("response.output_item.added", item=empty)
        yield self._within("response.content_part.added", part=self._part())

    def grow(self, text: str, logprobs: list[TokenLogprob]) -> Event:
        self._pieces.append(text)
        self.logprobs += logprobs
        return self._within("response.output_text.delta", delta=text, logprobs=logprobs)

    def end(self, status: ItemStatus) -> Iterator[Event]:
        part = self._part()
        yield self._within("response.output_text.done", text=part["text"], logprobs=part["logprobs"])
        yield self._within("response.content_part.done", part=part)
        yield self._tell("response.output_item.done", item=self.item(status))

    def item(self, status: ItemStatus) -> OutputMessage:
        content = [self._part()]
        return {"type": "message", "id": self._id, "status": status, "role": "assistant", "content": content}

    def _part(self) -> OutputText:
        text = "".join(self._pieces)
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": [*self.logprobs]}

    def _within(self, kind: str, **fields: object) -> Event:
        return self._tell(kind, item_id=self._id, content_index=0, **fields)

    def _tell(self, kind: str, **fields: object) -> Event:
        return self._events.build(kind, output_index=self._index, **fields)


class _Thought:
    """A thought with one part."""

    def __init__(self, events: Events, index: int, *, is_packed: bool) -> None:
        self._events = events
        self._index = index
        self._is_packed = is_packed
        self._id = _new_id("rs")
        self._pieces: list[str] = []

    def begin(self) -> Iterator[Event]:
        empty: OutputThought = {**self.item("in_progress"), "content": []}
        yield self._tell("response.output_item.added", item=empty)
        yield self._within("response.content_part.added", part=self._part())

    def grow(self, text: str) -> Event:
        self._pieces.append(text)
        return self._within("response.reasoning_text.delta", delta=text)

    def end(self, status: ItemStatus) -> Iterator[Event]:
        part = self._part()
        yield self._within("response.reasoning_text.done", text=part["text"])
        yield self._within("response.content_part.done", part=part)
        yield self._tell("response.output_item.done", item=self.item(status))

    def item(self, status: ItemStatus) -> OutputThought:
        part = self._part()
        item: OutputThought = {"type": "reasoning", "id": self._id, "status": status, "summary": [], "content": [part]}
        if self._is_packed:
            item["encrypted_content"] = pack_thought(part["text"])
        return item

    def _part(self) -> ReasoningPart:
        return {"type": "reasoning_text", "text": "".join(self._pieces)}

    def _within(self, kind: str, **fields: object) -> Event:
        return self._tell(kind, item_id=self._id, content_index=0, **fields)

    def _tell(self, kind: str, **fields: object) -> Event:
        return self._events.build(kind, output_index=self._index, **fields)


class _Call:
    """A call of a function."""

    def __init__(self, events: Events, index: int, name: str, call_id: str) -> None:
        self._events = events
        self._index = index
        self._name = name
        self._call_id = call_id
        self._id = _new_id("fc")
        self._pieces: list[str] = []

    def begin(self) -> Iterator[Event]:
        yield self._tell("response.output_item.added", item=self.item("in_progress"))

    def grow(self, text: str) -> Iterator[Event]:
        self._pieces.append(text)
        yield self._within("response.function_call_arguments.delta", delta=text)

    def end(self, status: ItemStatus) -> Iterator[Event]:
        arguments = "".join(self._pieces)
        yield self._within("response.function_call_arguments.done", name=self._name, arguments=arguments)
        yield self._tell("response.output_item.done", item=self.item(status))

    def item(self, status: ItemStatus) -> OutputCall:
        return {
            "type": "function_call",
            "id": self._id,
            "status": status,
            "call_id": self._call_id,
            "name": self._name,
            "arguments": "".join(self._pieces),
        }

    def _within(self, kind: str, **fields: object) -> Event:
        return self._tell(kind, item_id=self._id, **fields)

    def _tell(self, kind: str, **fields: object) -> Event:
        return self._events.build(kind, output_index=self._index, **fields)


def _new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"
