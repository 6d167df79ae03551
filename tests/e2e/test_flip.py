"""A decode replica of a running service is told to compute prompts for the others, and to decode again."""

import itertools
from collections.abc import Iterator

import httpx

from deployments.replica_stats import ReplicaStats
from deployments.roles import tell_roles
from tests.e2e.conftest import MODEL_NAME, Scaled, Service
from tests.waiting import wait_until

PROMPTS = [[1 + (i * step) % 250 for i in range(120)] for step in (3, 7, 11, 13)]
_salts = itertools.count()


def answers(service: Service, client: httpx.Client) -> Iterator[list[int]]:
    """Of each prompt, computed anew."""
    for prompt in PROMPTS:
        fields = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        salted = fields | {"cache_salt": f"flip{next(_salts)}", "return_token_ids": True}
        answer = client.post(f"{service.url}/v1/completions", json=salted)
        assert answer.status_code == httpx.codes.OK, answer.text
        yield answer.json()["choices"][0]["token_ids"]


def of(service: Service, name: str) -> ReplicaStats:
    """What a decode replica says."""
    (row,) = [row for row in service.stats("Decode") if row.replica == name]
    return row


def test_a_flipped_replica_computes_prompts_decodes_none_and_changes_no_token(
    scaled: Scaled, client: httpx.Client
) -> None:
    scaled.wait_for_two()
    service = scaled.service
    expected = list(answers(service, client))
    name, other = sorted(row.replica for row in service.stats("Decode"))
    tell_roles([name], [])
    wait_until(lambda: f'kvrelay_flipped{{pool="prefill",replica="{name}"}} 1.0' in service.metrics())

    def has_helped() -> bool:
        assert list(answers(service, client)) == expected
        return of(service, name).handoff.num_requests > 0

    wait_until(has_helped, 300)
    before = of(service, name).engine.num_reserved, of(service, other).handoff.num_requests
    tell_roles([], [name])
    wait_until(lambda: f'kvrelay_flipped{{pool="decode",replica="{name}"}} 0.0' in service.metrics())
    drawn = of(service, name).engine.generated_tokens

    def decodes() -> bool:
        """Whether it has drawn an answer, of which the first token comes from elsewhere."""
        assert list(answers(service, client)) == expected
        return of(service, name).engine.generated_tokens >= drawn + 7

    wait_until(decodes, 300)
    assert before == (0, 0), "nothing waited there for its prompt, and the other one computed none for anybody"
