"""One request inside an engine: its tokens, its blocks, and how far it has come. Moved along by the scheduler alone."""

from dataclasses import dataclass, field
from enum import Enum, auto

from deployments.messages import GenerateRequest

# Stands in `token_ids` for a token that a step in flight draws; ids are never negative.
PENDING = -1


class Role(Enum):
    """What this engine does for the sequence."""

    LOCAL = auto()  # compute the prompt and decode
    EXPORT = auto()  # compute the prompt, hand over its KV, end after the first token
    IMPORT = auto()  # receive the KV of the prompt, then decode


class Status(Enum):
    """Where the sequence stands; it holds blocks in RESERVED and RUNNING, and in no other state."""

    WAITING = auto()
    RESERVED = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens and blocks of one request.

    Attributes:
        request: as it was asked.
        role: what this engine does for it.
        arrival_s: monotonic time of arrival.
        arrival_number: position in the order of arrival at this engine.
        num_overtaken_tokens: prompt tokens of later sequences that were admitted before this prompt was done; those of
            higher priority count in part.
        token_ids: what the request came with, then the tokens drawn here, `PENDING` for one that is not known yet.
        num_computed_tokens: leading tokens whose KV is in the blocks, or will be when the step in flight has ended.
        num_cached_tokens: leading tokens of the prompt that no engine has computed for this request, as far as is known
            here; while a prefill engine has it that is all of them, until its first chunk says where it began.
        block_table: physical block of each logical block.
        position_offset: what is added to its positions for the rotary embedding; KV of another one is of no use to it.
        block_hashes: chained hash of each full block of `token_ids`, filled on demand.
        num_published_blocks: leading blocks that were offered to the prefix cache.
        remote_threshold: IMPORT is chosen at admission if at least as many prompt tokens are uncached; None: never.
    """

    request: GenerateRequest
    role: Role
    arrival_s: float
    status: Status = Status.WAITING
    token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    arrival_number: int = 0
    num_overtaken_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    position_offset: int = 0
    block_hashes: list[bytes] = field(default_factory=list)
    num_published_blocks: int = 0
    remote_threshold: int | None = None
    last_token_s: float | None = None

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.given_token_ids)

    def move_to(self, position_offset: int) -> None:
        """Take another place for the rotary embedding; without blocks only, since their KV is of the old one."""
        assert not self.block_table, f"{self.request_id} holds blocks"
        if position_offset != self.position_offset:
            self.position_offset = position_offset
            self.block_hashes.clear()

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def priority(self) -> int:
        return self.request.priority

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens to compute before the first one is drawn here; of a resumed request with what it had generated."""
        return self.request.num_given_tokens

    @property
    def num_generated_tokens(self) -> int:
        """Drawn here."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_decoding(self) -> bool:
        """Exactly one token, the newest, has no KV yet, and it was generated."""
        return self.num_uncomputed_tokens == 1 and self.num_generated_tokens > 0

    @property
    def has_work(self) -> bool:
        """Whether there are tokens left to compute; not for the sake of a token beyond the last one it may generate."""
        return self.num_uncomputed_tokens > 0 and self.num_generated_tokens < self.request.max_new_tokens
