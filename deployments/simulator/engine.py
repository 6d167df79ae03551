"""A modelled engine: takes for its steps what curves say, and counts as a real one does.

Steps in which nothing begins or ends are alike, so they pass at once; a step with prompt tokens in it is one event.
"""

import heapq
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

import simpy

from deployments.engine.stats import EngineStats
from deployments.simulator.cache import ModelledCache
from deployments.simulator.curves import Curves
from deployments.simulator.requests import BLOCK_SIZE, Request

_order = count()


@dataclass(eq=False, slots=True)
class Prompt:
    """A prompt that is computed here.

    Attributes:
        request: whose.
        left: tokens to compute; counted once its turn comes, when the cache is looked into.
        done: told when it is computed.
        since_s: when it came to this engine.
    """

    request: Request
    done: Callable[[], None]
    since_s: float
    left: int = -1


@dataclass(eq=False, slots=True)
class _Answer:
    request: Request
    done: Callable[[], None]
    over: float


class ModelledEngine:
    """One engine.

    Args:
        env: keeps the time.
        curves: what steps take.
        gap_bound_s: gaps between tokens are counted that are longer.
    """

    def __init__(self, env: simpy.Environment, curves: Curves, gap_bound_s: float) -> None:
        self._env = env
        self._curves = curves
        self._gap_bound_s = gap_bound_s
        num_blocks = curves.num_kv_tokens // BLOCK_SIZE
        self.cache = ModelledCache(num_blocks)
        self.stats = EngineStats(
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            max_num_seqs=curves.max_num_seqs,
            max_num_batched_tokens=curves.max_num_batched_tokens,
            num_receivers=1,
        )
        self.held_blocks = 0
        self._prompts: deque[Prompt] = deque()
        self._answers: list[tuple[float, int, _Answer]] = []  # by the step that is their last
        self._joining: list[tuple[Request, Callable[[], None]]] = []
        self._in_step: list[tuple[Prompt, int]] = []
        self._step_s = 0.0  # of the steps that run, or of the one with a prompt
        self._steps = self._over = self._context = 0.0
        self._counted_steps = 0
        self._at_s = env.now
        self._turn = 0  # of an event that is not stale

    @property
    def num_answers(self) -> int:
        """Sequences that draw tokens."""
        return len(self._answers) + len(self._joining)

    @property
    def num_prompts(self) -> int:
        """That wait or are computed."""
        return len(self._prompts)

    @property
    def queued_tokens(self) -> int:
        """Of prompts that wait or are computed: whole, until their turn comes."""
        return sum(p.request.prompt_tokens if p.left < 0 else p.left for p in self._prompts)

    def report(self) -> EngineStats:
        """Its numbers now, in the middle of steps as well."""
        if not self._in_step:
            self._pass_steps()
        return self.stats.copy()

    def compute(self, request: Request, done: Callable[[], None]) -> None:
        """A prompt comes."""
        self._prompts.append(Prompt(request, done, self._env.now))
        if not self._in_step:
            self._pass_steps()
            self._begin()

    def answer(self, request: Request, done: Callable[[], None]) -> None:
        """A request whose prompt is computed goes on here, from its second token."""
        self._joining.append((request, done))
        if not self._in_step:
            self._pass_steps()
            self._begin()

    def _begin(self) -> None:
        """Run the next steps: one with prompts, or as many as are alike."""
        for request, done in self._joining:
            last = self._steps + request.output_tokens - 1
            heapq.heappush(self._answers, (last, next(_order), _Answer(request, done, self._over)))
            self._context += request.prompt_tokens
        self._joining.clear()
        self._turn += 1
        batch, curves = len(self._answers), self._curves
        self._step_s = curves.step_s + curves.sequence_s * batch + curves.context_s * self._context
        if self._prompts:
            self._in_step = list(self._fill(max(1, curves.max_num_batched_tokens - batch)))
            self._step_s += curves.token_s * sum(tokens for _, tokens in self._in_step)
            self._after(self._step_s, self._end_prompt_step)
        elif self._answers:
            self._after(max(0.0, self._answers[0][0] - self._steps) * self._step_s, self._end_steps)

    def _fill(self, room: int) -> Iterator[tuple[Prompt, int]]:
        for prompt in self._prompts:
            if prompt.left < 0:
                request = prompt.request
                found = self.cache.find(request.chain, request.prompt_tokens)
                prompt.left = request.prompt_tokens - found
                self.stats.prefix_hit_tokens += found
            tokens = min(room, prompt.left)
            yield prompt, tokens
            room -= tokens
            if not room:
                return

    def _after(self, delay_s: float, then: Callable[[], None]) -> None:
        turn = self._turn

        def run(_: simpy.Event) -> None:
            if turn == self._turn:
                then()

        self._env.timeout(delay_s).callbacks.append(run)

    def _end_prompt_step(self) -> None:
        self._note_steps(1.0)
        self._at_s = self._env.now
        stats = self.stats
        stats.prefill_steps += 1
        stats.prefill_s += self._step_s
        for prompt, tokens in self._in_step:  # it has not ended for those who are told that a prompt is computed
            stats.prompt_tokens += tokens
            prompt.left -= tokens
            if not prompt.left:
                self._prompts.popleft()
                stats.ttft_s.observe(self._env.now - prompt.since_s)
                self.cache.keep(prompt.request.chain, self.held_blocks)
                prompt.done()
        self._let_go()
        self._in_step = []
        self._begin()

    def _end_steps(self) -> None:
        self._pass_steps()
        self._let_go()
        self._begin()

    def _pass_steps(self) -> None:
        """Count the steps that have run since anything began or ended."""
        if self._answers and self._step_s > 0:
            self._note_steps((self._env.now - self._at_s) / self._step_s)
        self._at_s = self._env.now

    def _note_steps(self, steps: float) -> None:
        batch = len(self._answers)
        self._steps += steps
        self._context += steps * batch
        if self._step_s > self._gap_bound_s:
            self._over += steps
        whole = int(self._steps) - self._counted_steps
        if whole:
            self._counted_steps += whole
            self.stats.steps += whole
            if batch:
                self.stats.generated_tokens += whole * batch
                self.stats.itl_s.observe(self._step_s, whole * batch)

    def _let_go(self) -> None:
        while self._answers and self._answers[0][0] <= self._steps + 1e-6:
            answer = heapq.heappop(self._answers)[2]
            request = answer.request
            request.gaps_over += self._over - answer.over
            self._context = max(0.0, self._context - request.prompt_tokens - request.output_tokens)
            self.stats.finished += 1
            answer.done()
        if not self._answers:
            self._context = 0.0
