"""Whatever a model writes: no endpoint fails, a stream says what a whole answer says, and nothing is left behind."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from deployments.api.http import build_app
from deployments.messages import FinishReason
from tests.api.fakes import FakeBackend, client_of
from tests.fuzz.babble import INFO, PIECES, build_codec, steps_of

CODEC = build_codec()
TOOL = {"name": "f", "parameters": {"type": "object"}}
ASKED: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x", "logprobs": 2},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "x"}],
        "tools": [{"type": "function", "function": TOOL}],
        "logprobs": True,
        "top_logprobs": 1,
    },
    "/v1/responses": {
        "input": "x",
        "tools": [{"type": "function", **TOOL}],
        "include": ["message.output_text.logprobs", "reasoning.encrypted_content"],
    },
}
MORE: dict[str, st.SearchStrategy[Any]] = {
    "stop": st.sampled_from(["}", "<tool_call>", "\n", "🌊"]),
    "include_stop_str_in_output": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "chat_template_kwargs": st.just({"enable_thinking": True}),
    "parallel_tool_calls": st.booleans(),
}
OF_CHATS = ("chat_template_kwargs", "parallel_tool_calls")
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.text(min_size=1, max_size=3)), min_size=1, max_size=12)


def told(path: str, answer: dict[str, Any]) -> list[object]:
    """Text, thoughts, calls and the end of an answer, in a form that streams can be brought to."""
    if path == "/v1/responses":
        items = answer["output"]
        return [
            "".join(part["text"] for item in items if item["type"] == "message" for part in item["content"]),
            "".join(part["text"] for item in items if item["type"] == "reasoning" for part in item["content"]),
            [[item["name"], item["arguments"]] for item in items if item["type"] == "function_call"],
            answer["status"],
        ]
    (choice,) = answer["choices"]
    if path == "/v1/completions":
        return [choice["text"], choice["finish_reason"]]
    message = choice["message"]
    calls = [[call["function"]["name"], call["function"]["arguments"]] for call in message.get("tool_calls", [])]
    return [message["content"] or "", message.get("reasoning_content") or "", calls, choice["finish_reason"]]


def gathered(path: str, events: list[dict[str, Any]]) -> list[object]:
    """The same of a stream."""
    if path == "/v1/responses":
        assert [event["sequence_number"] for event in events] == [*range(len(events))]
        by_kind = lambda kind: "".join(event["delta"] for event in events if event["type"] == kind)  # noqa: E731
        text, thought, calls, status = told(path, events[-1]["response"])
        assert (text, thought) == (
            by_kind("response.output_text.delta"),
            by_kind("response.reasoning_text.delta"),
        )
        return [text, thought, calls, status]
    choices = [choice for event in events for choice in event["choices"]]
    (reason,) = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    if path == "/v1/completions":
        return ["".join(choice["text"] for choice in choices), reason]
    begun: list[list[str]] = []
    for choice in choices:
        for delta in choice["delta"].get("tool_calls", []):
            if delta["index"] == len(begun):
                begun.append([delta["function"]["name"], ""])
            begun[delta["index"]][1] += delta["function"].get("arguments", "")
    said = [
        "".join(choice["delta"].get(field) or "" for choice in choices) for field in ("content", "reasoning_content")
    ]
    return [*said, begun, reason]


def events_of(text: str) -> list[dict[str, Any]]:
    data = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    return [json.loads(event) for event in data]


@given(
    st.sampled_from([*ASKED]),
    TEXTS,
    st.sampled_from([FinishReason.STOP, FinishReason.LENGTH]),
    st.fixed_dictionaries({}, optional=MORE),
)
async def test_whatever_a_model_writes_a_stream_tells_it_as_a_whole_answer_does(
    path: str, pieces: list[str | bytes], reason: FinishReason, more: dict[str, Any]
) -> None:
    asked = ASKED[path] | {
        name: value for name, value in more.items() if path != "/v1/completions" or name not in OF_CHATS
    }
    backend = FakeBackend(lambda _: steps_of(pieces, reason))
    async with client_of(build_app(backend, CODEC, INFO)) as client:
        whole = await client.post(path, json=asked)
        stream = await client.post(path, json=asked | {"stream": True})
    assert (whole.status_code, stream.status_code) == (200, 200), whole.text
    assert gathered(path, events_of(stream.text)) == told(path, whole.json())
    assert not backend.running and all(ticket.is_closed for ticket in backend.tickets)
