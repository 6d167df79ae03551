"""Before a decode replica serves: one prompt, computed here and handed over, must be continued with the same tokens.

Different models, kinds of KV or broken copies would otherwise show as fluent nonsense. Called by `Decode` as it starts.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from uuid import uuid4

from deployments.engine_info import EngineInfo
from deployments.errors import ParityError
from deployments.messages import GenerateRequest, ReplyAddress, SamplingParams
from deployments.tokens.receiver import TokenReceiver

logger = logging.getLogger(__name__)

NUM_TOKENS = 8
# The prefill pool may be loading still, or be gone while this replica could serve alone.
TIMEOUT_S = 60.0
_STEP = 7919  # a prime, so that the prompt is no text that a model was trained on

# Serves a request with this many uncached tokens or more handed over; None: none is.
Generate = Callable[[GenerateRequest, ReplyAddress, int | None], Awaitable[object]]


async def check_parity(generate: Generate, host: str, engine: EngineInfo) -> None:
    """Compare greedy tokens after a hand-off and without one.

    Args:
        generate: as `Decode` does it.
        host: IP address of this node, which both pools can reach.
        engine: of the decode replica.

    Raises:
        ParityError: they differ; gives both.
    """
    # One block: enough for every layer to be handed over, and never found in the prefix cache.
    length = min(engine.block_size, engine.max_model_len - NUM_TOKENS)
    prompt = tuple(i * _STEP % engine.vocab_size for i in range(1, length + 1))
    receiver = await TokenReceiver.start(host, NUM_TOKENS)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            handed_over = await _tokens(generate, receiver, prompt, 0)
        computed_here = await _tokens(generate, receiver, prompt, None)
    except TimeoutError:
        logger.warning("no prefill replica answered within %.0f s: this one starts without comparing tokens", TIMEOUT_S)
        return
    finally:
        await receiver.stop()
    if handed_over != computed_here:
        raise ParityError(
            f"the same prompt is continued with {handed_over} after a hand-off and with {computed_here} without: do "
            "prefill and decode run the same model on the same kind of device? parity_check=false serves regardless"
        )


async def _tokens(
    generate: Generate, receiver: TokenReceiver, prompt: tuple[int, ...], threshold: int | None
) -> list[int]:
    request = GenerateRequest(f"parity-{uuid4().hex}", prompt, SamplingParams(max_tokens=NUM_TOKENS, temperature=0))
    async with aclosing(receiver.open(request.request_id, lambda: None, lambda _: None)) as stream:
        await generate(request, receiver.address, threshold)
        return [token for output in [output async for output in stream] for token in output.token_ids]
