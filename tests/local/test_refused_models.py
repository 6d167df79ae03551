"""A model that is none: said in one line, before Ray starts where its files show it, and nothing is left."""

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from app.local_process import RunFolder
from tests.engine import eagle3_heads
from tests.engine.families import build_model, small_model
from tests.local.commands import ROOT, call

REASON = "model '/some/folder': the checkpoint lacks lm_head.weight"
# In the place of a server: an engine has refused the model, and Serve goes on trying. Ray has logged it, too.
FAKE = """#!{python}
import time
print("Traceback (most recent call last):")
# In two writes, as Python makes them without buffers; whoever reads in between has half a line.
print("deployments.errors.{kind}: {reason}", end="", flush=True)
time.sleep(1)
print(" job_id=01000000 worker_id=5e1f4c task_func_name=deployments.engine_host.EngineHost.__init__ timestamp_ns=1")
print(flush=True)
time.sleep(300)
"""


@pytest.mark.parametrize(
    ("kind", "reason"), [("UnsupportedModelError", REASON), ("LimitsError", "kv_cache_bytes is 7, one block takes 9")]
)
def test_a_refusal_ends_the_start_at_once_in_one_line_and_leaves_nothing(
    kind: str, reason: str, tmp_path: Path, folder: RunFolder, port: int
) -> None:
    fake = tmp_path / "python"
    fake.write_text(FAKE.format(python=sys.executable, kind=kind, reason=reason))
    fake.chmod(0o755)
    code = "import sys, app.local; sys.executable = sys.argv.pop(1); sys.exit(app.local.main())"
    command = [sys.executable, "-c", code, str(fake), "--run-dir", str(folder.path), "up", "--port", str(port)]
    failed = subprocess.run(
        [*command, "--app", "tests.tiny_graphs:healthy"],
        cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert (failed.returncode, failed.stderr) == (1, f"{reason}\n")
    assert folder.server() is None


def test_weights_of_another_shape_are_refused_before_ray_starts(tmp_path: Path, folder: RunFolder, port: int) -> None:
    model, weights = tmp_path / "a model", tmp_path / "a model" / "model.safetensors"
    small_model("LlamaConfig").save_pretrained(model)
    (model / "tokenizer.json").write_text("{}")
    held = load_file(weights)
    save_file(held | {"model.norm.weight": held["model.norm.weight"][:60]}, weights, metadata={"format": "pt"})
    failed = call(folder, "up", "--port", str(port), f"model={model}")
    reason = "model.norm.weight ([60] in model.safetensors, config.json wants [64])"
    assert failed.returncode == 1
    assert failed.stderr.startswith(f"model {str(model)!r}: ") and failed.stderr.endswith(f"{reason}\n")
    assert failed.stderr.count("\n") == 1
    assert "checking the model" in failed.stdout and "Ray" not in failed.stdout + folder.log.read_text()
    assert folder.server() is None


def test_a_head_that_does_not_fit_is_refused_before_ray_starts(tmp_path: Path, folder: RunFolder, port: int) -> None:
    model = tmp_path / "model"
    eagle3_heads.target().save_pretrained(model)
    (model / "tokenizer.json").write_text("{}")
    head = eagle3_heads.save(tmp_path / "head", eagle3_heads.weights(), draft_vocab_size=90)
    guessing = "decode.engine.speculation.method=eagle3", f"decode.engine.speculation.model={head}"
    failed = call(folder, "up", "--port", str(port), f"model={model}", *guessing)
    assert failed.returncode == 1
    assert failed.stderr == f"EAGLE-3 head {head!r}: lm_head.weight is [96, 64], must be [90, 64]\n"
    assert "checking the model" in failed.stdout and "Ray" not in failed.stdout + folder.log.read_text()


def test_experts_that_are_to_be_rounded_are_refused_before_ray_starts(
    tmp_path: Path, folder: RunFolder, port: int
) -> None:
    model = tmp_path / "model"
    build_model("mixtral").save_pretrained(model)
    (model / "tokenizer.json").write_text("{}")
    failed = call(folder, "up", "--port", str(port), f"model={model}", "engine.quantization=fp8")
    assert failed.returncode == 1
    assert failed.stderr.startswith(f"model {str(model)!r}: mixtral: experts (model.layers.0.mlp.experts.")
    assert "checking the model" in failed.stdout and "Ray" not in failed.stdout + folder.log.read_text()
