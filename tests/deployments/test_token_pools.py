"""Which pool drew a token is known behind the pools: of a prompt that was handed over the first is prefill's."""

import pytest

from tests.deployments.conftest import StartPools
from tests.deployments.pools import NUM_TOKENS, PROMPT, tokens_of
from tests.engine.driving import greedy


@pytest.mark.parametrize("min_tokens", [16, 10_000], ids=["handed over", "computed here"])
async def test_the_first_token_of_a_prompt_that_was_handed_over_is_of_prefill_and_no_other(
    start: StartPools, min_tokens: int
) -> None:
    pools = await start(min_tokens=min_tokens)
    outputs = await pools.collect(greedy("r", PROMPT, NUM_TOKENS))
    assert len(tokens_of(outputs)) == NUM_TOKENS
    drawn = [output.by_prefill for output in outputs for _ in output.token_ids]
    assert drawn == [min_tokens == 16] + [False] * (NUM_TOKENS - 1)
