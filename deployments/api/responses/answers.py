"""Answers of `/v1/responses`, whole and streamed. Made of the same items: what a stream ends with is a whole answer."""

import time
from collections.abc import Sequence
from typing import cast

from deployments.api.answer_reader import build_reader
from deployments.api.answers import ChoiceResult, Tally
from deployments.api.call import Call
from deployments.api.choices import TextEvent
from deployments.api.failures import Failure
from deployments.api.forms import Usage
from deployments.api.responses.forms import Repeated, Response, ResponseError, ResponseUsage, Status
from deployments.api.responses.output import Event, Events, Output
from deployments.api.scores import ScoredToken, TokenLogprob, shape_chat
from deployments.api.tools.shapes import new_call_id
from deployments.messages import FinishReason


class ResponseAnswer:
    """Shapes of `/v1/responses`. Events begin with the answer as it will be, and end with it as it is.

    Args:
        call: with one choice.
        tally: of what it has used.
    """

    def __init__(self, call: Call, tally: Tally) -> None:
        self._call = call
        self._tally = tally
        self._events = Events()
        id_length = 0 if call.tools is None else call.tools.family.id_length
        self._output = Output(self._events, lambda: new_call_id(id_length), packs_thoughts=call.packs_thoughts)
        self._reader = build_reader(call.tools, call.thoughts)
        self._has_begun = False

    def chunks(self, event: TextEvent) -> list[Event]:
        events: list[Event] = []
        if not self._has_begun:
            self._has_begun = True
            events += [self._snapshot(f"response.{state}", "in_progress") for state in ("created", "in_progress")]
        events += self._take(event.text, event.scores, event.finish_reason)
        if event.finish_reason is not None:
            status = _status_of(event.finish_reason)
            events.append(self._snapshot(f"response.{status}", status))
        return events

    def is_plain(self, event: TextEvent) -> bool:
        return False  # every event has its number

    def ending(self) -> Sequence[Event]:
        return ()  # the last event of the choice has told everything

    def failing(self, failure: Failure) -> Sequence[Event]:
        code = failure.code or failure.kind
        details = failure.body()["error"]
        error = self._events.build("error", code=code, message=failure.message, param=failure.param, error=details)
        return error, self._snapshot("response.failed", "failed", {"code": code, "message": failure.message})

    def whole(self, choices: Sequence[ChoiceResult]) -> Response:
        (choice,) = choices
        assert choice.finish_reason is not None, "the choice has ended"
        if choice.events:
            for event in choice.events:
                self._take(event.text, event.scores, event.finish_reason)
        else:
            self._take(choice.text, (), choice.finish_reason)
        return self._response(_status_of(choice.finish_reason))

    def _take(self, text: str, scores: Sequence[ScoredToken], finish_reason: FinishReason | None) -> list[Event]:
        shaped: list[TokenLogprob] = shape_chat(scores)["content"] if scores else []
        events = [*self._output.push(self._reader.read(text, is_last=finish_reason is not None), shaped)]
        if finish_reason is not None:
            events += self._output.finish(is_whole=finish_reason is FinishReason.STOP)
        return events

    def _snapshot(self, kind: str, status: Status, error: ResponseError | None = None) -> Event:
        return self._events.build(kind, response=self._response(status, error))

    def _response(self, status: Status, error: ResponseError | None = None) -> Response:
        call = self._call
        repeated = cast(Repeated, call.repeated)
        response: Response = {
            "id": call.call_id,
            "object": "response",
            "created_at": call.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "error": error,
            "model": call.model,
            "output": self._output.all_items(),
            "usage": None if status == "in_progress" else _shape_usage(self._tally.usage()),
            "store": False,
            "background": False,
            "previous_response_id": None,
            **repeated,  # type: ignore[typeddict-item] # mypy: it might hold a receipt as well
        }
        if status != "in_progress":
            self._tally.add_receipt(response)
        return response


def _shape_usage(usage: Usage) -> ResponseUsage:
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            "cache_write_tokens": 0,
        },
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {
            "reasoning_tokens": usage.get("completion_tokens_details", {"reasoning_tokens": 0})["reasoning_tokens"]
        },
        "total_tokens": usage["total_tokens"],
    }


def _status_of(reason: FinishReason) -> Status:
    return "completed" if reason is FinishReason.STOP else "incomplete"
