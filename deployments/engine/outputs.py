"""What an engine says of new tokens, how long they took, and how it is. Knows nothing of steps and tensors."""

import time
from collections import Counter
from itertools import chain

from deployments.engine.scheduling.scheduler import Scheduler
from deployments.engine.scheduling.sequence import Sequence
from deployments.engine.scheduling.timed import TimedSequence
from deployments.engine.stats import EngineStats
from deployments.messages import Draws, EngineEvent, TokenOutput
from deployments.receipts import Timed


class Outputs:
    """Tells of the tokens of many sequences at one moment, which is what the end of a step is.

    Nearly all of them were told of their last tokens at one moment as well, so that few gaps differ.

    Args:
        stats: where times go.
    """

    def __init__(self, stats: EngineStats) -> None:
        self._stats = stats
        self._begun_s = time.monotonic()
        self._gaps: Counter[tuple[float, int]] = Counter()  # by when they began, and how many tokens came behind them
        self._timed: list[TimedSequence] = []

    def tell(self, sequence: Sequence, place: int, draws: Draws, now_s: float, by_prefill: bool) -> TokenOutput:
        """Of new tokens, the first of them in this place in the sequence, and whether a prefill engine drew them."""
        num_tokens, before_s = len(draws), sequence.note_told(now_s)
        if before_s is None:
            self._stats.ttft_s.observe(now_s - sequence.arrival_s)
            self._gaps[now_s, num_tokens - 1] += 1
        else:
            self._gaps[before_s, num_tokens] += 1
        return TokenOutput(
            sequence.request_id,
            place - len(sequence.request.prompt_token_ids),
            (draws[0].token_id,) if num_tokens == 1 else tuple([token.token_id for token in draws]),
            sequence.finish_reason,
            sequence.num_cached_tokens,
            draws if sequence.request.sampling.num_logprobs is not None else (),
            sequence.take_scores() if sequence.wants_scores else (),
            by_prefill,
        )

    def note_last(self, sequence: Sequence) -> None:
        """It will have drawn its last token here once the next ones are told: whoever wants to know is told of it."""
        if isinstance(sequence, TimedSequence):
            self._timed.append(sequence)

    def with_times(self, events: list[EngineEvent]) -> list[EngineEvent]:
        """What is told now, behind the times of those that are noted: what is told of them ends them.

        A token is told, and its time known, before this is called.
        """
        if not self._timed:
            return events
        timed, self._timed = self._timed, []
        return [*(Timed(sequence.request_id, sequence.times()) for sequence in timed), *events]

    def end(self, now_s: float, *, beside_prompts: bool = False) -> None:
        """No more are told of at this moment. What came together shares the time since the last token.

        Args:
            now_s: the moment.
            beside_prompts: it is the end of a step with prompt tokens in it.
        """
        for (before_s, num_tokens), times in self._gaps.items():
            if num_tokens:
                self._stats.itl_s.observe((now_s - before_s) / num_tokens, num_tokens * times)
                if beside_prompts:
                    self._stats.prefill_gaps += num_tokens * times
                    self._stats.prefill_gap_s += (now_s - before_s) * times
        self._gaps.clear()

    def snapshot(self, scheduler: Scheduler, num_used_blocks: int, num_exported_blocks: int) -> EngineStats:
        """All numbers as they are now; histograms are copies."""
        stats = self._stats
        stats.uptime_s = time.monotonic() - self._begun_s
        stats.num_queued_prompt_tokens = scheduler.num_queued_prompt_tokens
        stats.num_remote_prompt_tokens = scheduler.num_remote_prompt_tokens
        stats.num_waiting = len(scheduler.waiting)
        stats.num_reserved = len(scheduler.reserved)
        stats.num_running = len(scheduler.running)
        stats.num_drawn_tokens = sum(s.num_generated_tokens for s in scheduler.running)
        open_here = chain(scheduler.waiting, scheduler.reserved.values(), scheduler.running)
        stats.num_allowed_tokens = sum(s.request.max_new_tokens for s in open_here)
        stats.num_used_blocks = num_used_blocks
        stats.num_exported_blocks = num_exported_blocks
        stats.preemptions = scheduler.num_preemptions
        stats.finished = scheduler.num_finished
        return stats.copy()
