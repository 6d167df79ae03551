"""A modelled engine: takes for its steps what curves say, and counts as a real one does.

Steps in which nothing begins or ends are alike, so they pass at once; a step with prompt tokens in it is one event.
What comes while a step runs is part of the next one, and prompts go in the order of the product's scheduler.
"""

import heapq
import math
from collections.abc import Callable, Iterator
from itertools import count

import simpy

from deployments.engine.stats import EngineStats
from deployments.simulator.cache import ModelledCache
from deployments.simulator.curves import Curves
from deployments.simulator.gaps import Gaps
from deployments.simulator.machine import Machine
from deployments.simulator.requests import BLOCK_SIZE, Request
from deployments.simulator.sequences import Answer, Prompt, precedence_of
from deployments.simulator.steps import SAME_STEP, Steps

_order = count()


class ModelledEngine:
    """One engine.

    While a batch stays the same its steps are one event. Each is longer than the one before by what the answers have
    grown; of the gaps between two looks at it, about a second apart, the mean is noted.

    Args:
        env: keeps the time.
        curves: what steps take.
        gap_bound_s: gaps between tokens are counted that are longer.
        gaps: takes all gaps between tokens.
        machine: whose cores it shares; None: it has its own.
        max_steps: that are one event; 1: each step by itself, the slow way that tests compare with.
    """

    def __init__(
        self,
        env: simpy.Environment,
        curves: Curves,
        gap_bound_s: float,
        gaps: Gaps,
        machine: Machine | None = None,
        max_steps: float = math.inf,
    ) -> None:
        self._env, self._begun_s = env, env.now
        self.curves = curves
        self._gap_bound_s = gap_bound_s
        self._max_steps = max_steps
        self._gaps = gaps
        self._machine = machine
        num_blocks = curves.num_kv_tokens // BLOCK_SIZE
        self.cache = ModelledCache(num_blocks)
        self.stats = EngineStats(
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            max_num_seqs=curves.max_num_seqs,
            max_num_batched_tokens=curves.max_num_batched_tokens,
            num_receivers=1,
        )
        self.prompt_blocks = 0  # that are held by prompts
        self._prompts: list[Prompt] = []
        self._answers: list[tuple[float, int, Answer]] = []  # by the step that is their last
        self._joining: list[Answer] = []
        self._joined: list[tuple[Answer, float]] = []  # with the first step that runs; how long after their last token
        self._in_step: list[tuple[Prompt, int]] = []
        self._run = Steps(env.now)
        self._end_s = env.now  # of the steps that run, or ran
        self._steps = self._over = self._context = self._drawn = 0.0
        self._counted_steps = 0
        self._at_s = env.now
        self._turn = 0  # of an event that is not stale
        self._is_last_step = False  # something waits for its end

    @property
    def held_blocks(self) -> float:
        """By prompts, and by the tokens drawn behind them."""
        return self.prompt_blocks + self._drawn / BLOCK_SIZE

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
            self._pass_steps(self._env.now)
        self.stats.num_drawn_tokens = int(self._drawn) + len(self._answers)
        self.stats.uptime_s = self._env.now - self._begun_s
        return self.stats.copy()

    def compute(self, request: Request, done: Callable[[], None]) -> None:
        """A prompt comes."""
        self._prompts.append(Prompt(request, done, self._env.now, next(_order)))
        self._wake()

    def answer(self, answer: Answer) -> None:
        """A request whose prompt is computed goes on here."""
        self._joining.append(answer)
        self._wake()

    def fail(self) -> dict[int, int]:
        """It is gone; tells how many tokens were drawn of each request, by the request's `id`."""
        if not self._in_step:
            self._pass_steps(self._env.now)
        self._turn += 1
        self._is_last_step = True  # it never ends
        self._end_s = self._env.now
        self._share(False)
        return {id(answer.request): self._num_drawn(answer) for *_, answer in self._answers}

    def _wake(self) -> None:
        """Something has come: it is part of the next step. The one that runs ends first."""
        if self._in_step or self._is_last_step:
            return
        if not self._answers:
            self._at_s = self._env.now
            self._begin()
            return
        self._pass_steps(self._env.now)
        self._is_last_step = True
        self._turn += 1
        run = self._run
        end_s = run.at_s + run.lasting(math.ceil(self._steps - SAME_STEP) - run.before)
        self._after(max(0.0, end_s - self._env.now), self._end_steps)

    def change_pace(self, times: float) -> None:
        """The step that runs ends so much later, and those behind it begin anew."""
        now_s = self._env.now
        if self._end_s <= now_s:
            return
        run = self._run.stretched(now_s, times)
        if not self._in_step:
            self._pass_steps(run.at_s)
        if run.before > self._run.before:
            self._joined = []
        self._note_first_gaps(self._run.first_s, -1)
        self._note_first_gaps(run.first_s, 1)
        self._run = run
        self._turn += 1
        left_s = max(0.0, run.at_s + run.first_s - now_s)
        self._after(left_s, self._end_prompt_step if self._in_step else self._end_steps)

    def _begin(self) -> None:
        """Run the next steps: one with prompts, or as many as are alike."""
        joining, self._joining = self._joining, []
        for one in joining:
            one.since_step, one.over = self._steps, self._over
            heapq.heappush(self._answers, (self._steps + one.request.output_tokens - 1, next(_order), one))
            self._context += one.request.prompt_tokens
        room = self._preempt()
        self._turn += 1
        batch, curves = len(self._answers), self.curves
        step_s = curves.step_s + curves.sequence_s * batch + curves.context_s * self._context
        if self._prompts:
            self._in_step = list(self._fill(max(1, curves.max_num_batched_tokens - batch)))
            step_s += curves.token_s * sum(tokens for _, tokens in self._in_step)
        slower = self._share(bool(self._in_step or self._answers))
        growth_s = 0.0 if self._in_step else slower * curves.context_s * batch
        self._run = run = Steps(self._env.now, self._steps, slower * step_s, growth_s)
        self._joined = [(one, run.at_s - one.since_s) for one in joining]
        self._note_first_gaps(run.first_s, 1)
        if self._in_step:
            self._after(run.first_s, self._end_prompt_step)
        elif self._answers:
            steps = max(0.0, min(self._answers[0][0] - self._steps, max(1.0, room // batch), self._max_steps))
            self._after(run.lasting(steps), self._end_steps)

    def _share(self, is_running: bool) -> float:
        """It computes, or not; how many times as long as alone it takes for that."""
        if self._machine is None:
            return 1.0
        if is_running:
            return self._machine.begins(self)
        self._machine.ends(self)
        return 1.0

    def _preempt(self) -> float:
        """Have the newest answers give way until a step has room in the KV pool; tokens of room that are left then."""
        while True:
            room = (self.stats.num_blocks - self.prompt_blocks) * BLOCK_SIZE - self._drawn
            if len(self._answers) <= 1 or room >= len(self._answers):
                return room
            newest = max(range(len(self._answers)), key=lambda i: self._answers[i][1])
            answer = self._answers.pop(newest)[2]
            heapq.heapify(self._answers)
            self._forget(answer, self._num_drawn(answer))
            self.stats.preemptions += 1
            self._is_last_step = True  # the next one is being made
            answer.sent_back(self._num_drawn(answer))
            self._is_last_step = False

    def _num_drawn(self, answer: Answer) -> int:
        """Of an answer, the token that its prompt gave among them."""
        return 1 + int(self._steps - answer.since_step + SAME_STEP)

    def _forget(self, answer: Answer, num_drawn: int) -> None:
        request = answer.request
        request.gaps_over += self._over - answer.over
        self._context = max(0.0, self._context - request.prompt_tokens - num_drawn + 1)
        self._drawn = max(0.0, self._drawn - num_drawn + 1)

    def _note_first_gaps(self, step_s: float, times: int) -> None:
        """The first gap of an answer is longer than the step by what its hand-off took, and by the step before.

        With -1 times, what was noted is taken back.
        """
        for one, lag_s in self._joined:
            if lag_s > 0:
                self._gaps.add(step_s, -times)
                self._gaps.add(step_s + lag_s, times)
                if step_s <= self._gap_bound_s < step_s + lag_s:
                    one.request.gaps_over += times

    def _fill(self, room: int) -> Iterator[tuple[Prompt, int]]:
        prompts = self._prompts
        for prompt in sorted(prompts, key=precedence_of) if len(prompts) > 1 else prompts:
            if prompt.left < 0:
                self._look_up(prompt)
            tokens = min(room, prompt.left)
            yield prompt, tokens
            room -= tokens
            if not room:
                return

    def _look_up(self, prompt: Prompt) -> None:
        """The turn of a prompt comes: what of it is cached need not be computed."""
        request = prompt.request
        found = self.cache.find(request.chain, request.prompt_tokens)
        prompt.left = request.prompt_tokens - found
        self.stats.prefix_hit_tokens += found
        own = prompt.precedence
        for other in self._prompts:
            if other.number < prompt.number and own < other.precedence:
                other.num_overtaken += prompt.left

    def _after(self, delay_s: float, then: Callable[[], None]) -> None:
        turn, self._end_s = self._turn, self._env.now + delay_s

        def run(_: simpy.Event) -> None:
            if turn == self._turn:
                then()

        self._env.timeout(delay_s).callbacks.append(run)

    def _end_prompt_step(self) -> None:
        step_s = self._run.first_s
        self._note_steps(1.0, step_s)
        self._at_s = self._env.now
        stats = self.stats
        stats.prefill_steps += 1
        stats.prefill_s += step_s
        for prompt, tokens in self._in_step:  # it has not ended for those who are told that a prompt is computed
            stats.prompt_tokens += tokens
            prompt.left -= tokens
            if not prompt.left:
                self._prompts.remove(prompt)
                stats.ttft_s.observe(self._env.now - prompt.since_s)
                self.cache.keep(prompt.request.chain, self.held_blocks)
                prompt.done()
        self._let_go()
        self._in_step = []
        self._begin()

    def _end_steps(self) -> None:
        self._pass_steps(self._env.now)
        self._steps = float(round(self._steps))  # a step has ended, whatever rounding says
        self._is_last_step = True  # it has not ended for those who are told that an answer has
        self._let_go()
        self._is_last_step = False
        self._begin()

    def _pass_steps(self, until_s: float) -> None:
        """Count the steps that have run since anything began or ended, until a time."""
        run = self._run
        if self._answers and run.first_s > 0:
            steps = run.before + run.passed(until_s - run.at_s) - self._steps
            if steps > 0:  # of one that was stretched as much may be counted already
                self._note_steps(steps, (until_s - self._at_s) / steps)
                self._at_s = until_s

    def _note_steps(self, steps: float, length_s: float) -> None:
        """So many have run, each so long."""
        batch = len(self._answers)
        self._steps += steps
        self._context += steps * batch
        if batch:
            self._drawn += steps * batch
            self._gaps.add(length_s, steps * batch)
        if length_s > self._gap_bound_s:
            self._over += steps
        whole = int(self._steps) - self._counted_steps
        if whole:
            self._counted_steps += whole
            self.stats.steps += whole
            self._count_gaps(length_s, whole * batch)

    def _count_gaps(self, length_s: float, count: int) -> None:
        if count:
            self.stats.generated_tokens += count
            self.stats.itl_s.observe(length_s, count)
        if self._in_step:
            self.stats.prefill_gaps += count
            self.stats.prefill_gap_s += length_s * count

    def _let_go(self) -> None:
        while self._answers and self._answers[0][0] <= self._steps + 1e-6:
            answer = heapq.heappop(self._answers)[2]
            self._forget(answer, answer.request.output_tokens)
            self.stats.finished += 1
            answer.done()
        if not self._answers:
            self._context = self._drawn = 0.0
