"""One request inside an engine: its tokens, its blocks, and how far it has come.

A sequence moves itself: scheduler, block manager and engine say what happened to it, and nobody else writes its fields.
Its tokens pass through a step in two moves. `begin`: a step that computes them was started. `conclude`: it has ended,
their KV counts as computed, and what was drawn joins the tokens. A pipelined engine begins a step before it concludes
the one before, so a token may be pending: a step in flight draws it, and the next one already computes it.
"""

from array import array
from dataclasses import dataclass, field
from enum import Enum, auto

from deployments.engine.scheduling.block_tables import BlockTables
from deployments.engine.scheduling.ids import token_array
from deployments.engine.scheduling.place import Place
from deployments.engine.scheduling.span import Span
from deployments.messages import DrawnToken, Draws, FinishReason, GenerateRequest


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


# A member of an Enum takes Python 3.11 0.2 us to look up: those that are asked of each sequence in every step.
_EXPORT, _RUNNING = Role.EXPORT, Status.RUNNING


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens and blocks of one request; others read its fields and call its methods.

    Attributes:
        request: as it was asked.
        role: what this engine does for it.
        arrival_s: monotonic time of arrival.
        remote_threshold: IMPORT is chosen at admission if at least as many prompt tokens are uncached; None: never.
        token_ids: the prompt, then the generated tokens, as far as they are known; as `token_array` makes it.
        arrival_number: its place in the order of arrival.
        num_overtaken_tokens: prompt tokens of later sequences that went first, as far as its priority counts them.
        num_computed_tokens: leading tokens whose KV is in the blocks.
        num_cached_tokens: leading tokens of the prompt that no engine has computed for this request, as far as is known
            here; while a prefill engine has it all of them, until its first chunk says where it began.
        tables: the blocks that it holds, by the group of layers.
        position_offset: what is added to its positions for the rotary embedding; KV of another one is of no use to it.
        block_hashes: chained hash of each full block of `token_ids`, filled on demand.
        num_published_blocks: leading blocks that were offered to the prefix cache.
        drafts: guesses of the tokens behind the newest one, for the next step.
        draft_masks: what `mask` would be behind each of them, in a sequence that has one.
        wants_scores: logprobs of its prompt were asked for and are not told yet; nothing is shared with it until then.
        prompt_scores: those that are known, of the tokens behind the first.
        is_held: it waits for the host, and no step computes it.
        mask: which tokens may be drawn next, one bit each, the lowest first; None: all.
        last_token_s: monotonic time when its newest token was told; None: none was.
        finish_reason: why its last token was the last one; None: more may come.
        block_table: the first of its tables.
        request_id: of the request.
        num_prompt_tokens: what was there before the first token was drawn here.
        max_num_tokens: with so many it is over.
        num_tokens: known ones, and those that steps in flight draw for certain.
        num_launched_tokens: leading tokens, drafts included, whose KV is in the blocks, or will be by steps in flight.
    """

    request: GenerateRequest
    role: Role
    arrival_s: float
    remote_threshold: int | None = None
    token_ids: "array[int]" = field(default_factory=token_array)
    tables: BlockTables = field(default_factory=BlockTables)
    status: Status = Status.WAITING
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    arrival_number: int = 0
    num_overtaken_tokens: int = 0
    position_offset: int = 0
    block_hashes: list[bytes] = field(default_factory=list)
    num_published_blocks: int = 0
    drafts: tuple[int, ...] = ()
    draft_masks: tuple[bytes, ...] = ()
    is_held: bool = False
    mask: bytes | None = None
    wants_scores: bool = False
    prompt_scores: list[DrawnToken] = field(default_factory=list)
    last_token_s: float | None = None
    finish_reason: FinishReason | None = None
    # What is asked of each sequence in every step stands in fields, not in properties.
    block_table: "array[int]" = field(init=False)
    request_id: str = field(init=False)
    num_prompt_tokens: int = field(init=False)
    max_num_tokens: int = field(init=False)
    num_tokens: int = field(init=False)
    num_launched_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.token_ids = self.token_ids or token_array(self.request.given_token_ids)
        self.block_table = self.tables.each[0]
        self.request_id = self.request.request_id
        self.num_prompt_tokens = self.request.num_given_tokens
        self.max_num_tokens = self.num_prompt_tokens + self.request.max_new_tokens
        self.num_tokens = len(self.token_ids)
        self.num_launched_tokens = self.num_computed_tokens
        # Those of a resumed request were told with its first token.
        self.wants_scores = self.request.num_prompt_logprobs is not None and not self.request.generated_token_ids

    @property
    def priority(self) -> int:
        return self.request.priority

    @property
    def num_passed_blocks(self) -> int:
        """See `BlockTables.num_passed`."""
        return self.tables.num_passed

    @property
    def num_pending_tokens(self) -> int:
        """Tokens behind the known ones that steps in flight draw for certain."""
        return self.num_tokens - len(self.token_ids)

    @property
    def num_generated_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_in_flight_tokens(self) -> int:
        """Tokens behind the computed ones, drafts included, that steps in flight compute."""
        return self.num_launched_tokens - self.num_computed_tokens

    @property
    def num_lasting_tokens(self) -> int:
        """Of the launched tokens those whose KV stays right whatever the steps in flight draw: no drafts."""
        num_launched, num_known = self.num_launched_tokens, len(self.token_ids)
        return num_launched if num_launched < num_known else num_known

    @property
    def num_reached_tokens(self) -> int:
        """Tokens that are known or in flight, with drafts: those of a step that was chosen and not begun, too."""
        return max(self.num_tokens + len(self.drafts), self.num_launched_tokens)

    @property
    def num_remaining_tokens(self) -> int:
        """Tokens that no step has computed or computes."""
        return max(0, self.num_tokens - self.num_launched_tokens)

    @property
    def is_decoding(self) -> bool:
        """Exactly one token, the newest, is in no step yet, and it was generated."""
        return self.num_launched_tokens + 1 == self.num_tokens > self.num_prompt_tokens

    @property
    def has_work(self) -> bool:
        """Whether a step can compute tokens of it now; not for the sake of a token beyond the last one it may generate.

        While drafts are in flight it cannot: nobody knows yet where the next token stands.
        """
        return self.num_launched_tokens < self.num_tokens < self.max_num_tokens and not self.is_held

    def enter(self, arrival_number: int, position_offset: int) -> None:
        """It has come to this engine and waits."""
        self.arrival_number = arrival_number
        self._move_to(position_offset)

    def start(self) -> None:
        """It was given blocks, and steps may compute it."""
        assert self.status is Status.WAITING, f"{self.request_id} is {self.status}"
        self.limit_cached(self.num_computed_tokens)
        self.status = Status.RUNNING

    def reserve(self) -> None:
        """It was given blocks, and a prefill engine fills them."""
        assert self.status is Status.WAITING, f"{self.request_id} is {self.status}"
        self.role, self.status = Role.IMPORT, Status.RESERVED
        self.num_cached_tokens = self.num_prompt_tokens

    def activate(self) -> None:
        """What it waited for is here, or is waited for no longer; after a preemption its prompt is computed here."""
        assert self.status is Status.RESERVED, f"{self.request_id} is {self.status}"
        self.role, self.status = Role.LOCAL, Status.RUNNING

    def send_back(self, position_offset: int) -> None:
        """It gave its blocks away, waits, and is computed again from its first token; what is in flight still draws."""
        assert self.status is Status.RUNNING, f"{self.request_id} is {self.status}"
        self.status = Status.WAITING
        self.num_preemptions += 1
        self.drafts, self.draft_masks = (), ()
        self._move_to(position_offset)

    def finish(self) -> None:
        """It is over, whatever ended it."""
        assert not self.block_table, f"{self.request_id} holds blocks"
        self.status = Status.FINISHED

    def note_told(self, now_s: float) -> float | None:
        """Tokens of it are told; gives back when the ones before were, None if these are the first."""
        before, self.last_token_s = self.last_token_s, now_s
        return before

    def add_scores(self, run: Span, scores: Draws) -> None:
        """The step that scored tokens of its prompt has ended; those of an earlier pass are as good and give way."""
        assert len(self.prompt_scores) >= run.start, f"{self.request_id}: scores of {run} are out of turn"
        self.prompt_scores[run.start :] = scores

    def take_scores(self) -> Draws:
        """What is known of its prompt, to be told; from now on it is as others are."""
        scores, self.prompt_scores, self.wants_scores = tuple(self.prompt_scores), [], False
        return scores

    def hold(self) -> None:
        """Leave it out of steps until `release`."""
        self.is_held = True

    def release(self, mask: bytes | None = None) -> None:
        """What it needs is there; `mask`: of its next draw."""
        self.is_held, self.mask = False, mask

    def propose(self, drafts: tuple[int, ...], masks: tuple[bytes, ...] = ()) -> None:
        """Guess the tokens behind the newest one, with `draft_masks`, for the next step alone."""
        self.drafts, self.draft_masks = drafts, masks

    def overtake(self, num_tokens: int) -> None:
        """So many tokens of a later sequence go before this prompt."""
        self.num_overtaken_tokens += num_tokens

    def limit_cached(self, num_tokens: int) -> None:
        """No more than so many leading tokens were found, the others were computed for this request."""
        self.num_cached_tokens = min(self.num_cached_tokens, num_tokens)

    def take_blocks(self, blocks: list[list[int]], num_full_groups: int, place: Place, block_size: int) -> None:
        """Hold these blocks, by the group: see `BlockTables.take`."""
        self.tables.take(blocks, num_full_groups, place.num_passed)
        self.num_published_blocks = place.num_ready
        self.num_computed_tokens = self.num_launched_tokens = place.num_ready * block_size

    def find_cached(self, num_tokens: int) -> None:
        """So many leading tokens were found, and not computed for this very request before."""
        self.num_cached_tokens = num_tokens

    def add_hash(self, block_hash: bytes) -> None:
        """Of the next full block of its tokens."""
        self.block_hashes.append(block_hash)

    def note_published(self, num_blocks: int) -> None:
        """So many leading blocks can be found by others, and are never written to again."""
        self.num_published_blocks = num_blocks

    def drop_blocks(self) -> "array[int]":
        """Hold no blocks any more; gives them back."""
        self.num_computed_tokens = self.num_launched_tokens = self.num_published_blocks = 0
        return self.tables.drop()

    def begin(self, run: Span) -> None:
        """A step that computes this run was started: its next tokens are those behind it."""
        assert run.start == self.num_launched_tokens, f"{self.request_id}: {run} behind {self.num_launched_tokens}"
        self.num_launched_tokens += run.num_tokens
        self.drafts, self.draft_masks = (), ()
        if run.num_draws and self.role is not _EXPORT:
            self.num_tokens += 1

    def conclude(self, run: Span, draws: Draws) -> Draws:
        """The step that computes this run has ended.

        KV of rejected drafts is taken back by never counting: the next run writes over it. Nothing counts for a
        sequence that gave its blocks away meanwhile, but what was drawn is as good as before.

        Args:
            draws: those that count, see `Span.num_counted`; at least one if the run draws.

        Returns:
            Those that the request wants: none behind the one that ends it.
        """
        draws = self._until_end(draws)
        if self.status is _RUNNING:
            num_rejected = run.num_draws - len(draws)
            self.num_computed_tokens += run.num_tokens - num_rejected
            self.num_launched_tokens -= num_rejected
        if draws and self.role is not _EXPORT:
            assert run.first_draw == len(self.token_ids), f"{self.request_id}: draws of {run} are out of turn"
            self.num_tokens -= 1  # pending until now
            self._join(draws)
        return draws

    def receive(self, num_tokens: int, draws: Draws = ()) -> Draws:
        """KV of so many leading tokens came from a prefill engine; with all of the prompt's, what was drawn behind it.

        Returns as `conclude`.
        """
        self.num_computed_tokens = self.num_launched_tokens = num_tokens
        self.limit_cached(num_tokens)
        draws = self._until_end(draws)
        self._join(draws)
        return draws

    def check_integrity(self, block_size: int) -> None:
        """Assert that counts, tokens and blocks agree."""
        name, holds = self.request_id, self.status in (Status.RESERVED, Status.RUNNING)
        assert holds or not self.block_table, f"{name} is {self.status} and holds blocks"
        assert holds or not self.num_launched_tokens, f"{name} is {self.status} and has KV"
        assert self.num_computed_tokens >= 0 and self.num_in_flight_tokens >= 0, f"{name} computed less than nothing"
        capacity = self.tables.num_blocks * block_size
        assert capacity >= self.num_launched_tokens, f"{name}: more computed than its blocks hold"
        assert self.num_passed_blocks < max(1, self.tables.num_blocks), f"{name} holds none of its blocks"
        assert self.num_computed_tokens <= len(self.token_ids), f"{name}: tokens that nobody knows are computed"
        assert self.num_pending_tokens in (0, 1), f"{name}: {self.num_pending_tokens} tokens are pending"
        assert self.num_published_blocks * block_size <= self.num_lasting_tokens, f"{name}: published what may not last"
        assert len(self.block_hashes) * block_size <= len(self.token_ids), f"{name}: hashes of tokens not known"

    def _move_to(self, position_offset: int) -> None:
        """Take another place for the rotary embedding; without blocks only, since their KV is of the old one."""
        assert not self.block_table, f"{self.request_id} holds blocks"
        if position_offset != self.position_offset:
            self.position_offset = position_offset
            self.block_hashes.clear()

    def _until_end(self, draws: Draws) -> Draws:
        """Draws up to the one that ends the request, which is noted."""
        stop_token_ids, num_left = self.request.sampling.stop_token_ids, self.max_num_tokens - len(self.token_ids)
        for number, token in enumerate(draws, 1):
            if token.token_id in stop_token_ids:
                self.finish_reason = FinishReason.STOP
            elif number == num_left:
                self.finish_reason = FinishReason.LENGTH
            else:
                continue
            return draws[:number]
        return draws

    def _join(self, draws: Draws) -> None:
        for token in draws:
            self.token_ids.append(token.token_id)
        self.num_tokens += len(draws)
