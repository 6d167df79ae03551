"""A call that is over, with its receipt, for whoever follows calls."""

from http import HTTPStatus

from deployments.api.observer import EndedCall, Outcome
from deployments.api.receipts import CallReceipt

RECEIPT: CallReceipt = {
    "ingress_s": 0.00123456,
    "choices": [
        {
            "index": 0,
            "ttft_s": 0.5,
            "attempts": [
                {
                    "decode": {"replica": "d1", "reason": "load"},
                    "prefill": [],
                    "handoff": None,
                    "sent_s": 0.0625,
                    "first_token_s": None,
                    "num_tokens": 0,
                    "error": "EngineDeadError: dead",
                },
                {
                    "decode": {"replica": "d2", "reason": "load", "queued_s": 0.25, "next_token_s": None},
                    "prefill": [{"replica": "p1", "reason": "cache", "queued_s": 0.125, "computing_s": 0.5}],
                    "handoff": {"bytes": 4096, "hidden_s": 0.5, "exposed_s": 0.0625},
                    "sent_s": 0.125,
                    "first_token_s": 0.75,
                    "num_tokens": 4,
                    "error": None,
                },
            ],
        },
        {"index": 1, "ttft_s": 0.5, "attempts": []},
    ],
}
CALL = EndedCall(
    call_id="chatcmpl-1",
    request_id="mine",
    path="/v1/chat/completions",
    outcome=Outcome.OK,
    status=HTTPStatus.OK,
    began_s=1e9,
    seconds=1.5,
    ttft_s=0.5,
    key="",
    user=None,
    labels={},
    num_prompt_tokens=12,
    num_cached_tokens=4,
    num_generated_tokens=3,
    finish_reasons=("stop", "length"),
    trace_headers={},
    receipt=RECEIPT,
)
