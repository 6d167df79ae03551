"""Register tiles as LLVM compiles them for a CPU with AVX2 alone. What is wrong with them shows in no result."""

import json
import os
import platform
import subprocess
import sys

import pytest

_COMPILE = r"""
import json
import re
import numba
from deployments.engine.kernels import cpu_attention, cpu_matmul, cpu_tiles, cpu_unpack, cpu_vectors

def innermost_loops(assembly):
    lines, labels = assembly.splitlines(), {}
    for end, line in enumerate(lines):
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = end
        if (jump := re.match(r"\s+j\w+\s+(\.LBB\w+)", line)) and jump[1] in labels:
            yield lines[labels[jump[1]] : end + 1]

def assembly_of(tile, num_arguments, *literals):
    names = ", ".join(f"a{i}" for i in range(num_arguments))
    scope = {"tile": tile}
    exec(f"def function({names}):\n    tile({names}, {literals[0]}, {literals[1]})", scope)
    function = numba.njit(scope["function"])
    function.compile((numba.int64,) * num_arguments)
    return function.inspect_asm()[function.signatures[0]]

found = {"lanes": cpu_vectors.LANES}
for rows in {1, 2, 4, cpu_matmul._ROWS}:
    found[f"matmul {rows}"] = assembly_of(cpu_tiles.matmul_tile, 10, rows, cpu_unpack.VECTORS)
for heads in range(1, cpu_attention._HEADS + 1):
    found[f"dots {heads}"] = assembly_of(cpu_tiles.dot_tile, 8, heads, cpu_attention._KEYS)
    found[f"weighted {heads}"] = assembly_of(cpu_tiles.add_weighted_tile, 8, heads, cpu_attention._VECTORS)
for name, assembly in found.items():
    if name != "lanes":
        found[name] = [loop for loop in innermost_loops(assembly) if any("vfmadd" in line for line in loop)]
print(json.dumps(found))
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names CPUs of x86")
def test_the_sums_of_a_tile_stay_in_sixteen_registers() -> None:
    settings = {"NUMBA_CPU_NAME": "znver3", "NUMBA_CPU_FEATURES": "+avx2,+fma"}
    command = [sys.executable, "-c", _COMPILE]
    out = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=True).stdout
    loops = json.loads(out)
    assert loops.pop("lanes") == 8
    for tile, bodies in loops.items():
        assert bodies, f"{tile}: no loop of products"
        for body in bodies:
            moved = [line for line in body if "vmova" in line or ("mm" in line and "(%rsp" in line)]
            assert not moved, f"{tile} moves vectors or keeps them on the stack: {moved}"
