"""Where the GPU's time goes while something runs: seconds by kind of kernel, and those in which no kernel ran."""

from collections import Counter
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

IDLE = "no kernel"
# The first kind of which a part is in a kernel's name: of cuBLAS, cuDNN, FlashAttention, torch or our own.
KINDS = {
    "attention of decodes": ("_decode_attention", "_plan_splits"),
    "attention of prompts": ("flash", "fmha", "sdpa", "_prefill_attention", "_merge_rows", "_scale_rows"),
    "products": ("gemm", "nvjet", "cutlass", "_linear_of_row", "_step_product", "_fp8_", "splitk", "gemv"),
    "experts": ("_grouped", "_of_few", "_combine"),
    "routing": ("_route", "_plan", "_count", "_logits"),
    "norms": ("_rms_norm", "_add_norm"),
    "activations": ("_gated_mul", "_gated_quantized"),
    "rotary embedding, writing of KV": ("_rotate_and_write", "_rotate_and_round"),
    "drawing of tokens": ("reduce_kernel", "_gumbel", "_best_within", "argmax"),
    "rounding to FP8": ("_quantize_rows",),
    "copies": ("memcpy", "memset"),
}


def gpu_seconds(run: Callable[[], object]) -> dict[str, float]:
    """Seconds on the GPU's clock of every kind of kernel while `run` runs, the longest first."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    spans = [(e.start_ns(), e.duration_ns(), e.name()) for e in events if str(e.device_type()).endswith("CUDA")]
    return {kind: nanoseconds / 1e9 for kind, nanoseconds in add_up(spans).most_common()}


def add_up(spans: list[tuple[int, int, str]]) -> Counter[str]:
    """The time of each kind of kernel and of `IDLE`, from the first kernel to the end of the last one.

    Args:
        spans: start, duration and name of each kernel. Where several run at once, one that begins later counts for the
            time that it ends later.
    """
    found: Counter[str] = Counter()
    now = min((start for start, _, _ in spans), default=0)
    for start, duration, name in sorted(spans):
        found[IDLE] += max(0, start - now)
        found[kind_of(name)] += max(0, start + duration - max(start, now))
        now = max(now, start + duration)
    return found


def kind_of(name: str) -> str:
    """What a kernel does, by its name; "other" if it is of none of `KINDS`."""
    lowered = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in lowered for part in parts)), "other")
