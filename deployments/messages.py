"""What the parts say to each other: requests going down, tokens coming back.

Owns the words of API, deployments and engine: plain frozen values that pickle small. Knows no Ray, HTTP, torch, text.
"""

from dataclasses import dataclass
from enum import IntEnum, StrEnum

import msgspec

from deployments.errors import KvRelayError
from deployments.receipts import HandoffArrived, Timed

# Bounds of adjustments: OpenAI's, and for the repetition penalty what keeps every logit a number.
MAX_PENALTY = 2.0
MAX_LOGIT_BIAS = 100.0
REPETITION_PENALTIES = 0.1, 10.0
# The likeliest tokens that are told beside each token, at most.
MAX_LOGPROBS = 20
# Logprobs of one prompt, those of the likeliest tokens included: 0.9 MB on the wire, within one frame.
MAX_PROMPT_SCORES = 2**16
# Between a request's id and the number of its attempt.
_RESUMED = "~"


class FinishReason(StrEnum):
    """Why a sequence ended; the values are OpenAI's."""

    STOP = "stop"
    LENGTH = "length"


class Priority(IntEnum):
    """How urgent a request is: the higher goes first among prompts, and is refused last."""

    LOW = -1
    NORMAL = 0
    HIGH = 1


@dataclass(frozen=True, slots=True)
class Adjustments:
    """What changes the logits of the next token before it is drawn, in the order of the attributes.

    Tokens that were generated before a request was handed over or resumed count as generated.

    Attributes:
        logit_bias: token ids, each once, and what is added to their logits.
        repetition_penalty: divides logits, or multiplies those below 0, of all tokens of prompt and answer; 1 is off.
        presence_penalty: is taken from the logit of each token that was generated; 0 is off.
        frequency_penalty: likewise, as many times as the token was generated; 0 is off.
        min_tokens: before so many tokens are generated none of `SamplingParams.stop_token_ids` is drawn.
    """

    logit_bias: tuple[tuple[int, float], ...] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must look like.

    Attributes:
        source: in llguidance's own form, as `grammars.py` takes it.
        end_token_ids: may be drawn where the answer is whole, and nowhere else; each ends it.
        field: the API's name of what asked for it.
    """

    source: str
    end_token_ids: tuple[int, ...]
    field: str


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn and when to stop.

    Attributes:
        max_tokens: tokens to generate at most, at least 1.
        temperature: 0 is greedy.
        top_k: keep the k most likely tokens; 0 is off.
        top_p: keep the smallest set of tokens whose probability reaches this; 1 is off.
        min_p: drop tokens less likely than this share of the most likely one; 0 is off.
        seed: with the position it fixes the draw, whichever engine makes it.
        stop_token_ids: ids that end the sequence with `FinishReason.STOP`; the id itself is emitted.
        adjustments: of the logits; None: they are the model's.
        num_logprobs: each token is told with its logprob and with so many of the likeliest tokens; None: without.
        grammar: of the text that is generated; None: any.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    adjustments: Adjustments | None = None
    num_logprobs: int | None = None
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """The replicas that a request is meant for. If one is not there, another takes its place.

    Attributes:
        decode: name of the decode replica; empty: any.
        prefill: name of the prefill replica, if one is needed; empty: any.
        min_remote_tokens: one is needed if decode lacks so many tokens of the prompt; None: decode's setting holds.
        by_peer: the prefill replica is one of the decode pool, see `EngineStats.is_flipped`.
    """

    decode: str = ""
    prefill: str = ""
    min_remote_tokens: int | None = None
    by_peer: bool = False


ANYWHERE = Route()


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One prompt to continue, as token ids.

    Attributes:
        request_id: unique among those that run.
        prompt_token_ids: what the caller asked to continue.
        sampling: of the whole request, tokens that were generated before included.
        priority: among other requests.
        generated_token_ids: what was generated of it already, before it was lost and resumed; the next token follows.
        cache_salt: KV is shared only among requests with the same one.
        gathers: it goes where others of its salt go, if nothing that is cached and no wait speaks against it.
        route: where it is to go.
        num_prompt_logprobs: as `SamplingParams.num_logprobs`, of the prompt, which its decode engine computes whole.
        wants_receipt: whoever serves it says how long things took.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    priority: Priority = Priority.NORMAL
    generated_token_ids: tuple[int, ...] = ()
    cache_salt: str = ""
    gathers: bool = False
    route: Route = ANYWHERE
    num_prompt_logprobs: int | None = None
    wants_receipt: bool = False

    @property
    def num_prompt_scores(self) -> int:
        """Logprobs of the prompt that are asked for: of each token, and of the likeliest beside it."""
        num_top = self.num_prompt_logprobs
        return 0 if num_top is None else len(self.prompt_token_ids) * (num_top + 1)

    @property
    def given_token_ids(self) -> tuple[int, ...]:
        """All that is there before an engine draws its first token of it."""
        return self.prompt_token_ids + self.generated_token_ids

    @property
    def num_given_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.generated_token_ids)

    @property
    def max_new_tokens(self) -> int:
        """Tokens that are left to generate, at most."""
        return self.sampling.max_tokens - len(self.generated_token_ids)

    @property
    def origin(self) -> str:
        """The id under which it was asked at first, before it was resumed."""
        return self.request_id.partition(_RESUMED)[0]


def resumed_id(request_id: str, attempt: int) -> str:
    """The id of what is left of a request that was lost; tells it from what may still come of the lost one."""
    return f"{request_id}{_RESUMED}{attempt}"


class DrawnToken(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A token that was drawn, or one of a prompt, and how likely it was there.

    Logprobs are those of the model's own distribution: before adjustments, temperature, and the bounds of sampling.

    Attributes:
        token_id: the token.
        logprob: natural logarithm of its probability; None: nobody asked.
        rank: 1 if no token was likelier, and so on; 0: nobody asked.
        top: the likeliest tokens with their logprobs, likeliest first, as many as were asked for.
    """

    token_id: int
    logprob: float | None = None
    rank: int = 0
    top: tuple[tuple[int, float], ...] = ()


# What one run of a sequence has drawn: nothing for a chunk in the middle of a prompt.
Draws = tuple[DrawnToken, ...]


# A Struct, no dataclass, for it crosses the wire with every token; not tracked by the collector, for it has no cycle.
class TokenOutput(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """New tokens of one sequence.

    Attributes:
        request_id: the request they belong to.
        index: place of `token_ids[0]` among all generated tokens of the request, from 0.
        token_ids: consecutive new tokens; never empty.
        finish_reason: set on the last output of a request.
        num_cached_tokens: leading prompt tokens whose KV was found in a prefix cache and that nobody has computed for
            this request, as far as the engine knows that says so. The least that is said in its course is true.
        draws: the same tokens with their logprobs, where those were asked for.
        prompt: in the first output, where it was asked for: the prompt's tokens behind its first, with their logprobs.
        by_prefill: a prefill engine drew them, whoever tells of them.
    """

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    draws: Draws = ()
    prompt: Draws = ()
    by_prefill: bool = False


@dataclass(frozen=True, slots=True)
class ReplyAddress:
    """Where an engine sends the tokens of a request: the token receiver of the ingress replica that took it.

    Attributes:
        host: IP address.
        port: TCP port.
        key: 32 bytes that the receiver wants to see first; they travel over Ray alone.
    """

    host: str
    port: int
    key: bytes


@dataclass(frozen=True, slots=True)
class Ended:
    """An engine is done with a request, and has sent all of its tokens that it will send.

    Attributes:
        request_id: the request.
        loss: why the engine gave it up; with `InvalidRequestError` no other could go on. None: its last token is out.
    """

    request_id: str
    loss: KvRelayError | None = None


@dataclass(frozen=True, slots=True)
class HandoffExpired:
    """A prefill engine has given a request up: within the lease the decode engine was not heard of."""

    request_id: str


@dataclass(frozen=True, slots=True)
class GivenUp:
    """An engine cannot go on with a request, and has ended it; for why, see `Ended`."""

    request_id: str
    error: KvRelayError


@dataclass(frozen=True, slots=True)
class Placed:
    """A decode engine gave a request its KV blocks and says who computes the prompt; again, if that changes.

    Attributes:
        request_id: the request.
        remote: True: blocks are reserved and wait for a prefill engine; False: this engine computes the prompt.
        num_cached_tokens: leading prompt tokens that are here already, or are not read; always whole blocks.
        num_unread_tokens: of these the ones that are not here.
    """

    request_id: str
    remote: bool
    num_cached_tokens: int
    num_unread_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ChunkReady:
    """The KV of some blocks of a prompt, or of some of their layers, as a prefill engine hands it over.

    Attributes:
        request_id: the request.
        index: number of the chunk; its engine gives none twice.
        start_block: first block, counted from the start of the sequence.
        num_blocks: consecutive blocks in the chunk.
        is_last: no chunk of the request comes behind it.
        first_token: the first generated token, as it was drawn; comes with the last of the KV.
        num_cached_tokens: leading tokens of the prompt that the prefill engine did not compute for this request.
        layers: the first one whose KV this is, and the one behind the last; None: it is that of all.
    """

    request_id: str
    index: int
    start_block: int
    num_blocks: int
    is_last: bool = False
    first_token: DrawnToken | None = None
    num_cached_tokens: int = 0
    layers: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class HandoffOpened:
    """A prefill engine has accepted a prompt: its hand-off may be taken, and passed on."""

    request_id: str


EngineEvent = TokenOutput | Placed | HandoffExpired | GivenUp | Timed
# What a front hears of its engine: how requests ended, too. Tokens are not among it: they go to the ingress directly.
FrontEvent = Placed | HandoffOpened | HandoffArrived | Ended | Timed


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the ingress must know of the model the engines run.

    Attributes:
        name: the name in the API.
        path: folder with the tokenizer files.
        max_model_len: longest prompt plus output, in tokens, that the model takes and an engine's KV pool holds.
        vocab_size: ids are below this.
        eos_token_ids: ids that end a sequence unless the request says otherwise.
        root: what it is called where it comes from, without its folder; empty: as `name`.
    """

    name: str
    path: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    root: str = ""
