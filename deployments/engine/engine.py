"""The engine: requests in, events out, one step at a time. One class for every role, and no thread of its own.

A request's life here:
1. `add` (compute and decode, or reserve for a remote prefill) or `prefill` (compute for another engine) queues it.
2. The scheduler gives it blocks; what the prefix cache holds is not computed again. A decode engine says `Placed`.
3. Its prompt runs in chunks. A prefill engine copies each chunk's KV out and says `ChunkReady`.
4. A decode engine takes chunks with `import_chunk`; the last one brings the first token and starts the decoding.
5. Each further step yields one `TokenOutput` per sequence, until a stop token, the length, or `abort`.
6. Whatever ended it, its blocks are free; those of a shared prefix stay findable.

Not thread-safe, but for `take_chunk`; `EngineLoop` runs it.
"""

import logging
import time

import torch
from torch import Tensor

from deployments.engine.block_manager import BlockManager
from deployments.engine.config import EngineConfig, EngineLimits
from deployments.engine.export import ExportBuffer
from deployments.engine.kv_cache import KVCache
from deployments.engine.kv_copies import Allocate, KVCopies
from deployments.engine.model import LoadedModel
from deployments.engine.model_runner import LaunchedStep, build_runner
from deployments.engine.scheduler import ScheduledSequence, Scheduler
from deployments.engine.sequence import PENDING, Role, Sequence, Status
from deployments.engine.sizing import choose_limits
from deployments.engine.stats import EngineStats
from deployments.errors import InvalidRequestError, RequestTooLargeError
from deployments.messages import ChunkReady, EngineEvent, FinishReason, GenerateRequest, TokenOutput

logger = logging.getLogger(__name__)

# Chunks of this many steps may wait for their receivers while the next ones are computed. Steps of a GPU are long.
_EXPORT_STEPS = {"cpu": 4, "cuda": 2}
# Of one chunk: small enough that chunks of one step overlap on their way, large enough that each fills a link.
_MAX_CHUNK_BYTES = 256 << 20


class Engine:
    """Continuous batching over a paged KV cache.

    Args:
        loaded: the model.
        config: what the user asked for.
        is_pipelined: whether a step is started before the one before has been concluded, so that a GPU never waits for
            this process; else, and None on a CPU, one step at a time.
    """

    def __init__(self, loaded: LoadedModel, config: EngineConfig, is_pipelined: bool | None = None) -> None:
        if is_pipelined is None:
            is_pipelined = loaded.device.type == "cuda"
        self.limits: EngineLimits = choose_limits(loaded, config)
        self.kv_shape = loaded.kv_shape
        cache = KVCache(loaded.kv_shape, self.limits.num_blocks, self.limits.block_size, loaded.device)
        self._runner = build_runner(loaded, cache, self.limits)
        self._copies = KVCopies(cache)
        self._blocks = BlockManager(
            self.limits.num_blocks, self.limits.block_size, enable_prefix_caching=config.enable_prefix_caching
        )
        self._scheduler = Scheduler(self._blocks, self.limits)
        bytes_per_block = self.limits.block_size * loaded.kv_shape.bytes_per_token
        step_blocks = max(1, self.limits.max_num_batched_tokens // self.limits.block_size)
        self._max_chunk_blocks = max(1, min(step_blocks, _MAX_CHUNK_BYTES // bytes_per_block))
        self._exports = ExportBuffer(max_blocks=_EXPORT_STEPS[loaded.device.type] * step_blocks)
        self._bytes_per_block = bytes_per_block
        self._is_pipelined = is_pipelined
        self._in_flight: LaunchedStep | None = None
        self._exporting: dict[str, Sequence] = {}
        self._first_tokens: dict[str, int] = {}
        self._vocab_size = loaded.vocab_size
        self._stats = EngineStats(num_blocks=self.limits.num_blocks, max_num_seqs=self.limits.max_num_seqs)
        self._step_begun_s = self._step_ended_s = 0.0

    @property
    def has_work(self) -> bool:
        """Whether `step` could make progress now."""
        return self._in_flight is not None or self._scheduler.has_work or self._can_export()

    @property
    def num_sequences(self) -> int:
        return self._scheduler.num_sequences

    @property
    def num_free_blocks(self) -> int:
        return self._blocks.num_free_blocks

    @property
    def max_export_bytes(self) -> int:
        """Of all chunks at once that were copied out and not yet released."""
        return self._exports.max_blocks * self._bytes_per_block

    @property
    def max_chunk_bytes(self) -> int:
        """Of one chunk."""
        return self._max_chunk_blocks * self._bytes_per_block

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
            RequestTooLargeError, InvalidRequestError: see `check`; or the id is in use.
        """
        self.check(request)
        self._enter(Sequence(request, Role.LOCAL, time.monotonic(), remote_threshold=remote_threshold))

    def prefill(self, request: GenerateRequest, first_block: int) -> None:
        """Queue a request whose prompt is computed for another engine.

        Args:
            request: as the other engine has it.
            first_block: leading blocks that the other engine already holds; chunks begin behind them. The block of the
                last token is never among them.

        Raises:
            RequestTooLargeError, InvalidRequestError: see `check`; or the id is in use, also by chunks of an earlier
                hand-off that were neither released nor aborted.
        """
        self.check(request)
        last_block = (len(request.prompt_token_ids) - 1) // self.limits.block_size
        if not 0 <= first_block <= last_block:
            raise InvalidRequestError(f"first_block is {first_block}, must be from 0 to {last_block}", "first_block")
        sequence = Sequence(request, Role.EXPORT, time.monotonic(), num_exported_blocks=first_block)
        self._enter(sequence)
        self._exporting[request.request_id] = sequence

    def check(self, request: GenerateRequest) -> None:
        """Refuse what can never run here. Safe from any thread.

        Raises:
            RequestTooLargeError: prompt and output together exceed the model or the pool; gives the numbers.
            InvalidRequestError: an empty prompt, no token to generate, or a token id outside the vocabulary.
        """
        prompt, max_tokens = request.prompt_token_ids, request.sampling.max_tokens
        if not prompt:
            raise InvalidRequestError("the prompt is empty; it needs at least 1 token", "prompt")
        if max_tokens < 1:
            raise InvalidRequestError(f"max_tokens is {max_tokens}, must be at least 1", "max_tokens")
        if min(prompt) < 0 or max(prompt) >= self._vocab_size:
            bad = next(t for t in prompt if not 0 <= t < self._vocab_size)
            raise InvalidRequestError(
                f"token id {bad} is not in the vocabulary (0 to {self._vocab_size - 1})", "prompt"
            )
        total, limits = len(prompt) + max_tokens, self.limits
        if total > limits.max_model_len:
            raise RequestTooLargeError(
                f"{len(prompt)} prompt tokens + {max_tokens} to generate = {total}, "
                f"the model takes {limits.max_model_len}"
            )
        if self._blocks.blocks_for(total) > limits.num_blocks:
            raise RequestTooLargeError(
                f"{len(prompt)} prompt tokens + {max_tokens} to generate need {self._blocks.blocks_for(total)} KV "
                f"blocks, this engine has {limits.num_blocks} of {limits.block_size} tokens"
            )

    def import_chunk(self, chunk: ChunkReady, tensor: Tensor) -> list[EngineEvent]:
        """Put a chunk of a reserved sequence into its blocks.

        Args:
            chunk: which blocks; the last chunk carries the first token.
            tensor: (num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim); on a GPU it is read until `fence`.

        Returns:
            The first token's output once every block is here; nothing for a request that is no longer waiting.

        Raises:
            ValueError: the tensor does not fit the pool, or its blocks are not all awaited; nothing was changed.
        """
        sequence = self._scheduler.reserved.get(chunk.request_id)
        if sequence is None:
            return []
        arrived = range(chunk.start_block, chunk.start_block + chunk.num_blocks)
        if not sequence.missing_blocks.issuperset(arrived):
            raise ValueError(f"{chunk.request_id}: blocks {arrived} are not all awaited ({sequence.missing_blocks})")
        self._copies.import_([sequence.block_table[i] for i in arrived], tensor)
        sequence.missing_blocks.difference_update(arrived)
        if chunk.first_token is not None:
            self._first_tokens[chunk.request_id] = chunk.first_token
        if sequence.missing_blocks or chunk.request_id not in self._first_tokens:
            return []
        sequence.num_computed_tokens = sequence.num_prompt_tokens
        self._scheduler.activate(sequence)
        self._blocks.publish(sequence)
        first_token = self._first_tokens.pop(chunk.request_id)
        sequence.token_ids.append(first_token)
        return [self._told(sequence, sequence.num_prompt_tokens, first_token)]

    def fence(self) -> torch.cuda.Event | None:
        """When the device has done all that it was asked for up to now; None: it has."""
        return self._copies.fence()

    def prefill_locally(self, request_id: str) -> bool:
        """Stop waiting for a prefill engine and compute what is missing here; False if it does not wait."""
        sequence = self._scheduler.reserved.get(request_id)
        if sequence is None:
            return False
        num_blocks = min(sequence.missing_blocks, default=len(sequence.block_table))
        usable = min(num_blocks, (sequence.num_prompt_tokens - 1) // self.limits.block_size)
        sequence.num_computed_tokens = usable * self.limits.block_size
        self._first_tokens.pop(request_id, None)
        self._scheduler.activate(sequence)
        return True

    def abort(self, request_id: str) -> None:
        """End a request in whatever state it is; unknown ids are no error, since it may just have finished."""
        self._scheduler.remove(request_id)
        self._exporting.pop(request_id, None)
        self._first_tokens.pop(request_id, None)
        self._exports.release(request_id)

    def take_chunk(self, request_id: str, index: int) -> Tensor | None:
        """Wait until a chunk that was announced is complete, and hand its KV out; None if it is gone.

        Safe from any thread.
        """
        return self._exports.take(request_id, index)

    def release_chunk(self, request_id: str, index: int) -> None:
        """The receiver has the chunk: its memory may be used for others. Safe from any thread."""
        self._exports.release(request_id, index)

    def step(self) -> list[EngineEvent]:
        """Run one batch, if there is one. A pipelined engine starts it, and concludes the one before meanwhile.

        Returns:
            What happened, in order; one `TokenOutput` per sequence that drew a token.
        """
        begun_s = time.monotonic()
        schedule = self._scheduler.schedule()
        events: list[EngineEvent] = list(schedule.placed)
        for placed in schedule.placed:
            self._stats.prefix_hit_tokens += placed.num_cached_tokens
        launched = None
        if schedule.scheduled:
            self._stats.steps += 1
            launched = self._runner.launch(schedule.scheduled)
            for item in schedule.scheduled:
                self._account(item)
        if self._is_pipelined:
            launched, self._in_flight = self._in_flight, launched
            begun_s, self._step_begun_s = self._step_begun_s, begun_s
        if launched is not None:
            for item, token in launched.collect():
                events += self._conclude(item, token)
        events += self._export_chunks()
        if launched is not None:
            self._time(launched.items, begun_s)
        return events

    def stats(self) -> EngineStats:
        """A snapshot; its histograms are copies."""
        scheduler, stats = self._scheduler, self._stats
        stats.num_queued_prompt_tokens = scheduler.num_queued_prompt_tokens
        stats.num_remote_prompt_tokens = scheduler.num_remote_prompt_tokens
        stats.num_waiting = len(scheduler.waiting)
        stats.num_reserved = len(scheduler.reserved)
        stats.num_running = len(scheduler.running)
        stats.num_used_blocks = self._blocks.num_held_blocks
        stats.num_exported_blocks = self._exports.num_blocks
        stats.preemptions = scheduler.num_preemptions
        stats.finished = scheduler.num_finished
        return stats.copy()

    def check_integrity(self) -> None:
        """Assert that no block, sequence or chunk is lost or counted twice."""
        self._scheduler.check_integrity()
        strangers = {r for r in [*self._exporting, *self._first_tokens] if r not in self._scheduler}
        assert not strangers, f"kept for requests that are gone: {strangers}"

    def _enter(self, sequence: Sequence) -> None:
        request_id = sequence.request_id
        if request_id in self._scheduler or self._exports.has(request_id):
            raise InvalidRequestError(f"request id {request_id!r} is already in use", "request_id")
        self._scheduler.add(sequence)

    def _account(self, item: ScheduledSequence) -> None:
        """A run was started: its tokens count as computed, and the one it draws as there."""
        sequence = item.sequence
        num_prompt = min(item.start + item.num_tokens, sequence.num_prompt_tokens)
        self._stats.prompt_tokens += max(0, num_prompt - item.start)
        sequence.num_computed_tokens += item.num_tokens
        if item.samples and sequence.role is not Role.EXPORT:
            sequence.token_ids.append(PENDING)

    def _time(self, items: list[ScheduledSequence], begun_s: float) -> None:
        """A step has ended; it ran since it was begun, or since the one before had ended. Prompts are last in it."""
        now_s = time.monotonic()
        if items[-1].start < items[-1].sequence.num_prompt_tokens:
            self._stats.prefill_s += now_s - max(begun_s, self._step_ended_s)
        self._step_ended_s = now_s

    def _conclude(self, item: ScheduledSequence, token: int | None) -> list[EngineEvent]:
        """A run has ended and drawn this token."""
        sequence = item.sequence
        if sequence.status is Status.FINISHED:
            return []  # aborted, or ended by the token before, while this one was in flight
        if token is not None and sequence.role is not Role.EXPORT:
            sequence.token_ids[item.start + item.num_tokens] = token
        if sequence.status is Status.RUNNING:  # and not preempted since
            self._blocks.publish(sequence)
        if token is None:
            return []
        self._stats.generated_tokens += 1
        if sequence.role is not Role.EXPORT:
            return [self._told(sequence, item.start + item.num_tokens, token)]
        if sequence.request_id in self._first_tokens:
            return []  # computed again after a preemption: the token is out already
        self._first_tokens[sequence.request_id] = token
        output = self._output(sequence, 0, token)
        if output.finish_reason is not None:
            self._finish(sequence)  # nobody will decode it, so nobody wants its KV
        return [output]

    def _told(self, sequence: Sequence, position: int, token: int) -> TokenOutput:
        """Tell of a token that is in its place."""
        output = self._output(sequence, position - sequence.num_prompt_tokens, token)
        if output.finish_reason is not None:
            self._finish(sequence)
        return output

    def _output(self, sequence: Sequence, index: int, token: int) -> TokenOutput:
        now, sampling = time.monotonic(), sequence.request.sampling
        if sequence.last_token_s is None:
            self._stats.ttft_s.observe(now - sequence.arrival_s)
        else:
            self._stats.itl_s.observe(now - sequence.last_token_s)
        sequence.last_token_s = now
        reason = None
        if token in sampling.stop_token_ids:
            reason = FinishReason.STOP
        elif index + 1 == sampling.max_tokens:
            reason = FinishReason.LENGTH
        return TokenOutput(sequence.request_id, index, (token,), reason, sequence.num_cached_tokens)

    def _finish(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence.request_id)
        self._exporting.pop(sequence.request_id, None)
        self._first_tokens.pop(sequence.request_id, None)

    def _num_exportable(self, sequence: Sequence) -> int:
        """Blocks that are computed and not yet copied out; the last ones count when the first token is known."""
        if sequence.status is not Status.RUNNING:
            return 0
        done = self._is_computed(sequence)
        num_computed = sequence.num_computed_tokens // self.limits.block_size
        num_blocks = len(sequence.block_table) if done else min(num_computed, len(sequence.block_table) - 1)
        return num_blocks - sequence.num_exported_blocks

    def _is_computed(self, sequence: Sequence) -> bool:
        """Whether an exporting sequence has all its KV and the token that its last chunk brings."""
        return sequence.num_uncomputed_tokens == 0 and sequence.request_id in self._first_tokens

    def _can_export(self) -> bool:
        room = self._exports.num_free_blocks
        sizes = (min(self._num_exportable(s), self._max_chunk_blocks) for s in self._exporting.values())
        return any(0 < size <= room for size in sizes)

    def _export_chunks(self) -> list[EngineEvent]:
        """Copy out what is computed, as far as the buffer has room; a sequence that is all out is finished."""
        events: list[EngineEvent] = []
        for sequence in list(self._exporting.values()):
            while size := min(self._num_exportable(sequence), self._max_chunk_blocks):
                if size < 0 or size > self._exports.num_free_blocks:
                    break
                events.append(self._export(sequence, size))
                if sequence.status is Status.FINISHED:
                    break
        return events

    def _computed(self, sequence: Sequence) -> torch.cuda.Event | None:
        """When all of a sequence's KV that counts as computed is there; None: now."""
        step = self._in_flight
        return step.done if step is not None and any(item.sequence is sequence for item in step.items) else None

    def _export(self, sequence: Sequence, size: int) -> ChunkReady:
        start, index = sequence.num_exported_blocks, sequence.num_exported_chunks
        tensor, ready = self._copies.export(sequence.block_table[start : start + size], self._computed(sequence))
        self._exports.put(sequence.request_id, index, size, tensor, ready)
        sequence.num_exported_blocks += size
        sequence.num_exported_chunks += 1
        first_token = None
        if self._is_computed(sequence) and sequence.num_exported_blocks == len(sequence.block_table):
            first_token = self._first_tokens[sequence.request_id]
            self._finish(sequence)
        return ChunkReady(sequence.request_id, index, start, size, first_token)
