"""The line of a call: its figures and names, as text that can be split and as fields; nothing that was said."""

import json
import re
import shlex
from dataclasses import replace

import pytest

from deployments.api.observer import Outcome
from deployments.api.receipts import AttemptForm, ChoiceReceipt
from deployments.telemetry.request_log import fields_of, log_call
from tests.call_lines import kept_lines
from tests.telemetry.calls import CALL, RECEIPT

# As logfmt has it: a word, or what stands between double quotes.
LOGFMT = re.compile(r'([a-z_]+)=("(?:[^"\\]|\\.)*"|[^" ]+)(?: |$)')


def test_the_line_has_the_figures_of_the_receipt() -> None:
    assert fields_of(CALL) == {
        "call": "chatcmpl-1",
        "path": "/v1/chat/completions",
        "status": 200,
        "outcome": "ok",
        "seconds": 1.5,
        "ttft_s": 0.5,
        "prompt_tokens": 12,
        "cached_tokens": 4,
        "generated_tokens": 3,
        "ingress_s": 0.0012,
        "decode": "d1,d2",
        "decode_queued_s": 0.25,
        "prefill": "p1",
        "prefill_queued_s": 0.125,
        "prefill_computing_s": 0.5,
        "handoff_bytes": 4096,
        "hidden_s": 0.5,
        "exposed_s": 0.0625,
        "resumed": 1,
        "errors": ["EngineDeadError: dead"],
        "request_id": "mine",
    }


def test_an_engine_that_many_samples_lost_is_told_of_once_and_the_line_stays_short() -> None:
    choice = RECEIPT["choices"][0]
    lost = choice["attempts"][0]
    dead: ChoiceReceipt = {**choice, "attempts": [*[lost] * 6, choice["attempts"][1]]}
    fields = fields_of(replace(CALL, receipt={**RECEIPT, "choices": [dead] * 128}))
    assert (fields["resumed"], fields["errors"]) == (768, ["EngineDeadError: dead"])
    gone: list[AttemptForm] = [{**lost, "error": f"TransferError: chunk {n} is gone"} for n in range(6)]
    fields = fields_of(replace(CALL, receipt={**RECEIPT, "choices": [{**choice, "attempts": gone}] * 128}))
    assert fields["errors"] == [f"TransferError: chunk {n} is gone" for n in range(4)]


HOSTILE = "a b", 'say "hi"', "x=1", "line\nbreak", "", "naïve", "\u2028", "\x7f", "\x1b[31m", "it's", "\\", "\ud800"
FORGING = "x outcome=failed y", 'it\'s "a" outcome=failed', '\\" outcome=failed', "a\nINFO -- outcome=failed"


@pytest.mark.parametrize("user", [*HOSTILE, *FORGING])
def test_what_a_caller_says_stays_one_value_of_one_line(user: str) -> None:
    call = replace(CALL, user=user, key="team", labels={"metadata": {user: user}}, receipt=None)
    with kept_lines() as lines:
        log_call(call)
    (record,) = lines
    line = record.getMessage()
    assert line.startswith("call=chatcmpl-1 path=/v1/chat/completions status=200 outcome=ok seconds=1.5 ttft_s=0.5 ")
    assert line.isascii() and line.isprintable()
    assert json.loads(json.dumps(vars(record)["call"])) == fields_of(call)
    assert [word.partition("=")[0] for word in shlex.split(line)] == list(fields_of(call))
    values = {name: json.loads(value) if value[0] == '"' else value for name, value in LOGFMT.findall(line)}
    assert list(values) == list(fields_of(call))
    assert values["user"] == user and json.loads(values["labels"]) == call.labels


def test_a_call_without_an_answer_says_so_by_leaving_it_out() -> None:
    gone = replace(CALL, outcome=Outcome.ABORTED, status=None, ttft_s=None, receipt=None)
    assert not {"status", "ttft_s", "decode"} & fields_of(gone).keys()
