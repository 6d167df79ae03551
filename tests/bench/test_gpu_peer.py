"""What stands beside our figures of a GPU: how vLLM is measured, without one, and which figures are taken."""

import argparse
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from deployments.engine.model.load import prepare_model
from tests.bench import bench_gpu, gpu_rows, gpu_vllm
from tests.bench.gpu_peer import Peer
from tests.bench.gpu_shapes import SHAPES, Shape, longest
from tests.engine.families import CPU, small_model
from tests.engine.small import build_small
from tests.tiny_models import ONE_LAYER

CARD = "NVIDIA H200"


class FakedVllm:
    """Answers as `vllm.LLM` does; its clock runs by what is asked for: 10 ms a step, and 1 us a prompt token."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.loses = 0.0, 0
        self.given: dict[str, Any] = {}
        module = SimpleNamespace(__version__="0.33.0", LLM=self.build, SamplingParams=SimpleNamespace)
        monkeypatch.setitem(sys.modules, "vllm", module)
        monkeypatch.setattr("time.perf_counter", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: CARD)

    def build(self, **given: Any) -> "FakedVllm":
        self.given = given | {"config": AutoConfig.from_pretrained(given["model"])}
        self.now += 100
        return self

    def generate(self, prompts: list[Any], params: list[Any], use_tqdm: bool) -> list[Any]:
        self.now += 1e-6 * sum(len(prompt["prompt_token_ids"]) for prompt in prompts)
        self.now += 10e-3 * max(its.max_tokens for its in params)
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[0] * (p.max_tokens - self.loses))]) for p in params]


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu_vllm", *arguments])
    return gpu_vllm.main()


def test_figures_of_vllm_become_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked, out = FakedVllm(monkeypatch), tmp_path / "vllm.json"
    for name in ("gemma-2-9b", "llama-8b-fp8"):
        assert run(["--shapes", name, "--repeats", "2", "--out", str(out)], monkeypatch) == 0
    peer = Peer(out, CARD)
    assert peer.name == "vLLM 0.33.0"
    assert peer.milliseconds("gemma-2-9b", "tpot", "128") == pytest.approx(10), "prompts cancel out"
    assert peer.milliseconds("llama-8b-fp8", "prefill", "16x1024") == pytest.approx(10 + 16.384)
    assert peer.milliseconds("gemma-2-9b", "prefill", "1x8000") == pytest.approx(18)
    assert peer.milliseconds("gemma-2-9b", "prefill", "1x8192") is peer.milliseconds("qwen3-0.6b", "tpot", "1") is None
    rate = peer.throughput("gemma-2-9b")
    assert rate is not None and rate > 0 and peer.throughput("qwen3-0.6b") is None
    assert json.loads(out.read_text())["models"]["gemma-2-9b"]["start_s"] == 100
    assert faked.given["quantization"] == "fp8" and faked.given["max_model_len"] == longest(SHAPES["llama-8b-fp8"])


@pytest.mark.parametrize("name", SHAPES)
def test_vllm_gets_the_shape_that_we_measure(name: str, tmp_path: Path) -> None:
    gpu_vllm.write_config(SHAPES[name], tmp_path)
    found, expected = AutoConfig.from_pretrained(tmp_path), SHAPES[name].config()
    for size in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads"):
        assert getattr(found, size) == getattr(expected, size)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["architectures"][0].endswith("ForCausalLM")
    assert ("quantization_config" in values) == name.endswith("mxfp4")


def test_answers_that_lack_tokens_are_no_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakedVllm(monkeypatch).loses = 1
    with pytest.raises(RuntimeError, match="39 tokens came, 40 were asked for"):
        run(["--shapes", "llama-8b", "--out", str(tmp_path / "vllm.json")], monkeypatch)


def test_figures_of_another_card_or_vllm_are_not_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    FakedVllm(monkeypatch)
    given = tmp_path / "vllm.json"
    for content in ('{"device": "NVIDIA H100", "vllm": "0.33.0", "models": {}}', "[]", "{", '{"vllm": "0.30.0"}'):
        given.write_text(content)
        with pytest.raises(SystemExit):
            run(["--shapes", "llama-8b", "--out", str(given)], monkeypatch)
        assert f"--out {given}: " in capsys.readouterr().err and given.read_text() == content
    with pytest.raises(SystemExit):
        run(["--shapes", "llama-8b", "--out", str(tmp_path / "none" / "vllm.json")], monkeypatch)
    assert "No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError('vllm')"),
        ('{"device": "NVIDIA H100 80GB HBM3", "vllm": "1", "models": {}}', "of an NVIDIA H100 80GB HBM3, this is"),
    ],
)
def test_other_files_and_cards_are_refused(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "vllm.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=rf"--beside {path} is .*{re.escape(message)}"):
        Peer(path, CARD)


def test_nothing_beside_is_no_figures() -> None:
    peer = Peer(None, CARD)
    assert peer.name == "" and peer.milliseconds("llama-8b", "tpot", "1") is peer.throughput("llama-8b") is None


def test_rows_are_printed_beside_them(capsys: pytest.CaptureFixture[str]) -> None:
    bench_gpu._print_row("token, batch 1", 8.0, [0.003, 0.004, 0.009], 0.002)
    bench_gpu._print_row("token, batch 8", None, [0.004], None)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[3:] == ["8.00", "4.00", "2.00", "2.00"] and lines[1].split()[3:] == ["4.00"]


def test_all_rows_of_a_model_are_measured_and_those_that_fail_say_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = prepare_model(small_model("LlamaConfig", **(ONE_LAYER | {"max_position_embeddings": 256})), "", CPU)
    engine = build_small(loaded, max_num_seqs=4, max_num_batched_tokens=64, num_blocks=128)
    shape = Shape(lambda: loaded.model.config, batch_sizes=(2,), prompts=((2, 16),))
    monkeypatch.setitem(SHAPES, "tiny", shape)
    monkeypatch.setattr(bench_gpu, "BESIDE", ((2, 8, 0), (2, 8, 16)))
    monkeypatch.setattr(gpu_rows, "MEASURED_STEPS", 4)
    monkeypatch.setattr(gpu_rows, "PROMPT_TOKENS", 8)
    monkeypatch.setattr(gpu_rows, "lengths", lambda: np.array([[8, 4], [6, 2]]))
    for bound in ("floor", "throughput_bound"):
        monkeypatch.setattr(bench_gpu, bound, lambda *_: 1e-3)
    monkeypatch.setattr(bench_gpu, "products_alone", lambda *_: [2e-3])
    options = argparse.Namespace(repeats=2, rows=None, contexts=[(1, 16), (4, 4096)])
    table = bench_gpu.Table("tiny", engine, 1e9, Peer(None, CARD), options)
    table.decodes()
    table.steps_with_prompts()
    table.prompts()
    table.throughput()
    found = table.found
    assert [len(found[kind]) for kind in ("tpot", "context", "beside", "prefill", "products")] == [1, 1, 2, 1, 1]
    assert all(len(times) == 2 for kind in ("tpot", "context", "beside", "prefill") for times in found[kind].values())
    assert len(found["throughput"]) == 2 and list(found["failed"]) == ["context-4x4096"]
    printed = capsys.readouterr().out
    assert "needs" in found["failed"]["context-4x4096"] and found["failed"]["context-4x4096"] in printed
    assert re.search(r"prefill 2 x 16 +\d+\.\d\d +2\.00", printed) and not engine.has_work
