"""What became of a request, for callers who ask and for the log: how long it waited and was computed, and where.

Plain frozen values. Each part is measured by one clock, that of whoever says it: only durations are told, and nobody
compares the clocks of two machines. Engines and fronts say their parts, `receipt_log.py` puts them together.
"""

from dataclasses import dataclass

# Waited for what a replica says of a request, once its last token has come: both are on their way at once.
PATIENCE_S = 1.0


@dataclass(frozen=True, slots=True)
class EngineTimes:
    """How a request spent its time at one engine.

    Attributes:
        queued_s: from its arrival until it had KV blocks.
        awaited_s: from then until a prefill engine had filled them, or was waited for no longer.
        computing_s: from then until its first token was drawn here; 0 where another engine drew it.
        next_token_s: from its first token until the next: the wait for a step, and the step; None: there is none.
        num_found_tokens: leading prompt tokens whose KV was here.
        num_preemptions: how often it gave its blocks away and was computed again.
        num_drafted_tokens: that were guessed of its answer.
        num_accepted_tokens: of these, those that were right.
    """

    queued_s: float
    awaited_s: float
    computing_s: float
    next_token_s: float | None
    num_found_tokens: int
    num_preemptions: int
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timed:
    """An engine tells the front how a request spent its time; before its end, or with the last chunk of its prompt."""

    request_id: str
    times: EngineTimes


@dataclass(frozen=True, slots=True)
class ChunkArrived:
    """A chunk of KV is in the decode engine's pool.

    Attributes:
        num_blocks: of the chunk.
        num_bytes: what groups of layers with a window keep of them is less.
        seconds: in which some of it was complete and not yet in the pool.
        ago_s: since it is there.
    """

    num_blocks: int
    num_bytes: int
    seconds: float
    ago_s: float


@dataclass(frozen=True, slots=True)
class HandoffArrived:
    """All chunks of a prompt are in the decode engine's pool; told by the task that had them brought there."""

    request_id: str
    chunks: tuple[ChunkArrived, ...]


@dataclass(frozen=True, slots=True)
class HandoffReceipt:
    """How a prompt's KV went to the decode engine.

    Attributes:
        num_bytes: of all chunks.
        hidden_s: during which complete chunks were underway while the prompt was still computed.
        exposed_s: from the end of that until the prefill replica had heard that all had arrived.
    """

    num_bytes: int
    hidden_s: float
    exposed_s: float


@dataclass(frozen=True, slots=True)
class PrefillReceipt:
    """One prefill replica had a prompt to compute.

    Attributes:
        replica: its name; empty: it did not come to that.
        times: None: it did not say.
        handoff: None: nothing was handed over.
        error: why it failed; empty: it did not.
    """

    replica: str = ""
    times: EngineTimes | None = None
    handoff: HandoffReceipt | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class DecodeReceipt:
    """One decode replica had a request to serve.

    Attributes:
        replica: its name.
        times: None: its engine did not say.
        prefills: the prefill replicas that were asked, in turn.
    """

    replica: str
    times: EngineTimes | None
    prefills: tuple[PrefillReceipt, ...]


@dataclass(frozen=True, slots=True)
class Attempt:
    """A request was sent to a decode replica; more than one where the one before was lost.

    Attributes:
        replica: that was chosen; empty: any.
        reason: in words; empty: there was nothing to choose from.
        prefill_reason: likewise, of the prefill replica; None: none was chosen.
        first_token_s: from sending it until its first token arrived; None: none did.
        num_tokens: that arrived.
        decode: what the replica said in the end; None: it said nothing.
        error: why it was lost; empty: it was not.
    """

    replica: str
    reason: str
    prefill_reason: str | None
    first_token_s: float | None
    num_tokens: int
    decode: DecodeReceipt | None
    error: str


# Of one request, in turn; the last one is that which went on to the end.
Receipt = tuple[Attempt, ...]
