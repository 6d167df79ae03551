"""FlashAttention 3 for prompts: Hopper and bfloat16 only, and only where its package is installed (fa3-fwd, a wheel).

The wheel is built without paged KV and without windows: keys and values lie behind each other, and windows are put
together from causal attention.
"""

import logging
from functools import cache, partial

import torch
from torch import Tensor

from deployments.engine.attention.windows import Pieces, WindowPlan, attend_window
from deployments.engine.kernels.arguments import Scores

logger = logging.getLogger(__name__)

_HOPPER = 9
_TOLERANCE = 2e-2


def can_attend(dtype: torch.dtype, head_dim: int, scores: Scores) -> bool:
    """Whether there is a kernel for this kind of KV and scores, windows apart; tried once, on the current GPU."""
    return _can_attend(dtype, head_dim, scores.softcap is not None)


@cache
def _can_attend(dtype: torch.dtype, head_dim: int, has_softcap: bool) -> bool:
    if torch.cuda.get_device_capability()[0] != _HOPPER or dtype is not torch.bfloat16:
        return False
    try:
        import fa3_fwd_interface  # noqa: F401  # registers the operator
    except ImportError as error:
        logger.info("prompts are attended by FlashAttention 2; pip install 'kvrelay[gpu]' brings 3 (%s)", error)
        return False
    try:
        difference = _try(dtype, head_dim, 5.0 if has_softcap else None)
    except Exception as error:  # a wheel that does not fit this torch or driver fails in its own ways
        logger.warning("FlashAttention 3 is installed and does not run, prompts are attended by 2: %s", error)
        return False
    if not difference < _TOLERANCE:
        logger.warning("FlashAttention 3 is off by %.1e and not used", difference)
        return False
    logger.info("prompts with heads of %d are attended by FlashAttention 3", head_dim)
    return True


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    pieces: Pieces,
    scores: Scores,
    lens: Tensor | None = None,
) -> Tensor:
    """Causal attention of several sequences, if `can_attend`; with fewer queries than keys these are the last ones.

    Args:
        queries: (T, num_heads, head_dim) of all P sequences, behind each other.
        keys: (K, num_kv_heads, head_dim), likewise.
        values: as the keys.
        pieces: which of them are whose; P of them.
        scores: what becomes of them; no window.
        lens: (P,) int32 keys of each sequence that count; None: all.

    Returns:
        (T, num_heads, head_dim).
    """
    return _with_sinks(*_run(queries, keys, values, pieces, scores, lens), scores)


def attend_within(queries: Tensor, keys: Tensor, values: Tensor, plan: WindowPlan, scores: Scores) -> Tensor:
    """Attention with a window, if `can_attend` without; see `attend_window`."""
    from deployments.engine.kernels.cuda_merge import merge_rows  # Triton is there only where a GPU is

    run = partial(_run, scores=scores)
    return _with_sinks(*attend_window(queries, keys, values, plan, run, merge_rows), scores)


def _run(
    queries: Tensor, keys: Tensor, values: Tensor, pieces: Pieces, scores: Scores, lens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, (num_heads, T) float32."""
    # The operator itself: the package's function around it takes the host 95 us per layer instead of 33 (with an H100).
    out, lse, *_ = torch.ops.fa3_fwd.fwd.default(
        queries,
        keys,
        values,
        cu_seqlens_q=pieces.starts,
        cu_seqlens_k=pieces.key_starts,
        seqused_k=lens,
        max_seqlen_q=pieces.max_queries,
        max_seqlen_k=pieces.max_keys,
        softmax_scale=scores.scaling,
        is_causal=True,
        softcap=scores.softcap or 0.0,
        num_splits=1,
    )
    return out, lse


def _with_sinks(out: Tensor, lse: Tensor, scores: Scores) -> Tensor:
    if scores.sinks is not None:
        from deployments.engine.kernels.cuda_merge import scale_rows

        scale_rows(out, lse, scores.sinks)
    return out


@torch.inference_mode()
def _try(dtype: torch.dtype, head_dim: int, softcap: float | None) -> float:
    """Relative difference to plain torch, with sinks: 70 queries behind 130 other keys, in a buffer of 300."""
    queries, keys, values = (torch.randn(n, 2, head_dim, device="cuda", dtype=dtype) for n in (70, 300, 300))
    starts, key_starts, lens = (torch.tensor(n, device="cuda", dtype=torch.int32) for n in ((0, 70), (0, 300), (200,)))
    sinks = torch.randn(2, device="cuda")
    scores = Scores(head_dim**-0.5, None, softcap, sinks)
    out = attend(queries, keys, values, Pieces(starts, key_starts, 70, 200), scores, lens)
    logits = torch.einsum("qhd,khd->hqk", queries.float(), keys[:200].float()) * scores.scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    mask = torch.ones(70, 200, device="cuda", dtype=torch.bool).tril(130)
    logits = torch.cat((logits.masked_fill(~mask, float("-inf")), sinks[:, None, None].expand(-1, 70, 1)), -1)
    expected = torch.einsum("hqk,khd->qhd", logits.softmax(-1)[..., :-1], values[:200].float())
    return float((out.float() - expected).norm() / expected.norm())
