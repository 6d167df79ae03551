"""Parts of a call lie within each other, whatever a receipt says, and in the order in which things happen."""

from hypothesis import given
from hypothesis import strategies as st

from deployments.api.receipts import AttemptForm, CallReceipt, EngineReceipt
from deployments.telemetry.waterfall import Part, lay_out
from tests.telemetry.calls import RECEIPT


def test_a_prompt_that_was_handed_over_is_laid_out_by_what_its_receipt_says() -> None:
    ingress, lost, served = lay_out(RECEIPT, 1.5)
    assert (ingress.name, ingress.begin_s, ingress.end_s) == ("ingress", 0.0, 0.00123456)
    assert (lost.begin_s, lost.end_s, lost.error) == (0.0625, 0.125, "EngineDeadError: dead")
    assert (served.begin_s, served.end_s, served.values["replica"]) == (0.125, 1.5, "d2")
    # Its first token was back 0.75 s after it was sent: at 0.875 s.
    assert [(part.name, part.begin_s, part.end_s) for part in served.parts] == [
        ("decode.queue", 0.125, 0.375),
        ("prefill", 0.25, 0.875),
        ("handoff", 0.375, 0.9375),
        ("decode", 0.875, 1.5),
    ]
    (prefill,) = [part for part in served.parts if part.name == "prefill"]
    assert [(part.name, part.begin_s, part.end_s) for part in prefill.parts] == [
        ("prefill.queue", 0.25, 0.375),
        ("prefill.compute", 0.375, 0.875),
    ]


def test_a_prompt_that_the_decode_engine_computed_is_a_part_of_its_own_there() -> None:
    decode: EngineReceipt = {
        "replica": "d1", "reason": "", "queued_s": 0.25, "awaited_s": 0.0, "computing_s": 0.5, "cached_tokens": 32,
    }  # fmt: skip
    attempt: AttemptForm = {
        "decode": decode, "prefill": [], "handoff": None, "sent_s": 0.25, "first_token_s": 0.75, "num_tokens": 4,
        "error": None,
    }  # fmt: skip
    receipt: CallReceipt = {"ingress_s": 0.25, "choices": [{"index": 0, "ttft_s": 1.0, "attempts": [attempt]}]}
    _, served = lay_out(receipt, 2.0)
    assert [(part.name, part.begin_s, part.end_s) for part in served.parts] == [
        ("decode.queue", 0.25, 0.5),
        ("prefill", 0.5, 1.0),
        ("decode", 1.0, 2.0),
    ]
    assert served.parts[1].values == {"replica": "d1", "reason": "", "cached_tokens": 32}


SECONDS = st.floats(0, 100)
ENGINES = st.fixed_dictionaries(
    {"replica": st.just("r"), "reason": st.just("")},
    optional={
        "queued_s": SECONDS,
        "awaited_s": SECONDS,
        "computing_s": SECONDS,
        "next_token_s": st.none() | SECONDS,
        "cached_tokens": st.integers(0, 9),
        "preemptions": st.integers(0, 3),
        "drafted_tokens": st.integers(1, 9),
        "accepted_tokens": st.integers(0, 9),
        "error": st.just("lost"),
    },
)
ATTEMPTS = st.fixed_dictionaries(
    {
        "decode": ENGINES,
        "prefill": st.lists(ENGINES, max_size=3),
        "handoff": st.none()
        | st.fixed_dictionaries({"bytes": st.integers(0, 99), "hidden_s": SECONDS, "exposed_s": SECONDS}),
        "sent_s": SECONDS,
        "first_token_s": st.none() | SECONDS,
        "num_tokens": st.integers(0, 9),
        "error": st.none() | st.just("dead"),
    }
)
CHOICES = st.fixed_dictionaries(
    {"index": st.integers(0, 9), "ttft_s": st.none() | SECONDS, "attempts": st.lists(ATTEMPTS, max_size=3)}
)


def check_within(part: Part) -> None:
    assert part.begin_s <= part.end_s
    for inner in part.parts:
        assert part.begin_s <= inner.begin_s <= inner.end_s <= part.end_s
        check_within(inner)


@given(st.fixed_dictionaries({"ingress_s": SECONDS, "choices": st.lists(CHOICES, max_size=2)}), SECONDS)
def test_each_part_lies_within_its_whole(receipt: CallReceipt, seconds: float) -> None:
    check_within(Part("call", 0.0, seconds, parts=lay_out(receipt, seconds)))
