"""Tokens from senders to receivers over real sockets: each once, in order, to the right reader; and what goes wrong."""

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from deployments.errors import EngineDeadError, SlowReaderError
from deployments.messages import DrawnToken, FinishReason, ReplyAddress, TokenOutput
from deployments.tokens.receiver import TokenReceiver, TokenStream
from deployments.tokens.sender import TokenSender
from tests.waiting import PATIENCE_S, until


def token(request_id: str, index: int, last: int | None = None) -> TokenOutput:
    return TokenOutput(request_id, index, (index,), FinishReason.LENGTH if index == last else None)


def ignore() -> None: ...


def ignore_close(stream: TokenStream) -> None: ...


class Losses:
    """What a sender says that it lost."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.told: asyncio.Queue[tuple[str, str]] = asyncio.Queue()

    def __call__(self, request_id: str, reason: str) -> None:
        self._loop.call_soon_threadsafe(self.told.put_nowait, (request_id, reason))

    async def next(self) -> tuple[str, str]:
        async with asyncio.timeout(PATIENCE_S):
            return await self.told.get()


@pytest_asyncio.fixture
async def receiver() -> AsyncIterator[TokenReceiver]:
    receiver = await TokenReceiver.start("127.0.0.1", max_unread_tokens=100)
    yield receiver
    await receiver.stop()


@pytest_asyncio.fixture
async def losses() -> Losses:
    return Losses()


@pytest_asyncio.fixture
async def sender(losses: Losses) -> AsyncIterator[TokenSender]:
    sender = TokenSender(losses)
    yield sender
    await asyncio.to_thread(sender.stop)


async def read(stream: TokenStream) -> list[int]:
    async with asyncio.timeout(PATIENCE_S):
        return [token_id async for output in stream for token_id in output.token_ids]


async def test_whoever_waits_for_the_next_token_is_called_once_and_not_for_one_that_came_before(
    receiver: TokenReceiver,
) -> None:
    stream, calls = receiver.open("r", ignore, ignore_close), []
    stream.call_on_next(lambda: calls.append(list(stream.token_ids)))
    for index in (0, 1):
        stream.push(token("r", index))
    stream.call_on_next(lambda: calls.append(list(stream.token_ids)))  # it was resumed
    for index in (1, 2, 3):
        stream.push(token("r", index))
    assert calls == [[0], [0, 1, 2]]
    await stream.aclose()


async def test_many_requests_share_one_channel_per_engine(receiver: TokenReceiver, losses: Losses) -> None:
    senders = [TokenSender(losses) for _ in range(3)]
    names = {f"{i}-{j}": sender for i, sender in enumerate(senders) for j in range(20)}
    streams = {name: receiver.open(name, ignore, ignore_close) for name in names}
    for name, sender in names.items():
        sender.register(name, receiver.address)
    for index in range(50):
        for sender in senders:
            sender.send([token(name, index, last=49) for name, owner in names.items() if owner is sender])
    answers = await asyncio.gather(*(read(stream) for stream in streams.values()))
    assert answers == [list(range(50))] * 60
    assert receiver.num_channels == 3
    for stream in streams.values():
        await stream.aclose()
    assert receiver.num_streams == 0
    await asyncio.gather(*(asyncio.to_thread(sender.stop) for sender in senders))


async def test_two_receivers_share_an_engine(sender: TokenSender, receiver: TokenReceiver) -> None:
    other = await TokenReceiver.start("127.0.0.1", 100)
    streams = [owner.open("r" + str(i), ignore, ignore_close) for i, owner in enumerate((receiver, other))]
    sender.register("r0", receiver.address)
    sender.register("r1", other.address)
    for index in range(3):
        sender.send([token("r0", index, last=2), token("r1", index, last=2)])
    assert [await read(stream) for stream in streams] == [[0, 1, 2]] * 2
    assert receiver.num_channels == other.num_channels == 1
    await other.stop()


async def test_a_token_that_comes_twice_is_read_once(receiver: TokenReceiver, losses: Losses) -> None:
    prefill, decode = TokenSender(losses), TokenSender(losses)
    stream = receiver.open("r", ignore, ignore_close)
    for engine in (prefill, decode):
        engine.register("r", receiver.address)
    prefill.send([token("r", 0)])
    assert (await anext(stream)).token_ids == (0,)
    decode.send([TokenOutput("r", 0, (0, 1))])
    decode.send([token("r", 2, last=2)])
    assert await read(stream) == [1, 2]
    for engine in (prefill, decode):
        await asyncio.to_thread(engine.stop)


async def test_a_token_of_a_prefill_engine_is_told_apart_however_late_the_reader_is(
    sender: TokenSender, receiver: TokenReceiver
) -> None:
    stream = receiver.open("r", ignore, ignore_close)
    sender.register("r", receiver.address)
    sender.send([TokenOutput("r", 0, (0,), by_prefill=True)])
    for index in (1, 2):
        sender.send([token("r", index, last=2)])
    await until(lambda: stream.has_finished)
    outputs = [output async for output in stream]
    assert [(output.token_ids, output.by_prefill) for output in outputs] == [((0,), True), ((1, 2), False)]


def drawn(*token_ids: int) -> tuple[DrawnToken, ...]:
    return tuple(DrawnToken(token_id, -0.5 - token_id, 1, ((token_id, -0.5),)) for token_id in token_ids)


async def test_logprobs_come_with_their_tokens_however_those_are_joined_and_cut(receiver: TokenReceiver) -> None:
    stream = receiver.open("r", ignore, ignore_close)
    both = TokenOutput("r", 0, (0, 1), draws=drawn(0, 1), prompt=drawn(8, 9))
    last = TokenOutput("r", 2, (2,), FinishReason.LENGTH, draws=drawn(2))
    stream.push(TokenOutput("r", 0, (0,), draws=drawn(0), prompt=drawn(8, 9)))
    first = await anext(stream)
    assert (first.draws, first.prompt) == (drawn(0), drawn(8, 9))
    stream.push(both)
    stream.push(last)
    rest = await anext(stream)
    assert (rest.token_ids, rest.draws, rest.prompt) == ((1, 2), drawn(1, 2), ())
    other = receiver.open("other", ignore, ignore_close)
    other.push(both)
    other.push(last)
    assert (await anext(other)).prompt == drawn(8, 9)


async def test_logprobs_cross_the_wire(sender: TokenSender, receiver: TokenReceiver) -> None:
    stream = receiver.open("r", ignore, ignore_close)
    sender.register("r", receiver.address)
    sent = TokenOutput("r", 0, (3,), FinishReason.LENGTH, draws=drawn(3), prompt=drawn(8, 9))
    sender.send([sent])
    assert await anext(stream) == sent


async def test_what_came_while_the_reader_was_away_is_one_output(receiver: TokenReceiver) -> None:
    stream = receiver.open("r", ignore, ignore_close)
    for index in range(5):
        stream.push(token("r", index, last=4))
    output = await anext(stream)
    assert output == TokenOutput("r", 0, (0, 1, 2, 3, 4), FinishReason.LENGTH)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_a_reader_that_leaves_too_much_unread_is_given_up_once(receiver: TokenReceiver) -> None:
    told: list[str] = []
    stream = receiver.open("r", lambda: told.append("r"), ignore_close)
    for index in range(300):
        stream.push(token("r", index, last=299))
    with pytest.raises(SlowReaderError, match="more than 100 tokens"):
        await anext(stream)
    assert told == ["r"]


async def test_a_reader_may_leave_as_much_as_is_allowed(receiver: TokenReceiver) -> None:
    stream = receiver.open("r", lambda: pytest.fail("within the bound"), ignore_close)
    for _ in range(3):
        start = len(stream.token_ids)
        for index in range(start, start + 100):
            stream.push(token("r", index))
        assert len((await anext(stream)).token_ids) == 100


async def test_an_error_comes_after_the_tokens_before_it(receiver: TokenReceiver) -> None:
    stream = receiver.open("r", ignore, ignore_close)
    stream.push(token("r", 0))
    stream.fail(EngineDeadError("gone"))
    assert (await anext(stream)).token_ids == (0,)
    with pytest.raises(EngineDeadError, match="gone"):
        await anext(stream)


async def test_an_error_after_the_last_token_is_nobodys_business(receiver: TokenReceiver) -> None:
    stream = receiver.open("r", ignore, ignore_close)
    stream.push(token("r", 0, last=0))
    stream.fail(EngineDeadError("gone"))
    assert await read(stream) == [0]


async def test_lost_tokens_end_the_stream_with_an_error(receiver: TokenReceiver) -> None:
    stream = receiver.open("r", ignore, ignore_close)
    stream.push(token("r", 1))
    with pytest.raises(EngineDeadError, match="are lost"):
        await anext(stream)


async def test_tokens_of_closed_and_unknown_requests_are_dropped(sender: TokenSender, receiver: TokenReceiver) -> None:
    await receiver.open("closed", ignore, ignore_close).aclose()
    stream = receiver.open("open", ignore, ignore_close)
    for name in ("closed", "open", "forgotten"):
        sender.register(name, receiver.address)
    sender.forget("forgotten")
    sender.send([token("closed", 0), token("forgotten", 0), token("never", 0), token("open", 0, last=0)])
    assert await read(stream) == [0]


async def test_a_receiver_that_goes_ends_its_requests_and_no_others(
    sender: TokenSender, receiver: TokenReceiver, losses: Losses
) -> None:
    other = await TokenReceiver.start("127.0.0.1", 100)
    streams = {
        "a": other.open("a", ignore, ignore_close),
        "b": other.open("b", ignore, ignore_close),
        "c": receiver.open("c", ignore, ignore_close),
    }
    for name in ("a", "b"):
        sender.register(name, other.address)
    sender.register("c", receiver.address)
    sender.send([token("a", 0, last=0), token("b", 0)])
    assert await read(streams["a"]) == [0]
    await other.stop()
    name, reason = await losses.next()
    assert name == "b", "a had finished"
    assert "closed the token channel" in reason
    sender.send([token("c", 0, last=0)])
    assert await read(streams["c"]) == [0]
    assert losses.told.empty()


async def test_a_receiver_that_is_not_there_is_a_loss(sender: TokenSender, losses: Losses) -> None:
    with socket.socket() as taken:  # held, so that nobody else listens at it, but not listened at
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        sender.register("r", ReplyAddress("127.0.0.1", port, bytes(32)))
        name, reason = await losses.next()
    assert name == "r"
    assert f"cannot reach the ingress at 127.0.0.1:{port}" in reason


async def test_a_receiver_that_does_not_read_is_given_up(losses: Losses) -> None:
    sender = TokenSender(losses, max_unsent_bytes=100_000)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        sender.register("r", ReplyAddress("127.0.0.1", deaf.getsockname()[1], bytes(32)))
        sender.send([TokenOutput("r", index, tuple(range(1000))) for index in range(10_000)])  # more than sockets hold
        sender.send([token("r", 10_000)])
        name, reason = await losses.next()
    assert name == "r"
    assert "more than 100000 bytes" in reason
    await asyncio.to_thread(sender.stop)


async def test_a_stranger_without_the_key_is_turned_away(receiver: TokenReceiver, losses: Losses) -> None:
    stranger = TokenSender(losses)
    stream = receiver.open("r", ignore, ignore_close)
    stranger.register("r", ReplyAddress(receiver.address.host, receiver.address.port, bytes(32)))
    stranger.send([token("r", 0)])
    assert (await losses.next())[0] == "r"
    assert not stream.token_ids
    await asyncio.to_thread(stranger.stop)
