"""Which vector instructions the engine and its peers compute with, and how to take AVX-512 away from all of them.

Every library is asked what it does: each has a setting of its own, and one that is misspelt has no effect.
"""

import os
import subprocess
import sys

from numba.core.registry import cpu_target

from deployments.engine.kernels.cpu_vectors import LANES

# A CPU with AVX2 alone: to our kernels (numba), torch, MKL and oneDNN. LLVM schedules as for Zen 3.
AVX2_ONLY = {
    "NUMBA_CPU_NAME": "znver3",
    "NUMBA_CPU_FEATURES": "+avx2,+fma",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}
# MKL and oneDNN tell as they compute; torch multiplies float32 with MKL unless oneDNN is named.
_SAY = {"MKL_VERBOSE": "1", "ONEDNN_VERBOSE": "1"}
_PRODUCTS = """
import torch
print("torch", torch.backends.cpu.get_cpu_capability())
x, weight = torch.ones(2, 64, 64)
torch.nn.functional.linear(x, weight)
torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
"""


def in_force() -> dict[str, str]:
    """What each computes with, in its own words; empty where a library does not tell."""
    _, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    kernels = "AVX-512" if "+avx512f" in features else "AVX2" if "+avx2" in features else "neither AVX2 nor AVX-512"
    command = [sys.executable, "-c", _PRODUCTS]
    said = subprocess.run(command, env={**os.environ, **_SAY}, capture_output=True, text=True, check=False).stdout
    return {
        "engine": f"{kernels}, vectors of {LANES} floats, compiled for {cpu}",
        "torch": _after("torch ", said),
        "MKL": _after("64 architecture ", said).partition(", Lnx")[0],
        "oneDNN": _after("cpu,isa:", said),
    }


def _after(mark: str, text: str) -> str:
    return next((line.partition(mark)[2].strip() for line in text.splitlines() if mark in line), "")
