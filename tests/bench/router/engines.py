"""An engine of a prefill pool in virtual time: the real block manager, and a step's cost instead of a model.

Prompts are computed one after the other, in the order in which they come.
"""

from collections import deque
from copy import copy
from dataclasses import dataclass, field

from deployments.engine.scheduling.block_manager import BlockManager
from deployments.engine.scheduling.sequence import Role, Sequence
from deployments.engine.stats import EngineStats
from deployments.messages import GenerateRequest, SamplingParams
from tests.bench.router.trace import BLOCK_SIZE, Arrival

_SAMPLING = SamplingParams(max_tokens=1)


@dataclass(frozen=True, slots=True)
class Speed:
    """What a step costs.

    Attributes:
        step_s: each one.
        token_s: each token of it.
        tokens_per_step: at most.
    """

    step_s: float = 0.005
    token_s: float = 0.00025
    tokens_per_step: int = 8192

    def seconds(self, num_tokens: int) -> tuple[int, float]:
        """Steps and seconds of so many tokens."""
        steps = -(-num_tokens // self.tokens_per_step)
        return steps, steps * self.step_s + num_tokens * self.token_s


@dataclass
class ModelledEngine:
    """One engine.

    Args:
        num_blocks: of its pool.
        speed: of its steps.
    """

    num_blocks: int
    speed: Speed
    blocks: BlockManager = field(init=False)
    waiting: deque[Sequence] = field(default_factory=deque)
    running: Sequence | None = None
    num_running_tokens: int = 0
    runs_until_s: float = 0.0
    stats: EngineStats = field(init=False)

    def __post_init__(self) -> None:
        self.blocks = BlockManager(self.num_blocks, BLOCK_SIZE)
        self.stats = EngineStats(
            num_blocks=self.num_blocks, max_num_seqs=64, max_num_batched_tokens=self.speed.tokens_per_step
        )

    @property
    def num_open(self) -> int:
        """Prompts that wait or are computed."""
        return len(self.waiting) + (self.running is not None)

    def add(self, request_id: str, arrival: Arrival) -> None:
        """A prompt comes."""
        request = GenerateRequest(request_id, (0,) * arrival.num_tokens, _SAMPLING)
        self.waiting.append(Sequence(request, Role.EXPORT, arrival.at_s, block_hashes=list(arrival.chain)))

    def start(self, now_s: float) -> float | None:
        """Begin the next prompt; when it will be done, None if there is none or one is being computed."""
        if self.running is not None or not self.waiting:
            return None
        sequence = self.waiting.popleft()
        assert self.blocks.admit(sequence), "a prompt is longer than the pool"
        sequence.find_cached(sequence.num_computed_tokens)
        self.num_running_tokens = sequence.num_prompt_tokens - sequence.num_computed_tokens
        self.runs_until_s = now_s + self.speed.seconds(self.num_running_tokens)[1]
        self.running = sequence
        return self.runs_until_s

    def finish(self) -> Sequence:
        """The prompt is done."""
        sequence, stats = self.running, self.stats
        assert sequence is not None
        steps, seconds = self.speed.seconds(self.num_running_tokens)
        stats.prompt_tokens += self.num_running_tokens
        stats.prefix_hit_tokens += sequence.num_cached_tokens
        stats.prefill_steps += steps
        stats.prefill_s += seconds
        stats.finished += 1
        sequence.receive(sequence.num_prompt_tokens)
        self.blocks.publish(sequence)
        self.blocks.free(sequence)
        self.running, self.num_running_tokens = None, 0
        return sequence

    def read(self, now_s: float) -> EngineStats:
        """As an engine tells it: prompts that wait count whole."""
        stats = copy(self.stats)  # nobody looks at its histograms
        left = min(self.num_running_tokens, max(0.0, self.runs_until_s - now_s) / self.speed.token_s)
        stats.num_queued_prompt_tokens = sum(s.num_prompt_tokens for s in self.waiting) + int(left)
        stats.num_waiting, stats.num_running = len(self.waiting), int(self.running is not None)
        stats.num_used_blocks = self.blocks.num_held_blocks
        return stats
