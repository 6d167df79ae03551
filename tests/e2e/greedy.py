"""Greedy tokens over HTTP, and how they compare with those of transformers."""

from typing import Any

import httpx

from tests.e2e.conftest import CHATS, MAX_TOKENS, MODEL_NAME, Service

# Beyond float32's noise in a logit of this model (measured: 1e-4 between batch shapes), far below a real difference.
TIE = 1e-3


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
