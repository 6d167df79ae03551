"""What the profile of a GPU adds up; needs no GPU."""

import pytest

from tests.bench.gpu_profile import IDLE, add_up, kind_of


def test_spans_and_gaps_add_up_to_the_whole_time() -> None:
    found = add_up([(100, 10, "nvjet_tst"), (120, 10, "_rms_norm"), (125, 10, "Memcpy HtoD"), (126, 2, "_gated_mul")])
    assert found == {"products": 10, IDLE: 10, "norms": 10, "copies": 5, "activations": 0}


def test_nothing_takes_no_time() -> None:
    assert not add_up([])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention of prompts"),
        ("_plan_splits", "attention of decodes"),
        ("_gate_up_of_few", "experts"),
        ("_logits", "routing"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<c10::BFloat16, ArgMaxOps>>", "drawing of tokens"),
        ("void at::native::index_elementwise_kernel", "other"),
    ],
)
def test_kernels_are_told_by_their_names(name: str, kind: str) -> None:
    assert kind_of(name) == kind
