"""What a client can rely on beside the tokens: OpenAI's client, health, metrics, errors, and that leaving frees."""

import json
import re
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from ray.serve._private.logging_utils import get_serve_logs_dir

from deployments.messages import GenerateRequest, ReplyAddress, SamplingParams
from tests.e2e.conftest import ANSWER_TIMEOUT_S, MODEL_NAME, Service
from tests.e2e.waiting import idle, wait_idle
from tests.waiting import wait_until


def openai_client(service: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0)


def test_openai_client_chats(service: Service) -> None:
    with openai_client(service) as client:
        question = [{"role": "user", "content": "What is the capital of France?"}]
        options: dict[str, Any] = {"model": MODEL_NAME, "messages": question, "max_tokens": 12, "temperature": 0}
        whole = client.chat.completions.create(**options)
        assert "Paris" in whole.choices[0].message.content
        assert whole.usage.completion_tokens <= 12
        chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == whole.choices[0].message.content
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_openai_client_completes_and_stops(service: Service) -> None:
    with openai_client(service) as client:
        options: dict[str, Any] = {
            "model": MODEL_NAME,
            "prompt": "One, two, three, four,",
            "max_tokens": 24,
            "temperature": 0,
        }
        whole = client.completions.create(**options)
        streamed = "".join(c.choices[0].text for c in client.completions.create(**options, stream=True))
        assert streamed == whole.choices[0].text
        stop = whole.choices[0].text[5:9]  # in the middle of the text, across tokens as they come
        stopped = client.completions.create(**options, stop=stop)
        assert stopped.choices[0].text == whole.choices[0].text.split(stop)[0]
        assert stopped.choices[0].finish_reason == "stop"
        assert [m.id for m in client.models.list()] == [MODEL_NAME]


@pytest.mark.parametrize(
    "stop",
    [{"stop": ["<|im_end|>"]}, {"stop": [".<|im_end|>"]}, {"stop_token_ids": [2]}],
    ids=["special", "both", "id"],
)
def test_what_is_asked_to_stop_does_so_though_the_models_own_end_is_ignored(
    service: Service, client: httpx.Client, stop: dict[str, object]
) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    body = {"model": MODEL_NAME, "messages": question, "max_tokens": 24, "temperature": 0}

    def ask(**fields: object) -> tuple[str, str]:
        response = client.post(f"{service.url}/v1/chat/completions", json=body | fields)
        choice = response.raise_for_status().json()["choices"][0]
        return choice["message"]["content"], choice["finish_reason"]

    text, finish_reason = ask()
    assert (text[-1], finish_reason) == (".", "stop"), "the model ends its turn"
    expected = text[:-1] if stop.get("stop") == [".<|im_end|>"] else text
    assert ask(ignore_eos=True, **stop) == (expected, "stop")


def test_a_sampled_answer_depends_on_its_seed_alone(services: dict[str, Service], client: httpx.Client) -> None:
    def sample(service: Service, seed: int) -> str:
        prompt = "Once upon a time there was a little robot who lived in a lighthouse by the sea. " * 6
        body = {
            "model": MODEL_NAME,
            "prompt": prompt,
            "max_tokens": 12,
            "temperature": 1.2,
            "top_p": 0.95,
            "seed": seed,
        }
        text: str = client.post(f"{service.url}/v1/completions", json=body).json()["choices"][0]["text"]
        return text

    by_mode = {mode: [sample(service, seed) for seed in (1, 1, 2)] for mode, service in services.items()}
    assert by_mode["disaggregated"] == by_mode["colocated"]
    first, again, other = by_mode["colocated"]
    assert first == again != other


def test_health_and_metrics_cover_both_pools(disaggregated: Service, client: httpx.Client) -> None:
    # The pools have answered lately, if the machine lets them.
    wait_until(lambda: client.get(f"{disaggregated.url}/health").status_code == 200, ANSWER_TIMEOUT_S)
    body = {"model": MODEL_NAME, "prompt": list(range(1000, 1200)), "max_tokens": 1}
    # One token comes from the prefill engine, and decode is handed nothing: only prefill has it cached the next time.
    usages = [client.post(f"{disaggregated.url}/v1/completions", json=body).json()["usage"] for _ in range(2)]
    assert [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages] == [0, 192]
    assert client.post(f"{disaggregated.url}/v1/completions", json=body | {"max_tokens": 4}).status_code == 200
    text = disaggregated.metrics()
    for name in (
        "queued_prompt_tokens", "running_sequences", "kv_blocks_used", "kv_blocks", "prefix_hit_tokens_total",
        "prompt_tokens_total", "generated_tokens_total", "engine_ttft_seconds_count", "engine_itl_seconds_count",
        "handoff_bytes_total", "handoff_seconds_count",
    ):  # fmt: skip
        for pool in ("prefill", "decode"):
            assert f'kvrelay_{name}{{pool="{pool}"' in text, (name, pool)
    assert "kvrelay_ttft_seconds_count{" in text
    assert "kvrelay_itl_seconds_count{" in text
    assert re.search(r'^kvrelay_estimated_wait_seconds{ingress="[^"]+",pool="prefill"} ', text, re.MULTILINE)


def test_the_log_has_a_line_for_each_call_and_none_for_what_the_service_asks_itself(
    service: Service, client: httpx.Client
) -> None:
    body = {"model": MODEL_NAME, "prompt": list(range(5000, 5200)), "max_tokens": 4}
    name = client.post(f"{service.url}/v1/completions", json=body).json()["id"]

    (line,) = wait_until(lambda: re.findall(rf"^.*call={name} .*$", logs_of(service), re.MULTILINE))
    figures = dict(re.findall(r"(\w+)=(\S+)", line))
    assert (figures["prompt_tokens"], figures["generated_tokens"], figures["status"]) == ("200", "4", "200")
    assert float(figures["ttft_s"]) <= float(figures["seconds"])
    assert ("prefill" in figures, "handoff_bytes" in figures) == (service.mode == "disaggregated",) * 2
    # Its ingress asks for numbers each second.
    assert " CALL " not in logs_of(service)


def logs_of(service: Service) -> str:
    """All that its replicas have logged."""
    paths = Path(get_serve_logs_dir()).glob(f"replica_{service.name or service.mode}_*.log")
    return "\n".join(path.read_text() for path in paths)


def test_what_an_engine_refuses_is_no_traceback_and_what_fails_is(disaggregated: Service) -> None:
    unknown = GenerateRequest("refused", (10**6,), SamplingParams(max_tokens=1))
    nobody = ReplyAddress("127.0.0.1", 1, bytes(32))
    ask = disaggregated.pool("Decode").generate.remote
    with pytest.raises(Exception, match="token id 1000000 is not in the vocabulary"):
        ask(unknown, nobody).result(timeout_s=ANSWER_TIMEOUT_S)
    with pytest.raises(Exception, match="no_such_argument"):
        ask(unknown, no_such_argument=nobody).result(timeout_s=ANSWER_TIMEOUT_S)
    wait_until(lambda: "no_such_argument" in logs_of(disaggregated))
    assert "is not in the vocabulary" not in logs_of(disaggregated)


def test_admission_learns_the_speed_of_prompts(service: Service, client: httpx.Client) -> None:
    body = {"model": MODEL_NAME, "prompt": list(range(4000, 4300)), "max_tokens": 2}
    assert client.post(f"{service.url}/v1/completions", json=body).status_code == 200
    wait_until(lambda: "kvrelay_prefill_speed{" in service.metrics(), ANSWER_TIMEOUT_S)


def test_a_request_too_long_is_refused_with_the_numbers(service: Service, client: httpx.Client) -> None:
    body = {"model": MODEL_NAME, "prompt": [7] * 8000, "max_tokens": 1000}
    response = client.post(f"{service.url}/v1/completions", json=body)
    assert response.status_code == 400
    assert "8000" in response.text
    assert "8192" in response.text


def num_done(service: Service) -> tuple[int, int]:
    """Tokens of prompts computed so far, and tokens generated, in all pools."""
    stats = [row.engine for pool in service.pools for row in service.stats(pool)]
    return sum(s.prompt_tokens for s in stats), sum(s.generated_tokens for s in stats)


def test_a_client_that_leaves_its_stream_ends_the_work_for_it(service: Service, client: httpx.Client) -> None:
    wait_idle(service, 120)
    before = num_done(service)
    body = {"model": MODEL_NAME, "prompt": list(range(2000, 2090)), "max_tokens": 2000, "stream": True}
    with client.stream("POST", f"{service.url}/v1/completions", json=body | {"ignore_eos": True}) as stream:
        lines = stream.iter_lines()
        for _ in range(6):
            next(lines)
        assert not idle(service)
    wait_idle(service, 120)
    assert sum(num_done(service)) - sum(before) < 90 + 1000, "half of what was asked for"


@pytest.mark.parametrize("leaves_in", ["prefill", "decode"])
def test_a_client_that_leaves_without_streaming_ends_the_work_for_it(service: Service, leaves_in: str) -> None:
    wait_idle(service, 120)
    before = num_done(service)
    prompt = list(range(3000, 3000 + (4000 if leaves_in == "prefill" else 90)))
    body = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": 2000, "ignore_eos": True}
    address = httpx.URL(f"{service.url}/v1/completions")
    with closing(HTTPConnection(address.host, address.port)) as leaving:
        leaving.request("POST", address.path, json.dumps(body), {"content-type": "application/json"})
        wait_until(lambda: not idle(service) if leaves_in == "prefill" else num_done(service)[1] > before[1] + 2, 120)
    wait_idle(service, 120)
    assert sum(num_done(service)) - sum(before) < len(prompt) + 1000, "half of what was asked for"
