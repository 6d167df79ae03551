"""Greedy tokens over HTTP, and how they compare with those of transformers."""

from typing import Any

import httpx
import torch
from transformers import AutoModelForCausalLM

from deployments.engine.model.files import BUNDLED_MODEL
from deployments.engine.model.resolve import resolve_model
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


class Reference:
    """What transformers' own model goes on with, greedily, on the same weights in float32.

    One pass over a prompt and an answer to it tells what each of the answer's tokens should have been, for less than it
    takes to generate them.

    Args:
        prompts: by name.
    """

    def __init__(self, prompts: dict[str, list[int]]) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(resolve_model(BUNDLED_MODEL), dtype=torch.float32)
        self._ends = set(self._model.generation_config.eos_token_id)
        self._prompts = prompts
        self._right: set[tuple[str, tuple[int, ...]]] = set()

    def assert_same(self, name: str, got: list[int]) -> None:
        """Equal token for token; where they part, the reference itself must be tied, and the tie is shown."""
        assert len(got) == MAX_TOKENS or got[-1] in self._ends, f"{name}: {len(got)} tokens"
        assert self._ends.isdisjoint(got[:-1]), f"{name}: tokens behind its end"
        if (name, tuple(got)) in self._right:
            return
        ids = torch.tensor([[*self._prompts[name], *got[:-1]]])
        with torch.inference_mode():
            logits = self._model(ids, logits_to_keep=len(got)).logits[0]
        wanted, leads = logits.argmax(-1).tolist(), logits.amax(-1) - logits[range(len(got)), got]
        for at, (token, lead) in enumerate(zip(wanted, leads.tolist(), strict=True)):
            assert lead < TIE, f"{name}: token {at} is {got[at]}, transformers says {token} with a lead of {lead}"
            if token != got[at]:
                print(f"{name}: tie at token {at}: {got[at]} and {token}, logits {lead} apart")
        self._right.add((name, tuple(got)))
