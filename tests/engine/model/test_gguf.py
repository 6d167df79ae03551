"""GGUF files of all kinds become the models that they were written from, or are refused by the name of the fault."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from deployments.engine.config import EngineConfig
from deployments.engine.model import gguf as conversion
from deployments.engine.model.load import load_model
from deployments.engine.model.resolve import resolve_model
from deployments.errors import UnsupportedModelError
from tests.engine.driving import build_engine, generate, greedy
from tests.engine.families import continue_greedily, random_prompt, small_model
from tests.engine.gguf_files import BF16, EOS, EOT, F16, F32, IM_END, Q8_0, rounded, write_gguf

PROMPT = random_prompt(60, seed=3)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVRELAY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "files").mkdir()
    return tmp_path / "files"


def build(name: str = "LlamaConfig", **changes: Any) -> PreTrainedModel:
    return small_model(name, **changes)


def assert_same(file: Path, source: PreTrainedModel) -> None:
    """Logits of the converted model are those of its source, and so are tokens from the engine."""
    attention = source.config._attn_implementation
    folder = resolve_model(str(file))
    converted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        torch.testing.assert_close(converted(ids).logits, source(ids).logits, rtol=1e-4, atol=1e-4)
    (tokens,) = generate(
        build_engine(load_model(EngineConfig(model=str(file), device="cpu"))), [greedy("r", PROMPT, 6)]
    )
    assert tokens == continue_greedily(source, PROMPT, 6)


@pytest.mark.parametrize("tied", [False, True], ids=["output.weight", "tied"])
@pytest.mark.parametrize("kind", [F32, F16, BF16, Q8_0], ids=lambda kind: kind.name)
def test_weights_of_every_kind_give_the_logits_of_their_source(
    cache: Path, kind: GGMLQuantizationType, tied: bool
) -> None:
    model = build(tie_word_embeddings=tied)
    (file,) = write_gguf(cache / "m.gguf", model, kind)
    assert_same(file, rounded(model, kind))


def test_frequencies_of_llama_3_1_are_not_lost(cache: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    model: Any = build(rope_parameters=rope)
    plain: Any = build()
    factors = (plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq).numpy()
    assert factors.max() > 2
    (file,) = write_gguf(cache / "m.gguf", model, extra={"rope_freqs.weight": factors})
    assert_same(file, model)
    assert load_model(EngineConfig(model=str(file))).max_model_len == 1024


@pytest.mark.parametrize(
    ("rope", "metadata", "longest"),
    [
        ({"rope_type": "linear", "factor": 4.0}, {".rope.scaling.type": "linear", ".rope.scaling.factor": 4.0}, 1024),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
            {
                ".rope.scaling.type": "yarn",
                ".rope.scaling.factor": 4.0,
                ".rope.scaling.original_context_length": 512,
            },
            2048,
        ),
        ({"rope_type": "default"}, {".rope.scaling.type": "none"}, 1024),
    ],
    ids=["linear", "yarn", "none"],
)
def test_scaling_in_the_metadata_is_not_lost(
    cache: Path, rope: dict[str, Any], metadata: dict[str, Any], longest: int
) -> None:
    model = build("Qwen2Config", rope_parameters=rope | {"rope_theta": 10_000.0})
    (file,) = write_gguf(cache / "m.gguf", model, architecture="qwen2", metadata=metadata)
    assert_same(file, model)
    assert load_model(EngineConfig(model=str(file))).max_model_len == longest


def test_factors_windows_and_partly_rotated_heads_of_phi3_are_not_lost(cache: Path) -> None:
    short, long = [1.0 + 0.1 * i for i in range(6)], [2.0 + i for i in range(6)]
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": short, "long_factor": long}
    model = build(
        "Phi3Config",
        rope_parameters=rope | {"partial_rotary_factor": 0.75},
        original_max_position_embeddings=32,
        sliding_window=40,
    )
    (file,) = write_gguf(
        cache / "m.gguf",
        model,
        architecture="phi3",
        extra={
            "rope_factors_short.weight": np.array(short, np.float32),
            "rope_factors_long.weight": np.array(long, np.float32),
        },
        metadata={".rope.scaling.original_context_length": 32, ".attention.sliding_window": 40},
    )
    assert_same(file, model)


@pytest.mark.parametrize(
    ("architecture", "settings", "metadata"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}, {}),
        ("qwen3", {}, {}),  # whose heads have another size than the usual
        (
            "qwen3moe",
            {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
            {".expert_count": 4, ".expert_used_count": 2, ".expert_feed_forward_length": 32},
        ),
        (
            "gemma2",
            {"sliding_window": 24, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 20.0}
            | {"query_pre_attn_scalar": 16, "tie_word_embeddings": True},
            {".attention.sliding_window": 24, ".attn_logit_softcapping": 2.0, ".final_logit_softcapping": 20.0},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_particular_to_a_family_is_not_lost(
    cache: Path, architecture: str, settings: dict[str, Any], metadata: dict[str, Any]
) -> None:
    names = {"llama": "LlamaConfig", "qwen3": "Qwen3Config", "qwen3moe": "Qwen3MoeConfig", "gemma2": "Gemma2Config"}
    model = build(names[architecture], **settings)
    (file,) = write_gguf(cache / "m.gguf", model, architecture=architecture, metadata=metadata)
    assert_same(file, model)


def test_a_file_is_read_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readings: list[Path] = []

    class CountingReader(GGUFReader):
        def __init__(self, path: Path) -> None:
            readings.append(path)
            super().__init__(path)

    monkeypatch.setattr(gguf, "GGUFReader", CountingReader)
    monkeypatch.setattr(conversion, "BoundedReader", CountingReader)
    (file,) = write_gguf(cache / "m.gguf", build())
    resolve_model(str(file))
    assert readings == [file]
    assert gguf.GGUFReader is CountingReader, "nobody else is given that file in place of another"


def test_a_split_file_is_found_by_any_of_its_parts_and_converted_once(cache: Path) -> None:
    model = build()
    files = write_gguf(cache / "m.gguf", model, Q8_0, max_tensors=8)
    assert len(files) > 2
    assert_same(files[0], rounded(model, Q8_0))
    folder = Path(resolve_model(str(files[0])))
    assert {path.suffix for path in folder.parent.iterdir()} == {"", ".lock"}
    assert AutoTokenizer.from_pretrained(folder)("the")["input_ids"] == [256, 68]


def test_a_part_that_is_missing_is_named(cache: Path) -> None:
    files = write_gguf(cache / "m.gguf", build(), max_tensors=8)
    files[1].unlink()
    with pytest.raises(UnsupportedModelError, match=rf"{files[1].name} is missing"):
        resolve_model(str(files[0]))


def test_every_end_token_is_found_and_a_missing_template_is_none(cache: Path) -> None:
    (file,) = write_gguf(cache / "m.gguf", build(), metadata={"tokenizer.ggml.eot_token_id": EOT})
    assert set(load_model(EngineConfig(model=str(file))).eos_token_ids) == {EOS, EOT, IM_END}
    assert AutoTokenizer.from_pretrained(resolve_model(str(file))).chat_template is None


def test_a_chat_template_is_kept(cache: Path) -> None:
    (file,) = write_gguf(cache / "m.gguf", build(), metadata={"tokenizer.chat_template": "{{ messages }}"})
    assert AutoTokenizer.from_pretrained(resolve_model(str(file))).chat_template == "{{ messages }}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"leave_out": ("blk.1.attn_k.weight",)}, r"the checkpoint lacks model\.layers\.1\.self_attn\.k_proj\.weight"),
        ({"extra": {"blk.1.attn_sinks.weight": np.ones(4, np.float32)}}, r"does not read: blk\.1\.attn_sinks\.weight"),
        ({"architecture": "granite"}, "architecture granite is not supported"),
        ({"metadata": {".rope.scaling.type": "odd", ".rope.scaling.factor": 2.0}}, "scaled by 'odd'"),
        (
            {"metadata": {".feed_forward_length": 128}},
            r"gate_proj\.weight \(\[96, 64\], config\.json wants \[128, 64\]\)",
        ),
    ],
)
def test_a_file_that_would_be_served_wrong_is_refused(cache: Path, options: dict[str, Any], message: str) -> None:
    (file,) = write_gguf(cache / "m.gguf", build(), **options)
    with pytest.raises(UnsupportedModelError, match=message):
        resolve_model(str(file))
    assert [path.suffix for path in (cache.parent / "cache").iterdir()] == [".lock"], "nothing is left behind"


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.99])
def test_a_truncated_file_is_refused(cache: Path, share: float) -> None:
    (file,) = write_gguf(cache / "m.gguf", build())
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UnsupportedModelError, match=r"m\.gguf.*(is empty|perhaps truncated)"):
        resolve_model(str(file))


@pytest.mark.parametrize(
    ("key", "value", "bound"),
    [
        ("block_count", 50_000, 2),
        ("embedding_length", 10**9, 512),
        ("feed_forward_length", 10**9, 512),
        ("attention.head_count", 0, 512),
        ("attention.key_length", 10**9, 512),
    ],
)
def test_a_size_that_no_tensor_has_is_refused_before_anything_is_built(
    cache: Path, key: str, value: int, bound: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: pytest.fail("built"))
    (file,) = write_gguf(cache / "m.gguf", build(), metadata={f".{key}": value})
    with pytest.raises(UnsupportedModelError, match=rf"llama\.{key} is {value}: must be from 1 to {bound}, by its"):
        resolve_model(str(file))
