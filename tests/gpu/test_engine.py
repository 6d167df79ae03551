"""The engine with CUDA layers, graphs and pipelining gives the tokens of transformers' own model on the same GPU."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from deployments.engine.execution.costs import StepCosts
from deployments.engine.model.load import optimize_layers, prepare_model
from deployments.messages import SamplingParams
from tests.engine.driving import Transcript, greedy, prefill_all, run
from tests.engine.insides import runner_of
from tests.gpu.driving import NUM_TOKENS, TIE, build, check_greedy, few_blocks, generate, generate_preempted, prompt
from tests.gpu.models import CONFIGS, loaded, plain

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from deployments.engine.layers.cuda import can_drop_rows  # noqa: E402  # Triton is there only where a GPU is

every_family = pytest.mark.parametrize("family", sorted(CONFIGS))


@every_family
def test_the_layers_are_replaced(family: str) -> None:
    assert loaded(family).has_cuda_layers
    layers = loaded(family).model.model.layers
    assert all("forward" in vars(layer) for layer in layers), "projections or norms add to residuals"
    assert all("forward" in vars(layer.self_attn) for layer in layers), "attention rotates"


def test_attention_normalises_heads_where_it_rotates_them() -> None:
    layers = loaded("qwen3").model.model.layers
    assert all(layer.self_attn.kvrelay_rotary.norms is not None for layer in layers)


def test_attention_that_does_something_with_what_it_rotated_rotates_itself() -> None:
    layers = loaded("hunyuan").model.model.layers
    assert loaded("hunyuan").has_cuda_layers
    assert not any("forward" in vars(layer.self_attn) for layer in layers)
    engine = build("hunyuan")
    for name, tokens in generate(engine, (5, 700)).items():
        check_greedy("hunyuan", prompt(int(name[1:])), tokens)


def test_layers_that_do_more_than_add_to_their_residuals_stay_as_they_are() -> None:
    model = copy.deepcopy(plain("llama"))

    class Scaled(type(model.model.layers[0])):  # type: ignore[misc]  # whatever transformers calls it
        def forward(self, hidden_states: Tensor, **kwargs: object) -> Tensor:
            whole: Tensor = super().forward(hidden_states.clone(), **kwargs)
            return hidden_states + 0.5 * (whole - hidden_states)

    for layer in model.model.layers:
        layer.__class__ = Scaled
    assert optimize_layers(prepare_model(model, "random", torch.device("cuda"))).has_cuda_layers
    assert not any("forward" in vars(layer) for layer in model.model.layers)


@every_family
@pytest.mark.parametrize("budget", [4096, 300])
def test_prompts_of_all_lengths_together(family: str, budget: int) -> None:
    engine = build(family, max_num_batched_tokens=budget)
    for name, tokens in generate(engine).items():
        assert len(tokens) == NUM_TOKENS
        check_greedy(family, prompt(int(name[1:])), tokens)
    assert engine.num_free_blocks == 64


@every_family
def test_preemption_and_a_warm_cache(family: str) -> None:
    for found in generate_preempted(build(family, num_blocks=few_blocks(family))):
        for name, tokens in found.items():
            check_greedy(family, prompt(int(name[1:])), tokens)


# Recorded whole, recorded as a chunk behind others, and launched as a whole.
@pytest.mark.parametrize(("length", "budget"), [(500, 4096), (1500, 512), (3000, 4096)])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("family", ["llama", "gemma2"], ids=["one group of layers", "groups"])
def test_a_handed_over_prompt_continues(family: str, length: int, budget: int, parts: int) -> None:
    source = build(family, max_num_batched_tokens=budget, handoff_layer_parts=parts)
    target = build(family, max_num_batched_tokens=budget)
    for i in range(3):  # what a recorded step says of its layers is said anew by each replay
        transcript, given = Transcript(), prompt(length + i)
        request = greedy(f"r{i}", given, NUM_TOKENS)
        target.add(request, remote_threshold=100)
        transcript.note(target.step())
        for chunk, tensor in prefill_all(source, request):
            transcript.note(target.import_chunk(chunk, tensor))
        run(target, transcript)
        assert len(transcript.tokens[f"r{i}"]) == NUM_TOKENS
        check_greedy(family, given, transcript.tokens[f"r{i}"])


def test_a_stop_token_ends_a_sequence_although_the_next_step_is_under_way() -> None:
    engine = build("llama")
    engine.add(greedy("a", prompt(40), NUM_TOKENS))
    tokens = run(engine).tokens["a"]
    stop = tokens[5]
    first = tokens.index(stop)
    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, stop_token_ids=(stop,))
    engine.add(replace(greedy("b", prompt(40), NUM_TOKENS), sampling=sampling))
    assert run(engine).tokens["b"] == tokens[: first + 1]
    assert engine.num_free_blocks == 64


@every_family
def test_sampled_tokens_repeat_and_are_among_the_likeliest(family: str) -> None:
    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.8, top_k=20, seed=5)
    engine = build(family, enable_prefix_caching=False)
    answers = []
    for _ in range(2):
        engine.add(replace(greedy("s", prompt(40), NUM_TOKENS), sampling=sampling))
        engine.add(greedy("g", prompt(255), NUM_TOKENS))
        answers.append(run(engine).tokens)
    assert answers[0] == answers[1]
    check_greedy(family, prompt(255), answers[0]["g"])
    tokens = answers[0]["s"]
    with torch.inference_mode():
        ids = torch.tensor([[*prompt(40), *tokens]], device="cuda")
        logits = plain(family)(ids, use_cache=False).logits[0, 39:-1].float()
    least = logits.topk(20).values[:, -1]
    drawn = logits.gather(-1, torch.tensor(tokens, device="cuda").unsqueeze(-1)).squeeze(-1)
    assert (drawn >= least - TIE).all()
    assert len(set(tokens)) > NUM_TOKENS // 2


@pytest.mark.parametrize("length", [2, 15, 16, 17, 500, 1023, 1024, 1025])
def test_a_prompt_alone_takes_the_graph_of_its_length(length: int) -> None:
    engine = build("llama")
    engine.add(greedy("r", prompt(length), 4))
    check_greedy("llama", prompt(length), run(engine).tokens["r"])


@every_family
@pytest.mark.parametrize("is_recorded", [False, True], ids=["as a whole", "recorded"])
def test_prompts_beside_decodes(family: str, is_recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build(family, enable_prefix_caching=False)
    monkeypatch.setattr(StepCosts, "parts_ms", lambda *_: 0.0 if is_recorded else 1e9)
    if is_recorded:
        monkeypatch.delattr(type(runner_of(engine)), "_run_eagerly")
    transcript, lengths = Transcript(), (40, 256, 255, 2, 700, 16)
    for beginning in (lengths[:2], lengths[2:3], lengths[3:]):  # two beside nothing, one beside two, three beside three
        for length in beginning:
            engine.add(greedy(f"r{length}", prompt(length), NUM_TOKENS))
        for _ in range(3):
            transcript.note(engine.step())
    for name, tokens in run(engine, transcript).tokens.items():
        assert len(tokens) == NUM_TOKENS
        check_greedy(family, prompt(int(name[1:])), tokens)


@every_family
def test_chunks_behind_cached_tokens_beside_decodes(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build(family, max_num_batched_tokens=600)
    monkeypatch.setattr(StepCosts, "parts_ms", lambda *_: 0.0)
    lengths = 40, 700, 530, 1500  # prompts of 700 and 1,500 come in chunks already; all are cached the second time
    for is_warm in (False, True):
        transcript = Transcript()
        if is_warm:
            monkeypatch.delattr(type(runner_of(engine)), "_run_eagerly")
        for length in lengths:
            engine.add(greedy(f"r{length}", prompt(length), NUM_TOKENS))
            transcript.note(engine.step())
        for name, tokens in run(engine, transcript).tokens.items():
            assert len(tokens) == NUM_TOKENS
            check_greedy(family, prompt(int(name[1:])), tokens)


def test_the_canary_runs_while_nothing_else_does_and_changes_no_token() -> None:
    engine = build("llama")
    assert engine.run_canary() and engine.run_canary()
    engine.add(greedy("r", prompt(700), NUM_TOKENS))
    transcript = Transcript()
    transcript.note(engine.step())
    assert not engine.run_canary(), "a step was in flight"
    check_greedy("llama", prompt(700), run(engine, transcript).tokens["r"])
    assert not engine.run_canary(), "steps have run since the last one"
    assert engine.run_canary()
    assert engine.num_free_blocks == 64


@every_family
def test_the_last_layer_goes_on_with_rows_that_are_wanted(family: str) -> None:
    assert can_drop_rows(loaded(family).model)
