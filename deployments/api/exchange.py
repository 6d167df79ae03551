"""One request to generate and its response: reading, streaming, and what happens when a client leaves or does not read.

Tells an observer what became of it. Knows the backend as a Protocol alone, and errors as `failures.py` has them;
`http.py` routes to it.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from deployments.api import sse
from deployments.api.accounts import NO_ACCOUNT, Account
from deployments.api.answers import Answer, ChoiceResult, Tally
from deployments.api.asgi import until_disconnect
from deployments.api.backend import Backend, Ticket
from deployments.api.body import read_body
from deployments.api.call import Call
from deployments.api.caller import Caller, read_caller, read_trace_headers
from deployments.api.chat_template import TemplateLimitError
from deployments.api.choices import ChoiceText, TextEvent, follow, lead, merge, stream_choice
from deployments.api.failures import failure_of
from deployments.api.framing import Framer
from deployments.api.grammar_check import GrammarCheck
from deployments.api.keys import ForbiddenError
from deployments.api.observer import EndedCall, Observer, Outcome, Stopwatch
from deployments.api.receipts import ReceiptKeeper
from deployments.api.text import TextCodec
from deployments.messages import ModelInfo, Priority

# Reading 4 KiB of JSON and encoding it takes about 2 ms (SmolLM2's tokenizer, one core of a shared CPU); a longer body
# goes to a thread, so that it does not stop the streams of others.
_MAX_INLINE_BODY_BYTES = 4096
# What a client that has not read for long may take to come back and hear why its request was ended.
LAST_WORDS_S = 10.0


@dataclass(frozen=True, slots=True)
class Service:
    """What every call is served with; see `http.build_app`."""

    backend: Backend
    codec: TextCodec
    info: ModelInfo
    observer: Observer
    max_body_bytes: int
    body_timeout_s: float
    grammars: GrammarCheck


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One of the routes that generate, as an ASGI application: a response object could not watch the client."""

    service: Service
    id_prefix: str
    read: Callable[[bytes, str, TextCodec, ModelInfo, Priority], Call]
    build_answer: Callable[[Call, Tally], Answer]
    frame: Callable[[Mapping[str, object]], bytes] = sse.frame

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await Exchange(self, scope, receive, send).run()


class Exchange:
    """One request to generate and its response. Owns whether headers went out, and so how an error can be told."""

    def __init__(self, endpoint: Endpoint, scope: Scope, receive: Receive, send: Send) -> None:
        self._endpoint = endpoint
        self._service = endpoint.service
        self._scope = scope
        self._receive = receive
        self._send_message = send
        # Not the caller's own id: two calls may bear the same one, and the engines tell requests apart by this.
        self._call_id = f"{endpoint.id_prefix}{scope['state']['call_id']}"
        self._request_id: str = scope["state"]["request_id"]
        self._stopwatch = Stopwatch(self._service.observer)
        self._began_s = time.time()
        self._has_started = False
        self._answer: Answer | None = None
        self._status: HTTPStatus | None = None
        self._call: Call | None = None
        self._tally: Tally | None = None
        self._receipts: ReceiptKeeper | None = None
        self._given_up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._is_stalled = False
        self._account: Account = scope["state"].get("account", NO_ACCOUNT)

    async def run(self) -> None:
        """Read, generate, answer; a client that leaves ends all of it at once."""
        outcome = Outcome.ABORTED
        self._service.observer.request_started()
        try:
            outcome = await self._serve()
        finally:
            self._service.observer.request_finished(outcome)
            self._tell(outcome)

    def _tell(self, outcome: Outcome) -> None:
        """Tell of the whole call, at once if nothing more comes to be known of it."""
        seconds = self._stopwatch.elapsed_s()

        def tell() -> None:
            self._service.observer.call_ended(self._describe(outcome, seconds))

        if self._receipts is None or outcome is not Outcome.OK:
            tell()
        else:
            self._receipts.call_when_whole(tell)

    def _describe(self, outcome: Outcome, seconds: float) -> EndedCall:
        call, tally = self._call, self._tally
        usage = None if tally is None else tally.usage()
        return EndedCall(
            call_id=self._call_id,
            request_id=self._request_id,
            path=self._scope["path"],
            outcome=outcome,
            status=self._status,
            began_s=self._began_s,
            seconds=seconds,
            ttft_s=self._stopwatch.ttft_s,
            key=self._account.name,
            user=None if call is None else call.user,
            labels={} if call is None else call.labels,
            num_prompt_tokens=0 if call is None else call.num_prompt_tokens,
            num_cached_tokens=0 if usage is None else usage["prompt_tokens_details"]["cached_tokens"],
            num_generated_tokens=0 if usage is None else usage["completion_tokens"],
            finish_reasons=() if tally is None else tuple(tally.finish_reasons),
            trace_headers=read_trace_headers(Headers(scope=self._scope)),
            receipt=None if self._receipts is None else self._receipts.shape(),
        )

    async def _serve(self) -> Outcome:
        request, service = Request(self._scope, self._receive), self._service
        try:
            body = await read_body(request, service.max_body_bytes, service.body_timeout_s)
        except ClientDisconnect:
            return Outcome.ABORTED
        except Exception as error:
            return await self._fail(error)
        outcome = await until_disconnect(self._receive, self._respond(body), self._given_up)
        return outcome or (Outcome.STALLED if self._is_stalled else Outcome.ABORTED)

    def _stall(self) -> None:
        """The client does not read. What was to be sent blocks; if it ever goes out, the reason follows it."""
        if not self._is_stalled:
            self._is_stalled = True
            asyncio.get_running_loop().call_later(LAST_WORDS_S, self._give_up)

    def _give_up(self) -> None:
        if not self._given_up.done():
            self._given_up.set_result(None)

    async def _respond(self, body: bytes) -> Outcome:
        try:
            caller = read_caller(Headers(scope=self._scope), self._account.terms.usual_priority)
            call = self._own(await self._read_call(body, caller.priority))
            if caller.wants_receipt:
                call = replace(call, wants_receipt=True)
            self._call = call
            if (grammar := call.requests[0].sampling.grammar) is not None:
                await self._service.grammars.check(grammar)
            with closing(await self._admit(call, caller)) as ticket:
                await self._generate(call, self._keep_receipts(call, ticket))
        except ClientDisconnect:
            return Outcome.ABORTED
        except Exception as error:
            return await self._fail(error)
        return Outcome.OK

    def _keep_receipts(self, call: Call, ticket: Ticket) -> ReceiptKeeper | None:
        """Let the first token end the ticket's wait, and be noted if the caller or the observer wants a receipt."""
        if not call.wants_receipt and not self._service.observer.wants_receipts:
            self._stopwatch.on_first = ticket.first_token
            return None
        receipts = self._receipts = ReceiptKeeper(len(call.requests), self._stopwatch.elapsed_s, ticket.first_token)
        self._stopwatch.on_first = receipts.first_token
        return receipts

    async def _read_call(self, body: bytes, priority: Priority) -> Call:
        read, codec, info = self._endpoint.read, self._service.codec, self._service.info
        if len(body) <= _MAX_INLINE_BODY_BYTES:
            # What a chat template makes of a short body is not known before.
            with suppress(TemplateLimitError):
                return read(body, self._call_id, codec.brief, info, priority)
        return await asyncio.to_thread(read, body, self._call_id, codec, info, priority)

    async def _admit(self, call: Call, caller: Caller) -> Ticket:
        """Have the call let in; its prompts count for the caller's limit, unless it is not."""
        num_tokens = call.num_prompt_tokens
        self._account.check_tokens(num_tokens)
        self._account.take_tokens(num_tokens)
        try:
            return await self._service.backend.admit(call.requests, self._account.key or caller.key)
        except BaseException:
            self._account.take_tokens(-num_tokens)
            raise

    def _own(self, call: Call) -> Call:
        """The call, if it may be as urgent as it is, with KV that only callers of the same cache find."""
        priority, terms = call.requests[0].priority, self._account.terms
        if priority > terms.max_priority:
            message = f"its calls may have {terms.max_priority.name.lower()} priority at most"
            raise ForbiddenError(
                f"the key {self._account.name!r} may not ask for {priority.name.lower()} priority: {message}"
            )
        cache = terms.cache
        if not cache:
            return call
        salted = (replace(request, cache_salt=f"{cache}\0{request.cache_salt}") for request in call.requests)
        return replace(call, requests=tuple(salted))

    async def _generate(self, call: Call, receipts: ReceiptKeeper | None) -> None:
        tally = self._tally = Tally(call, receipts if call.wants_receipt else None)
        self._answer = answer = self._endpoint.build_answer(call, tally)
        choices = self._open_choices(call, receipts)
        async with aclosing(merge(choices)) as events:
            if call.stream:
                await self._stream(events, answer, tally)
            else:
                await self._collect(events, answer, tally, call)

    def _open_choices(self, call: Call, receipts: ReceiptKeeper | None) -> list[AsyncGenerator[TextEvent, None]]:
        """Where a prompt is sampled several times, the others begin when the first has left its KV to be found."""
        choices: list[AsyncGenerator[TextEvent, None]] = []
        is_ahead = asyncio.Event()
        for index in range(len(call.requests)):
            choice = self._open_choice(index, call, receipts)
            if call.num_samples == 1:
                choices.append(choice)
            elif call.lead_of(index) == index:
                is_ahead = asyncio.Event()
                choices.append(lead(choice, is_ahead))
            else:
                choices.append(follow(choice, is_ahead))
        return choices

    def _open_choice(self, index: int, call: Call, receipts: ReceiptKeeper | None) -> AsyncGenerator[TextEvent, None]:
        request, prefix = call.requests[index], call.prefixes[index]
        scores_prompt = request.num_prompt_logprobs is not None
        text = ChoiceText(index, self._service.codec, request.prompt_token_ids, call.text, prefix, scores_prompt)
        generate = partial(self._service.backend.generate, on_overflow=self._stall)
        if receipts is not None:
            generate = partial(generate, on_receipt=partial(receipts.take, index), holds_last=call.wants_receipt)
        return stream_choice(generate, request, text)

    async def _stream(self, events: AsyncGenerator[TextEvent, None], answer: Answer, tally: Tally) -> None:
        framer = Framer(answer, self._endpoint.frame)
        # The headers wait for the first event: until then an error can have its status code.
        async for event in events:
            is_first = not self._has_started
            if is_first:
                await self._start(HTTPStatus.OK, "text/event-stream; charset=utf-8", {"x-accel-buffering": "no"})
            tally.add(event)
            self._account.take_tokens(len(event.token_ids))
            # Thousands of logprobs take long enough to stop other streams.
            frames = framer.push(event) if event.prompt is None else await asyncio.to_thread(framer.push, event)
            if frames:
                if not is_first:
                    # The other streams of the same engine step make their text first, and then all write in a row: the
                    # proxy behind is woken once, not for each of them. 174 -> 152 us of CPU per token in all processes,
                    # 32 streams (medians of 12 rounds in turn, 2 cores, 2026-11-24).
                    await asyncio.sleep(0)
                await self._send_body(frames, more_body=True)
            self._stopwatch.lap(event)
        await self._send_body(framer.ending())

    async def _collect(self, events: AsyncGenerator[TextEvent, None], answer: Answer, tally: Tally, call: Call) -> None:
        choices = [ChoiceResult() for _ in call.requests]
        async for event in events:
            tally.add(event)
            self._account.take_tokens(event.num_tokens)
            choices[event.choice].add(event)
            self._stopwatch.lap(event)
        # Calls of tools are found at 1 to 2 us per character (2 cores of a shared Xeon, 2026-11-28).
        takes_long = call.scores_prompts or call.is_read
        body = await asyncio.to_thread(_to_body, answer, choices) if takes_long else _to_body(answer, choices)
        await self._start(HTTPStatus.OK, "application/json")
        await self._send_body(body)

    async def _fail(self, error: Exception) -> Outcome:
        failure = failure_of(error)
        failure.log(f"{self._call_id}, X-Request-Id {self._request_id},", error)
        if self._has_started:
            assert self._answer is not None, "it has been answered in part"
            await self._send_body(b"".join([self._endpoint.frame(chunk) for chunk in self._answer.failing(failure)]))
        else:
            await self._start(failure.status, "application/json", failure.headers())
            await self._send_body(sse.to_json(failure.body()))
        return failure.outcome

    async def _start(self, status: HTTPStatus, content_type: str, headers: dict[str, str] | None = None) -> None:
        fields = {"content-type": content_type, "cache-control": "no-store"} | (headers or {})
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields.items()]
        self._has_started, self._status = True, status
        await self._send({"type": "http.response.start", "status": int(status), "headers": raw})

    async def _send_body(self, body: bytes, more_body: bool = False) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": more_body})

    async def _send(self, message: Message) -> None:
        try:
            await self._send_message(message)
        except OSError as error:  # what ASGI servers raise when the client is gone
            raise ClientDisconnect from error


def _to_body(answer: Answer, choices: Sequence[ChoiceResult]) -> bytes:
    return sse.to_json(answer.whole(choices))
