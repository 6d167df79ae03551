"""Greedy tokens over HTTP are those that transformers' own `generate` gives on the same float32 weights."""

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deployments.engine.model import BUNDLED_MODEL, resolve_model
from tests.e2e.conftest import MODEL_NAME, Service

MAX_TOKENS = 16
# Beyond float32's noise in a logit of this model (measured: 1e-4 between batch shapes), far below a real difference.
TIE = 1e-3

PLAIN_LENGTHS = (1, 2, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 128, 200, 256, 300, 511, 1025, 3000)
CHATS = (
    "What is the capital of France?",
    "Write a haiku about the sea. 🌊",
    "List three prime numbers above ten and say why they are prime, in one sentence each. " * 6,
    "Erkläre in einem Satz, was ein Schlüssel-Wert-Cache ist, 请用中文回答。",
)


@pytest.fixture(scope="session")
def prompts() -> dict[str, list[int]]:
    """24 prompts by name; the plain ones are windows of real text, the chats go through the template."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(BUNDLED_MODEL))
    words = Path(__file__).read_text() + " ".join(CHATS) + Path(str(torch.__file__)).read_text()
    text = tokenizer(words)["input_ids"]
    rng = random.Random(7)
    plain = {f"plain-{n}": text[(at := rng.randrange(len(text) - n)) : at + n] for n in PLAIN_LENGTHS}
    chats = {
        f"chat-{i}": tokenizer.apply_chat_template(
            [{"role": "user", "content": chat}], add_generation_prompt=True, return_dict=False
        )
        for i, chat in enumerate(CHATS)
    }
    return plain | chats


@pytest.fixture(scope="session")
def reference(prompts: dict[str, list[int]]) -> dict[str, list[tuple[int, float]]]:
    """Greedy tokens of transformers itself, each with the lead of its logit over the runner-up's."""
    model = AutoModelForCausalLM.from_pretrained(resolve_model(BUNDLED_MODEL), dtype=torch.float32)
    expected = {}
    for name, prompt in prompts.items():
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones((1, len(prompt)), dtype=torch.int64),
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tops = [logits[0].topk(2).values for logits in out.logits]
        tokens = out.sequences[0, len(prompt) :].tolist()
        expected[name] = [(token, (top[0] - top[1]).item()) for token, top in zip(tokens, tops, strict=True)]
    return expected


def complete(client: httpx.Client, service: Service, name: str, prompt: list[int]) -> list[int]:
    body: dict[str, Any]
    if name.startswith("chat"):
        content = CHATS[int(name.removeprefix("chat-"))]
        path, body = "chat/completions", {"messages": [{"role": "user", "content": content}]}
    else:
        path, body = "completions", {"prompt": prompt}
    options: dict[str, Any] = {
        "model": MODEL_NAME,
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "return_token_ids": True,
    }
    response = client.post(f"{service.url}/v1/{path}", json=body | options)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    where = answer if name.startswith("chat") else answer["choices"][0]  # as vLLM has it
    assert where["prompt_token_ids"] == prompt
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    tokens: list[int] = answer["choices"][0]["token_ids"]
    return tokens


def assert_same(name: str, got: list[int], expected: list[tuple[int, float]]) -> None:
    """Equal token for token; where they part, the reference itself must be tied, and the tie is shown."""
    want = [token for token, _ in expected]
    if got == want:
        return
    at = next(i for i, pair in enumerate(zip(got, want, strict=False)) if pair[0] != pair[1])
    lead = expected[at][1]
    assert lead < TIE, f"{name}: token {at} is {got[at]}, transformers says {want[at]} with a lead of {lead}"
    print(f"{name}: tie at token {at}: {got[at]} and {want[at]}, logits {lead} apart")


def test_tokens_equal_transformers_cold_and_warm_sixteen_at_once(
    client: httpx.Client,
    service: Service,
    prompts: dict[str, list[int]],
    reference: dict[str, list[tuple[int, float]]],
) -> None:
    for _ in ("cold", "warm"):
        with ThreadPoolExecutor(16) as pool:
            answers = pool.map(lambda item: complete(client, service, *item), prompts.items())
            for name, tokens in zip(prompts, answers, strict=True):
                assert_same(name, tokens, reference[name])
    if service.mode == "disaggregated":
        handed_over = sum(stats.handoff.num_requests for stats in service.stats("Prefill"))
        long_prompts = sum(len(prompt) >= 64 + 16 for prompt in prompts.values())
        assert handed_over >= long_prompts, "the cold round must hand over every long prompt"
    hits = sum(stats.engine.prefix_hit_tokens for stats in service.stats("Decode"))
    assert hits > 3000, "the warm round must find its prompts cached"
