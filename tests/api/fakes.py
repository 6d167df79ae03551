"""Stand-ins for the tests of the API: a tokenizer of bytes, a scripted backend, a real server, a recording observer."""

import asyncio
import socket
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson
import uvicorn
from starlette.applications import Starlette
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deployments.api.http import build_app
from deployments.api.observer import EndedCall, Outcome
from deployments.api.text import TextCodec
from deployments.messages import DrawnToken, Draws, FinishReason, GenerateRequest, ModelInfo, TokenOutput
from deployments.receipts import Receipt
from tests.waiting import PATIENCE_S

END_ID = 256  # special: shows no text
PLAIN_END_ID = ord("!")  # a stop id that is ordinary text

INFO = ModelInfo(name="fake/model", path="", max_model_len=64, vocab_size=257, eos_token_ids=(END_ID,))
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ m.role[0] }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def build_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: ids 0 to 255 are bytes, 256 is the special `<end>`."""
    vocab = {letter_of(byte): byte for byte in range(256)}
    assert vocab.keys() == set(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    wrapped.chat_template = chat_template
    return wrapped


def letter_of(byte: int) -> str:
    """The printable character that stands for a byte in a byte-level vocabulary, asked of the tokenizers library."""
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if byte < 0x80:
        return pre_tokenizer.pre_tokenize_str(chr(byte))[0][0]
    if byte < 0xC0:  # a continuation byte: the second of a two-byte character
        return pre_tokenizer.pre_tokenize_str(bytes([0xC2, byte]).decode())[0][0][1]
    # What is left leads a character, or stands in no valid UTF-8 (0xC0, 0xC1, 0xF5 and up) and is a letter itself.
    return chr(byte)


def build_codec() -> TextCodec:
    return TextCodec(build_tokenizer())


class Hang:
    """A step at which the backend waits until it is closed."""


Step = Sequence[int] | str | FinishReason | Exception | Hang | asyncio.Event


@dataclass
class FakeTicket:
    """Keeps what it is told."""

    first_tokens: list[int] = field(default_factory=list)
    is_closed: bool = False

    def first_token(self, index: int) -> None:
        assert not self.is_closed
        self.first_tokens.append(index)

    def close(self) -> None:
        self.is_closed = True


@dataclass
class FakeBackend:
    """Plays a script per request.

    Steps: text or ids are one output; a finish reason ends the request together with the output before it; an exception
    is raised; an event is waited for.
    """

    script: Callable[[GenerateRequest], Sequence[Step]]
    num_cached_tokens: int = 0
    num_prefilled: int = 0
    receipt: Receipt = ()
    healthy: tuple[bool, str] | Exception = (True, "")
    refusal: Exception | None = None
    calls: list[tuple[tuple[GenerateRequest, ...], bytes]] = field(default_factory=list)
    tickets: list[FakeTicket] = field(default_factory=list)
    requests: list[GenerateRequest] = field(default_factory=list)
    on_told: Callable[[Callable[[Receipt], None]], None] = lambda _: None
    running: set[str] = field(default_factory=set)
    num_outputs: Counter[str] = field(default_factory=Counter)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def admit(self, requests: Sequence[GenerateRequest], key: bytes) -> FakeTicket:
        self.calls.append((tuple(requests), key))
        if self.refusal is not None:
            raise self.refusal
        self.tickets.append(FakeTicket())
        return self.tickets[-1]

    async def generate(
        self,
        request: GenerateRequest,
        on_overflow: Callable[[], None] = lambda: None,
        on_receipt: Callable[[Receipt], None] | None = None,
        *,
        holds_last: bool = True,
    ) -> AsyncGenerator[TokenOutput, None]:
        self.requests.append(request)
        if on_receipt is not None:
            on_receipt(self.receipt)
            self.on_told(on_receipt)
        self.running.add(request.request_id)
        await self._tell()
        try:
            async for output in self._play(request):
                self.num_outputs[request.request_id] += 1
                yield output
        finally:
            self.running.discard(request.request_id)
            await self._tell()

    async def _play(self, request: GenerateRequest) -> AsyncIterator[TokenOutput]:
        index = 0
        steps = list(self.script(request))
        for place, step in enumerate(steps):
            match step:
                case Hang():
                    await asyncio.Event().wait()
                case asyncio.Event():
                    await step.wait()
                case Exception():
                    raise step
                case FinishReason():
                    return
                case _:
                    ids = tuple(step.encode()) if isinstance(step, str) else tuple(step)
                    following = steps[place + 1] if place + 1 < len(steps) else None
                    reason = following if isinstance(following, FinishReason) else None
                    draws, prompt = scores_of(request, ids, index)
                    by_prefill = index < self.num_prefilled
                    yield TokenOutput(
                        request.request_id, index, ids, reason, self.num_cached_tokens, draws, prompt, by_prefill
                    )
                    index += len(ids)

    async def _tell(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def until(self, is_reached: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
        async with asyncio.timeout(timeout_s), self.changed:
            await self.changed.wait_for(is_reached)

    async def health(self) -> tuple[bool, str]:
        if isinstance(self.healthy, Exception):
            raise self.healthy
        return self.healthy

    async def metrics(self) -> bytes:
        return b"# TYPE up gauge\nup 1\n"

    async def live(self) -> Mapping[str, object]:
        return {"model": "fake/model"}


def scores_of(request: GenerateRequest, ids: tuple[int, ...], index: int) -> tuple[Draws, Draws]:
    """Logprobs of tokens and, with the first of them, of the prompt, as far as they were asked for."""
    num_top, num_prompt_top = request.sampling.num_logprobs, request.num_prompt_logprobs
    draws = () if num_top is None else tuple(scored(token_id, num_top) for token_id in ids)
    if index or num_prompt_top is None:
        return draws, ()
    return draws, tuple(scored(token_id, num_prompt_top) for token_id in request.prompt_token_ids[1:])


def scored(token_id: int, num_top: int) -> DrawnToken:
    """The n-th likeliest of all tokens is n - 1, whatever stands before."""
    top = tuple((other, logprob_of(other)) for other in range(num_top))
    return DrawnToken(token_id, logprob_of(token_id), token_id + 1, top)


def logprob_of(token_id: int) -> float:
    return -0.5 - token_id / 128


def playing(*steps: Step) -> FakeBackend:
    """A backend that plays the same script for every request."""
    return FakeBackend(lambda _: steps)


@dataclass
class Recorder:
    """An observer that keeps what it is told."""

    num_started: int = 0
    denied: list[str] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    gaps: list[tuple[float, int]] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    ended: list[EndedCall] = field(default_factory=list)
    wants_receipts: bool = False
    has_started: asyncio.Event = field(default_factory=asyncio.Event)
    has_finished: asyncio.Event = field(default_factory=asyncio.Event)

    def request_started(self) -> None:
        self.num_started += 1
        self.has_started.set()

    def request_denied(self, reason: str) -> None:
        self.denied.append(reason)

    def first_token(self, seconds: float) -> None:
        self.first_s.append(seconds)

    def inter_token(self, seconds: float, num_tokens: int) -> None:
        self.gaps.append((seconds, num_tokens))

    def request_finished(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self.has_finished.set()

    def call_ended(self, call: EndedCall) -> None:
        self.ended.append(call)


def client_at(url: str = "", **settings: Any) -> httpx.AsyncClient:
    """A client of a real server that waits for longer than httpx does by itself, which is 5 s."""
    return httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, **settings)


def client_of(app: Starlette) -> httpx.AsyncClient:
    """A client that calls the app without a socket."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


class _Server(uvicorn.Server):
    """Ends as soon as nothing is under way: by itself it waits for tenths of seconds, which hundreds of tests would."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        while self.server_state.connections or self.server_state.tasks:  # noqa: ASYNC110  # they tell nobody
            await asyncio.sleep(0.001)
        for server in self.servers:
            await server.wait_closed()


@asynccontextmanager
async def serving(app: Starlette) -> AsyncIterator[str]:
    """Run a real server on a free port; gives its URL."""
    config = uvicorn.Config(app, port=0, lifespan="off", ws="none", log_level="warning")
    config.load()
    server = _Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    await server.on_tick(0)  # what goes with every answer
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await server.shutdown()


def events_of(body: bytes) -> Iterator[Any]:
    """The JSON of each server-sent event; the string `[DONE]` for the last one."""
    assert body.endswith(b"\n\n")
    for event in body[:-2].split(b"\n\n"):
        assert event.startswith(b"data: ") and b"\n" not in event
        data = event.removeprefix(b"data: ")
        yield "[DONE]" if data == b"[DONE]" else orjson.loads(data)


COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def body_of(path: str, **fields: Any) -> dict[str, Any]:
    prompt = {"prompt": "abc"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "hi"}]}
    return {"model": INFO.name} | prompt | fields


async def post(backend: FakeBackend, path: str, recorder: Recorder | None = None, **fields: Any) -> httpx.Response:
    async with client_of(build_app(backend, build_codec(), INFO, observer=recorder)) as client:
        return await client.post(path, json=body_of(path, **fields))
