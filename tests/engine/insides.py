"""Looks into an engine where a test needs what nobody else asks it for: the one place that knows its parts by name."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deployments.engine.attention import sdpa
from deployments.engine.attention.sdpa import SdpaStep
from deployments.engine.config import SpeculationConfig
from deployments.engine.engine import Engine
from deployments.engine.execution.base import LaunchedStep, Runner
from deployments.engine.grammar.guides import Guides
from deployments.engine.kv.cache import KVShape
from deployments.engine.layers import cpu
from deployments.engine.loop import EngineLoop
from deployments.engine.scheduling.block_manager import BlockManager
from deployments.engine.scheduling.scheduler import Schedule, Scheduler
from deployments.engine.scheduling.sequence import Sequence
from deployments.engine.speculation.base import Drafter
from deployments.engine.speculation.speculator import Speculator
from deployments.messages import EngineEvent, Grammar

if TYPE_CHECKING:
    from deployments.engine.batch.arrays import StepArrays
    from deployments.engine.execution.base import PreparedStep
    from deployments.engine.execution.graphs import PromptGraph
    from deployments.engine.execution.heads import HeadRunner
    from deployments.engine.kv.layers import LayerWatch

CompileGrammar: TypeAlias = Callable[[Grammar, list[int]], Any]


def scheduler_of(engine: Engine) -> Scheduler:
    return engine._scheduler


def sequence_of(engine: Engine, request_id: str) -> Sequence:
    return engine._scheduler[request_id]


def blocks_of(owner: Engine | Scheduler) -> BlockManager:
    return owner._blocks


def runner_of(engine: Engine) -> Any:
    return engine._runner


def import_stream_of(engine: Engine) -> "torch.cuda.Stream | None":
    """On which it copies chunks into its pool."""
    return engine._copies.import_stream


def model_of(engine: Engine) -> PreTrainedModel:
    """The model that its runner runs."""
    model: PreTrainedModel = runner_of(engine)._model
    return model


def guides_of(engine: Engine) -> Guides:
    return engine._guides


def compile_grammars_by(engine: Engine, compile_grammar: Callable[[CompileGrammar, Grammar, list[int]], Any]) -> None:
    """Have its grammars compiled by something else, which is given what does it, and what that is given."""
    engine._guides._begin = partial(compile_grammar, engine._guides._begin)  # type: ignore[method-assign]


def replace_runner(engine: Engine, runner: Runner) -> None:
    """Have its steps run by something else."""
    engine._runner = runner


def head_runner_of(engine: Engine) -> Any:
    """What runs the head that guesses for it."""
    return drafter_of(engine)._runner


def guessing_graph(engine: Engine, num_seqs: int) -> Any:
    """Of a head on a GPU: the graph that guesses one more token of so many sequences."""
    from deployments.engine.execution.graphs import padded_batch

    runner = head_runner_of(engine)
    return runner._guessing[padded_batch(num_seqs, runner._max_seqs)][0]


def replace_head_runner(engine: Engine, runner: "HeadRunner") -> None:
    """Have the head that guesses for it run by something else."""
    drafter_of(engine)._runner = runner


def wrap_conclusions(
    engine: Engine, conclude: "Callable[[Callable[[LaunchedStep], None], LaunchedStep], None]"
) -> None:
    """Have steps concluded by something else, which is given what does it."""
    engine._conclude = partial(conclude, engine._conclude)  # type: ignore[method-assign]


def guard_steps(engine: Engine, may_step: Callable[[Engine], bool]) -> None:
    """Have whoever steps it ask before each step, in vain where it may not be."""
    begin, finish, is_begun = engine.begin_step, engine.finish_step, True

    def begin_step() -> list[EngineEvent]:
        nonlocal is_begun
        is_begun = may_step(engine)
        return begin() if is_begun else []

    engine.begin_step = begin_step  # type: ignore[method-assign]
    engine.finish_step = lambda: finish() if is_begun else []  # type: ignore[method-assign]


def hold_sequences_at(engine: Engine, num_generated: int) -> None:
    """Leave each sequence out of steps once so many of its tokens are generated; others go on."""
    scheduler, schedule = engine._scheduler, engine._scheduler.schedule

    def schedule_others() -> Schedule:
        for sequence in scheduler.running:
            if sequence.num_tokens - sequence.num_prompt_tokens >= num_generated:
                sequence.hold()
        return schedule()

    scheduler.schedule = schedule_others  # type: ignore[method-assign]


def preempt(engine: Engine, sequence: Sequence) -> None:
    """Take a sequence's blocks away, as for want of free ones."""
    engine._scheduler._preempt(sequence)


def is_between_engines(engine: Engine) -> bool:
    """Whether it holds or awaits anything of a hand-off."""
    return bool(engine._handoffs.outbox.num_blocks or len(engine._handoffs.outbox) or len(engine._handoffs.inbox))


def is_in_flight(engine: Engine) -> bool:
    """Whether a step was started and not concluded."""
    return engine._in_flight is not None


def forget_step_in_flight(engine: Engine) -> None:
    """After a step that failed."""
    engine._in_flight = None


def pretend_idle(engine: Engine, seconds: float) -> None:
    """As if its last step had ended so much earlier."""
    engine._pace._ended_s -= seconds


def num_commands(loop: EngineLoop) -> int:
    """That wait for the loop's thread."""
    return loop._inbox.qsize()


def drafter_of(engine: Engine) -> Any:
    return engine._speculator._drafter


def knows_plain_steps(speculator: Speculator, num_sequences: int) -> bool:
    """Whether it has learned what a step of so many sequences takes without drafts."""
    return speculator._curve.is_known(num_sequences)


def speculate_by(engine: Engine, drafter: Drafter | None, config: SpeculationConfig | None = None) -> None:
    """Have an engine whose settings let it guess try what this one guesses, all of it that it has room for.

    Args:
        engine: whose settings say so.
        drafter: that guesses; None: nothing does.
        config: other settings.
    """
    assert engine.limits.max_drafts
    if config is None:
        config = SpeculationConfig(method="ngram", is_adaptive=False, max_drafts=engine.limits.max_drafts)
    engine._speculator = Speculator(drafter, config, engine._stats, engine._speculator.drafted_sizes)


@contextmanager
def scores_at_once() -> Iterator[list[int]]:
    """How many scores each part of attention computes at once, meanwhile."""
    sizes: list[int] = []
    whole = sdpa._attend

    def attend(queries: Tensor, keys: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        sizes.append(queries.shape[:3].numel() * keys.shape[2])
        return whole(queries, keys, *args, **kwargs)

    with patch.object(sdpa, "_attend", attend):
        yield sizes


def probe_step(shape: KVShape) -> SdpaStep:
    """The step by which decoder layers are tried."""
    return cpu._probe_step(shape)


def tell_of_replays(monkeypatch: pytest.MonkeyPatch, tell: "Callable[[StepArrays, list[PromptGraph]], None]") -> None:
    """Have every step of recorded parts told to a test."""
    from deployments.engine.execution.cuda import CudaRunner  # needs Triton

    replay = CudaRunner._replay_parts

    def tell_and_replay(
        self: CudaRunner, step: "PreparedStep", graphs: "list[PromptGraph]", watch: "LayerWatch | None"
    ) -> Tensor:
        tell(step.arrays, graphs)
        return replay(self, step, graphs, watch)

    monkeypatch.setattr(CudaRunner, "_replay_parts", tell_and_replay)


def tell_of_verifications(
    monkeypatch: pytest.MonkeyPatch, tell: "Callable[[StepArrays, tuple[int, int]], None]"
) -> None:
    """Have every step with drafts that a graph holds told to a test, with the graph's room."""
    from deployments.engine.execution.verification import Verification  # needs Triton

    replay = Verification.replay

    def tell_and_replay(self: Verification, arrays: "StepArrays", size: tuple[int, int], turn: int) -> Tensor:
        tell(arrays, size)
        return replay(self, arrays, size, turn)

    monkeypatch.setattr(Verification, "replay", tell_and_replay)


def forget_verification(engine: Engine) -> None:
    """As if no graph for steps with drafts had been recorded."""
    engine._runner._verification = None  # type: ignore[attr-defined]
