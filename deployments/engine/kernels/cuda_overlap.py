"""Programmatic dependent launch: a kernel starts while the one before it ends, and waits for it where it must.

Meanwhile it may ask for memory that nobody writes (`ask_for`).

Between two kernels of a CUDA graph one to two microseconds pass in which nothing is computed; a decode step has some
600 of them. A kernel that is launched with `OVERLAPPING` may start once every program of the one before has come to
`wait_for_earlier` and gone on, or has ended. Until it has called it itself, it may read nothing that the kernel before
writes, and write nothing that earlier kernels read or write.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Of a GPU whose kernels can wait for each other: Hopper. It is faster there: a token of Qwen3-30B-A3B at 1, 32 and 128
# sequences takes 3.13, 19.22 and 23.17 ms instead of 3.45, 19.54 and 23.39; of Qwen3-0.6B at 1 and 256 0.95 and 4.79
# instead of 1.16 and 4.84; of Llama-3.1-8B at 1 and 128 5.41 and 8.45 instead of 5.58 and 8.58 (H100, 2026-11-28).
_CAPABILITY = (9, 0)


def _overlapping() -> dict[str, bool]:
    can_wait = torch.cuda.is_available() and torch.cuda.get_device_capability() >= _CAPABILITY
    if triton.knobs.runtime.interpret or not can_wait:
        return {"OVERLAPS": False}
    return {"OVERLAPS": True, "launch_pdl": True}


# Arguments of a launch whose kernel calls `wait_for_earlier`.
OVERLAPPING = _overlapping()


@triton.jit
def wait_for_earlier(OVERLAPS: tl.constexpr):
    """Wait for the kernels before, and let the next one start."""
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def ask_for(pointers):
    """Bring lines of memory into the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
