"""Programmatic dependent launch: a kernel starts while the one before it ends, and waits for it where it must.

Between two kernels of a CUDA graph one to two microseconds pass in which nothing is computed; a decode step has some
600 of them. A kernel that is launched with `OVERLAPPING` may start once every program of the one before has come to
`wait_for_earlier` and gone on, or has ended. Until it has called it itself, it may read nothing that the kernel before
writes, and write nothing that earlier kernels read or write.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Arguments of a launch whose kernel calls `wait_for_earlier`. Off: on an H100 (compute capability 9.0) `OVERLAPS` and
# `launch_pdl` saved 0.4 of 3.9 ms of a decode step of Qwen3-30B-A3B (2026-11-27), but the tests of whole engines have
# not run with them on a card yet.
OVERLAPPING: dict[str, bool] = {"OVERLAPS": False}


@triton.jit
def wait_for_earlier(OVERLAPS: tl.constexpr):
    """Wait for the kernels before, and let the next one start."""
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()
