"""A head guesses on a GPU, by graphs: as it would by itself, without waiting, and in the memory that was counted."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from deployments.engine.config import EngineConfig  # noqa: E402
from deployments.engine.engine import Engine  # noqa: E402
from deployments.engine.execution.cuda_heads import CudaHead  # noqa: E402
from deployments.engine.execution.heads import KnownTokens, NewestTokens  # noqa: E402
from deployments.engine.execution.portable_heads import PortableHead  # noqa: E402
from deployments.engine.model.eagle3 import Eagle3Form, Eagle3Head  # noqa: E402
from deployments.engine.model.load import LoadedModel, optimize_layers, prepare_model  # noqa: E402
from deployments.engine.sampling.guessing import GuessDraws  # noqa: E402
from deployments.engine.sampling.sampler import SamplingPreparation  # noqa: E402
from deployments.engine.speculation.base import Wish  # noqa: E402
from deployments.messages import GenerateRequest, SamplingParams  # noqa: E402
from tests.engine.drafters import lies, mixture, truth  # noqa: E402
from tests.engine.driving import run  # noqa: E402
from tests.engine.eagle3_heads import Dense  # noqa: E402
from tests.engine.insides import drafter_of, head_runner_of, tell_of_verifications  # noqa: E402
from tests.gpu.driving import LENGTHS, NUM_TOKENS, TIE, check_greedy, generate, prompt  # noqa: E402
from tests.gpu.models import CONFIGS, SHAPE, VOCAB_SIZE, exact, plain  # noqa: E402

SPECULATION = {"method": "eagle3", "model": "beside", "is_adaptive": False, "max_drafts": 4}
DRAFT_VOCAB_SIZE = 1000


def random_head(model: PreTrainedModel, head_dim: int = 64) -> Eagle3Head:
    """A head that knows every third token, with random weights, rounded to bfloat16; plain modules."""
    config = LlamaConfig(**(SHAPE | {"num_hidden_layers": 1, "num_key_value_heads": 2}), head_dim=head_dim)
    head = Eagle3Head(Eagle3Form(config, (0, 1, 2), config.hidden_size, DRAFT_VOCAB_SIZE, False, False))
    generator = torch.Generator().manual_seed(5)
    for weight in head.parameters():
        drawn = torch.randn(weight.shape, generator=generator)
        weight.data = 0.06 * drawn if weight.dim() > 1 else 1 + 0.2 * drawn
    head.to("cuda", torch.bfloat16).to(model.dtype).complete(
        model.get_input_embeddings(), 3 * torch.arange(DRAFT_VOCAB_SIZE)
    )
    return head


@cache
def with_head(family: str, head_dim: int = 64) -> LoadedModel:
    model = copy.deepcopy(plain(family))
    prepared = prepare_model(model, "random", torch.device("cuda"))
    return optimize_layers(replace(prepared, head=random_head(model, head_dim)))


def build(loaded: LoadedModel, **overrides: object) -> Engine:
    settings = {"num_blocks": 64, "max_num_seqs": 20, "max_num_batched_tokens": 4096, "speculation": SPECULATION}
    return Engine(loaded, EngineConfig.model_validate(settings | overrides))


Guesses = list[tuple[tuple[int, ...], int, tuple[int, ...]]]


def watch(engine: Engine, answers: dict[str, list[int]], when: Callable[[int], bool]) -> Guesses:
    """Have an engine try what it is told that the answer is, or a lie; what its head guessed, behind which tokens.

    Returns:
        Of each guess the tokens of its sequence, how many of these are out of the head's view, and the guesses.
    """
    drafter, seen = drafter_of(engine), []
    draft = drafter.draft

    def note(wishes: list[Wish]) -> list[tuple[int, ...]]:
        told = []
        for wish, guessed in zip(wishes, draft(wishes), strict=True):
            sequence = wish.sequence
            progress = drafter._of(wish)
            first = progress.begin + drafter._unseen(sequence, progress)
            seen.append((tuple(sequence.token_ids), first, guessed))
            place = sequence.num_tokens - len(sequence.request.prompt_token_ids)
            rest = answers.get(sequence.request_id, [])[place : place + len(guessed)]
            told.append(tuple(token ^ when(number) for number, token in enumerate(rest, place)))
        return told

    drafter.draft = note
    return seen


@torch.inference_mode()
def behind_the_likeliest(family: str, known: tuple[int, ...], first: int, guessed: tuple[int, ...]) -> Tensor:
    """How far each guess is behind the likeliest one of a head that sees a sequence from its first tokens in view on.

    In bfloat16 or in float32, where it is nearer.
    """
    parts = [_behind(model(family), alone(model, family), known, first, guessed) for model in (plain, exact)]
    return torch.stack(parts).amin(0)


@cache
def alone(model: Callable[[str], PreTrainedModel], family: str) -> Eagle3Head:
    return random_head(model(family))


@torch.inference_mode()
def _behind(
    model: PreTrainedModel, head: Eagle3Head, known: tuple[int, ...], first: int, guessed: tuple[int, ...]
) -> Tensor:
    ids = torch.tensor([known[:-1]], device="cuda")
    hidden = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    states = head.fuse(torch.cat([hidden[layer][0, first:] for layer in head.layers], dim=1))
    told, found = [*known[first + 1 :]], []
    for token in guessed:
        places = torch.arange(len(told), device="cuda")
        out = head(states, torch.tensor(told, device="cuda"), places, Dense())
        logits = head.logits(out[-1:])[0].float()
        found.append(logits.amax() - logits[token])
        told.append(token)
        states = torch.cat((states, out[-1:]))
    return torch.stack(found)


def check_guesses(family: str, seen: Guesses, num_checked: int = 12, tie: float = 2 * TIE) -> None:
    """Guesses are the likeliest of the head by itself, or tied with it."""
    for known, first, guessed in seen[:: max(1, len(seen) // num_checked)]:
        assert 1 <= len(guessed) <= 4 and (first == 0 or family == "mistral"), "all is in view, but behind windows"
        behind = behind_the_likeliest(family, known, first, guessed)
        assert behind.max() < tie, f"behind {len(known)} tokens, seen from {first} on: {behind.tolist()}"


@pytest.mark.parametrize(
    ("family", "when"), [*((family, mixture) for family in sorted(CONFIGS)), ("llama", truth), ("llama", lies)]
)
def test_guesses_are_those_of_the_head_and_answers_the_likeliest(family: str, when: Callable[[int], bool]) -> None:
    answers = generate(build(replace(with_head(family), head=None), speculation={"method": "off"}))
    engine = build(with_head(family))
    assert type(head_runner_of(engine)) is CudaHead
    seen = watch(engine, answers, when)
    for name, tokens in generate(engine).items():
        assert len(tokens) == NUM_TOKENS
        check_greedy(family, prompt(int(name[1:])), tokens)
    assert len(seen) >= 4 * len(LENGTHS)
    check_guesses(family, seen)
    stats = engine.stats()
    if when is truth:
        assert stats.accepted_tokens.total > 0.5 * stats.drafted_tokens.total


def test_guesses_are_as_good_behind_prompts_in_chunks_and_lost_blocks() -> None:
    engine = build(with_head("llama"), num_blocks=9, max_num_batched_tokens=300, enable_prefix_caching=False)
    seen = watch(engine, {}, truth)
    lengths = (200, 255, 256, 500, 511, 700)
    for name, tokens in generate(engine, lengths).items():
        check_greedy("llama", prompt(int(name[1:])), tokens)
    assert engine.stats().preemptions > 0 and seen
    check_guesses("llama", seen)


def test_guesses_by_a_head_without_kernels_are_the_same() -> None:
    """Its own KV has heads that no kernel knows."""
    engine = build(with_head("llama", head_dim=20))
    assert type(head_runner_of(engine)) is PortableHead
    seen = watch(engine, {}, truth)
    for name, tokens in generate(engine, LENGTHS[:5]).items():
        check_greedy("llama", prompt(int(name[1:])), tokens)
    assert seen and all(1 <= len(guessed) <= 4 and not any(token % 3 for token in guessed) for _, _, guessed in seen)


def test_a_model_in_float32_has_a_head_that_guesses_as_well() -> None:
    model = copy.deepcopy(exact("llama"))
    loaded = prepare_model(model, "random", torch.device("cuda"))
    engine = build(replace(loaded, head=random_head(model)))
    assert type(head_runner_of(engine)) is PortableHead
    seen = watch(engine, {}, truth)
    generate(engine, LENGTHS[:5])
    assert seen
    check_guesses("llama", seen, tie=1e-3)


def test_drawn_answers_come_to_their_end_and_are_mostly_those_without_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(engine: Engine) -> list[list[int]]:
        for number, length in enumerate(LENGTHS):
            sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.8, top_p=0.95, seed=number)
            engine.add(GenerateRequest(f"r{number}", prompt(length), sampling))
        tokens = run(engine).tokens
        return [tokens[f"r{number}"] for number in range(len(LENGTHS))]

    verified: list[int] = []
    tell_of_verifications(monkeypatch, lambda arrays, size: verified.append(arrays.num_tokens))
    answers = draw(build(replace(with_head("llama"), head=None), speculation={"method": "off"}))
    found = draw(build(with_head("llama")))
    same = sum(a == b for a, b in zip(found, answers, strict=True))
    assert verified and same >= len(answers) // 2, f"{same} of {len(answers)} answers are the same"


def newest(num_seqs: int, length: int) -> NewestTokens:
    ids = np.arange(num_seqs)
    return NewestTokens(ids, ids, ids + 7, 0 * ids, np.ones((num_seqs, 2), np.int64), np.full(num_seqs, length))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_host_waits_once_for_all_guesses_and_never_for_what_is_learned(temperature: float) -> None:
    runner = head_runner_of(build(with_head("llama")))
    states = torch.zeros(20, SHAPE["hidden_size"], dtype=torch.bfloat16, device="cuda")
    params = [SamplingParams(max_tokens=9, temperature=temperature)] * 5
    draws = GuessDraws(SamplingPreparation(), params, np.arange(5) + 8, [None] * 5)
    tokens = np.arange(20)
    runner.guess(states, newest(5, 4), draws)  # whatever is compiled or allocated once
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            waits.clear()  # that this is a prototype
            runner.learn(states, KnownTokens(tokens, tokens, tokens, tokens))
            assert not waits, waits[0].message
            runner.guess(states, newest(5, 4), draws)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 1, [str(wait.message) for wait in waits]


@pytest.mark.usefixtures("small_card")
@pytest.mark.parametrize("budget", [2048, 16384])
def test_an_engine_that_takes_what_is_left_has_room_for_its_head(budget: int) -> None:
    config = {"max_num_seqs": 100, "max_num_batched_tokens": budget, "speculation": SPECULATION}
    engine = Engine(with_head("llama"), EngineConfig.model_validate(config))
    free, total = torch.cuda.mem_get_info()
    assert free < 0.15 * total, "the pool takes what the steps leave"
    for lengths in ([4000] * 100, [3] * 100, [4000, *[40] * 99]):
        for number, length in enumerate(lengths):
            sampling = SamplingParams(max_tokens=64, temperature=1.0, top_k=50, top_p=0.9, seed=number)
            given = np.random.default_rng(number).integers(0, VOCAB_SIZE, length)
            engine.add(GenerateRequest(f"r{number}", tuple(given.tolist()), sampling))
        assert all(len(tokens) == 64 for tokens in run(engine).tokens.values())
    assert engine.stats().drafted_tokens.total
