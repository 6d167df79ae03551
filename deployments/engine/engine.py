"""The engine: requests in, events out, one step at a time. One class for every role, and no thread of its own.

A request's life here:
1. `add` (compute and decode, or reserve for a remote prefill) or `prefill` (compute for another engine) queues it.
2. The scheduler gives it blocks; what the prefix cache holds is not computed again. A decode engine says `Placed`.
3. Its prompt runs in chunks. A prefill engine copies the KV of each out, and tells whoever has taken the hand-off.
4. A decode engine takes chunks with `import_chunk`; the last one brings the first token and starts the decoding.
5. Each further step yields one `TokenOutput` per sequence, until a stop token, the length, or `abort`.
6. Whatever ended it, its blocks are free; those of a shared prefix stay findable.

A hand-off has a lease on either side (`handoff/`). When it runs out a decode engine computes the rest of the prompt
itself, and a prefill engine drops the request. `check` and `take_handoff` are thread-safe; `EngineLoop` calls the rest.
"""

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from deployments.engine.config import EngineConfig, EngineLimits
from deployments.engine.endings import Endings
from deployments.engine.execution.base import LaunchedStep
from deployments.engine.execution.canary import Canary
from deployments.engine.execution.rehearsal import build_rehearsed
from deployments.engine.execution.sizing import choose_limits, export_room
from deployments.engine.grammar.guides import Guides
from deployments.engine.handoff.handoffs import Handoffs
from deployments.engine.handoff.outbox import TakenHandoff
from deployments.engine.handoff.states import Clock
from deployments.engine.kv.copies import Allocate, KVCopies
from deployments.engine.lending import Lending
from deployments.engine.model.load import LoadedModel
from deployments.engine.outputs import Outputs
from deployments.engine.pacing import Pace, is_awaited
from deployments.engine.scheduling.block_manager import build_blocks
from deployments.engine.scheduling.cache_log import CacheEvents, Position
from deployments.engine.scheduling.checks import check_first_block, check_request
from deployments.engine.scheduling.run import ScheduledSequence
from deployments.engine.scheduling.scheduler import Scheduler
from deployments.engine.scheduling.sequence import Role, Sequence
from deployments.engine.scheduling.timed import build_sequence
from deployments.engine.speculation.speculator import build_speculator
from deployments.engine.stats import EngineStats
from deployments.errors import InvalidRequestError
from deployments.messages import ChunkReady, EngineEvent, GenerateRequest, HandoffExpired, Placed


class Engine:
    """Continuous batching over a paged KV cache.

    Args:
        loaded: the model.
        config: what the user asked for.
        is_pipelined: start a step before the one before has been concluded, so that a GPU never waits; None: on a GPU.
        clock: of leases; monotonic seconds.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: EngineConfig,
        is_pipelined: bool | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        loaded = replace(loaded, kv_shape=loaded.kv_shape.stored_as(config.kv_dtype))
        self.limits: EngineLimits = choose_limits(loaded, config)
        self.kv_shape = loaded.kv_shape
        self._runner = build_rehearsed(loaded, self.limits)
        self._copies = KVCopies(self._runner.cache)
        self._blocks = build_blocks(self.limits, enable_prefix_caching=config.enable_prefix_caching)
        self._scheduler = Scheduler(self._blocks, self.limits, loaded.positions)
        bytes_per_block = loaded.kv_shape.bytes_per_block(self.limits.block_size)
        self.export_room = export_room(self.limits, bytes_per_block, loaded.device, config.hands_over)
        self._stats = EngineStats.begin(self.limits)
        self._handoffs = Handoffs(self._copies, self.limits, self.export_room, config.lease_s, clock, self._stats)
        self._speculator = build_speculator(config.speculation, self._stats, loaded, self.limits)
        self._is_pipelined = loaded.device.type == "cuda" if is_pipelined is None else is_pipelined
        self._hands_over = config.hands_over
        self._begun_s = 0.0
        self._scheduled: list[ScheduledSequence] = []
        self._in_flight: LaunchedStep | None = None
        self._vocab_size = loaded.vocab_size
        self._guides = Guides(loaded.path, loaded.vocab_size)
        self._canary = Canary(self._runner, self._blocks)
        self._pace = Pace(self._stats)
        self._outputs = Outputs(self._stats)
        outbox = self._handoffs.outbox
        self._endings = Endings(self._blocks, outbox, self._guides, self._outputs, self._stats)
        self.lending = Lending(self._runner.cache, self._blocks, self._copies, self._stats)

    @property
    def has_work(self) -> bool:
        """Whether `step` could make progress now."""
        return self._has_steps or self._guides.is_busy or self.next_expiry_s == 0

    @property
    def next_expiry_s(self) -> float | None:
        """Seconds until `step` has to end a lease; None: there is none."""
        return self._handoffs.next_expiry_s

    @property
    def pause_s(self) -> float:
        """See `Pace.pause_s`: what comes until then can be in the next step."""
        return self._pace.pause_s(time.monotonic())

    @property
    def num_sequences(self) -> int:
        return self._scheduler.num_sequences

    @property
    def num_free_blocks(self) -> int:
        return self._blocks.num_free_blocks

    def export_into(self, allocate: Allocate) -> None:
        """Have chunks copied into memory from `allocate`, as far as it has room; before the first step."""
        self._copies.allocate_from(allocate)

    def add(self, request: GenerateRequest, remote_threshold: int | None = None) -> None:
        """Queue a request to decode here.

        Args:
            request: the prompt and how to continue it.
            remote_threshold: with at least this many uncached prompt tokens the prompt is left to a prefill engine:
                blocks are reserved and `Placed.remote` is true. None: this engine computes it.

        Raises:
            RequestTooLargeError, InvalidRequestError: see `check_request`; or the id is in use.
        """
        self.check(request)
        if request.num_prompt_logprobs is not None:
            remote_threshold = None  # what a prefill engine hands over is KV and one token
        self._enter(build_sequence(request, Role.LOCAL, remote_threshold))

    def prefill(self, request: GenerateRequest, first_block: int) -> None:
        """Queue a request whose prompt is computed for another engine.

        Args:
            request: as the other engine has it.
            first_block: leading blocks that the other engine already holds; chunks begin behind them. The block of the
                last token is never among them.

        Raises:
            RequestTooLargeError, InvalidRequestError: see `check_request`; or the id is in use, also by chunks of an
                earlier hand-off that were neither released nor aborted; or this engine hands nothing over.
        """
        if not self._hands_over:
            raise InvalidRequestError("this engine hands no prompts over: hands_over is false", "hands_over")
        self.check(request)
        check_first_block(first_block, request.num_given_tokens, self.limits.block_size)
        sequence = build_sequence(request, Role.EXPORT)
        self._enter(sequence)
        self._handoffs.exporter.add(sequence, first_block)

    def check(self, request: GenerateRequest) -> None:
        """Refuse what can never run here; see `check_request`. Safe from any thread."""
        check_request(request, self.limits, self._vocab_size)

    def import_chunk(self, chunk: ChunkReady, tensor: Tensor) -> list[EngineEvent]:
        """Put a chunk of a reserved sequence into its blocks.

        Args:
            chunk: which blocks; the last chunk carries the first token.
            tensor: of `KVCache.chunk_shape`; on a GPU it is read until `imported`.

        Returns:
            The first token's output once every block is here; nothing for a request that is no longer waiting.

        Raises:
            ValueError: the tensor does not fit the pool, or its blocks were not reserved; nothing was changed.
        """
        whole = self._handoffs.importer.fill(chunk, tensor)
        if whole is None:
            return []
        sequence, first_token = whole
        self._scheduler.activate(sequence)
        draws = sequence.receive(sequence.num_prompt_tokens, (first_token,))
        self._blocks.publish(sequence)
        self._guides.advance([sequence])
        return self._outputs.with_times(self._endings.tell_first(sequence, draws, self.abort))

    def imported(self) -> torch.cuda.Event | None:
        """When the device has read all chunks that came up to now; None: it has."""
        return self._copies.imported()

    def prefill_locally(self, request_id: str) -> bool:
        """Stop waiting for a prefill engine and compute what is missing here; False if it does not wait."""
        sequence = self._handoffs.importer.give_up(request_id)
        if sequence is not None:
            self._scheduler.compute_here(sequence)
        return sequence is not None

    def renew(self, request_id: str) -> bool:
        """The other engine of a hand-off lives: its lease begins anew. False: nothing is held for it here."""
        return self._handoffs.renew(request_id)

    def abort(self, request_id: str) -> None:
        """End a request in whatever state it is; unknown ids are no error, since it may just have finished."""
        self._scheduler.remove(request_id)
        self._handoffs.discard(request_id)
        self._guides.drop(request_id)
        self._speculator.drop(request_id)

    def run_canary(self) -> bool:
        """Run one token through the model, if nothing else does; see `Canary`."""
        return self._canary.run(self._stats.steps, is_busy=self._in_flight is not None)

    def take_handoff(self, request_id: str) -> TakenHandoff | None:
        """Give away what is computed for another engine, once; None if it is gone. Safe from any thread."""
        return self._handoffs.outbox.take(request_id)

    def when_released(self, call: Callable[[], object]) -> None:
        """Have this called, from any thread, when a chunk was released: there may be work again."""
        self._handoffs.outbox.when_released(call)

    def step(self) -> list[EngineEvent]:
        """Run one batch, if there is one: `begin_step`, then `finish_step`; what happened, in order."""
        return self.begin_step() + self.finish_step()

    def begin_step(self) -> list[EngineEvent]:
        """Choose the next batch; what others can act on while it is computed. Nothing comes before `finish_step`."""
        self._begun_s = time.monotonic()
        events = self._end_leases()
        self._settle()
        for lost in self._guides.collect(is_idle=not self._has_steps):  # whose tokens run again, and who cannot go on
            self.abort(lost.request_id)
            events.append(lost)
        if self._in_flight is None:
            self._speculator.propose(self._scheduler, self._guides)
        schedule = self._scheduler.schedule()
        for placed in schedule.placed:
            events.append(placed)
            self._stats.prefix_hit_tokens += placed.num_cached_tokens - placed.num_unread_tokens
            if placed.remote:
                self._handoffs.importer.add(self._scheduler.reserved[placed.request_id])
        self._scheduled = schedule.scheduled
        self._handoffs.exporter.announce(schedule.scheduled)
        if not events and self._in_flight is None and self._speculator.hurries(self._scheduled):
            return []
        return self._outputs.with_times(self._endings.tell()) + events

    def finish_step(self) -> list[EngineEvent]:
        """Run the batch that was chosen. A pipelined engine starts it, and concludes the one before meanwhile.

        Returns:
            What happened, in order; one `TokenOutput` per sequence that drew a token.
        """
        ending = self._launch(self._scheduled, self._begun_s) if self._scheduled else None
        if self._is_pipelined:
            ending, self._in_flight = self._in_flight, ending
        newest = self._in_flight or ending
        self._handoffs.exporter.export(None if newest is None else newest.done)
        if ending is not None:
            self._conclude(ending)
        events = self._endings.tell()
        self._end_exports()
        self._speculator.learn()
        return self._outputs.with_times(events)

    def stats(self) -> EngineStats:
        """A snapshot; its histograms are copies."""
        return self._outputs.snapshot(self._scheduler, self._blocks.num_held_blocks, self._handoffs.outbox.num_blocks)

    def cache_changes(self, read: Position | None) -> CacheEvents:
        """What changed in the prefix cache since somebody has read of it; None: all that is there."""
        return self._blocks.cache_log.since(read)

    def check_integrity(self) -> None:
        """Assert that no block, sequence or chunk is lost or counted twice."""
        self._scheduler.check_integrity()
        self._handoffs.check_integrity(self._scheduler.reserved)
        strangers = {r for r in [*self._handoffs, *self._guides] if r not in self._scheduler}
        assert not strangers, f"kept for requests that are gone: {strangers}"

    def _enter(self, sequence: Sequence) -> None:
        request_id = sequence.request_id
        if request_id in self._scheduler or request_id in self._handoffs.outbox:
            raise InvalidRequestError(f"request id {request_id!r} is already in use", "request_id")
        self._scheduler.add(sequence)
        self._guides.add(sequence)

    @property
    def _has_steps(self) -> bool:
        return self._in_flight is not None or self._scheduler.has_work or self._handoffs.exporter.has_work

    def _launch(self, scheduled: list[ScheduledSequence], begun_s: float) -> LaunchedStep:
        self._stats.steps += 1
        launched = self._runner.launch(scheduled, self._handoffs.exporter.watch)
        self._pace.begin(launched, begun_s)
        for item in scheduled:
            item.sequence.begin(item)
        if self._guides:
            self._guides.hold(scheduled)
        return launched

    def _settle(self) -> None:
        """Conclude the step in flight now if its first tokens are waited for, or if guesses are to go on behind it."""
        step = self._in_flight
        if step is not None and (is_awaited(step) or self._speculator.waits_for(step.items)):
            self._in_flight = None
            self._conclude(step)

    def _conclude(self, step: LaunchedStep) -> None:
        """Wait for a step: what it computed and drew counts, and is to be told."""
        collected, now_s = step.collect(), time.monotonic()
        for run, scores in step.collect_prompts():
            run.sequence.add_scores(run, scores)
        seconds, is_alone = self._pace.end(now_s)
        self._speculator.note_end(collected, step.states, seconds, is_late=is_alone and self._is_pipelined)
        self._endings.join(collected, now_s, self.abort, is_beside_prompts=step.num_prompt_tokens > 0)

    def _end_exports(self) -> None:
        """A sequence that is all out needs its blocks no longer."""
        for request_id in self._handoffs.exporter.take_done():
            self._outputs.note_last(self._scheduler[request_id])
            self._scheduler.remove(request_id)
            self._guides.drop(request_id)

    def _end_leases(self) -> list[EngineEvent]:
        """Give up on engines that have not been heard of: what is held for them is free, or put to use."""
        awaited, kept = self._handoffs.expired()
        for request_id in awaited:
            self.prefill_locally(request_id)
        for request_id in kept:
            self.abort(request_id)
        placed = [Placed(request_id, False, self._scheduler[request_id].num_computed_tokens) for request_id in awaited]
        return [*placed, *map(HandoffExpired, kept)]
