"""The small trace that is shipped: `python -m load_tests.synthetic_trace` writes it anew, always the same.

Three kinds of requests in bursts over about a minute: short chats, long prompts with short answers, and prompts that
begin with the same two prefix blocks. Made up, small enough for a model on a CPU.
"""

import random
from pathlib import Path

from load_tests.trace import PREFIX_BLOCK_TOKENS, TraceRow, write_trace

PATH = Path(__file__).parent / "traces" / "synthetic.csv"
SEED = 1
NUM_CHATS, NUM_LONG, NUM_SHARED = 26, 8, 6
# Requests fall into bursts at random, so that some are large and some are empty.
NUM_BURSTS, BURST_EVERY_S, BURST_S = 12, 5.0, 1.5
SHARED_IDS = (0, 1)


def synthesize(seed: int) -> list[TraceRow]:
    """Make the trace of that seed."""
    rng = random.Random(seed)
    kinds = [_chat] * NUM_CHATS + [_long] * NUM_LONG + [_shared] * NUM_SHARED
    rng.shuffle(kinds)
    times_s = sorted(rng.randrange(NUM_BURSTS) * BURST_EVERY_S + rng.uniform(0, BURST_S) for _ in kinds)
    return [kind(round(time_s - times_s[0], 3), rng) for kind, time_s in zip(kinds, times_s, strict=True)]


def _chat(arrival_s: float, rng: random.Random) -> TraceRow:
    return TraceRow(arrival_s, rng.randint(20, 120), rng.randint(20, 80), ())


def _long(arrival_s: float, rng: random.Random) -> TraceRow:
    return TraceRow(arrival_s, rng.randint(1200, 1600), rng.randint(8, 32), ())


def _shared(arrival_s: float, rng: random.Random) -> TraceRow:
    prompt_tokens = len(SHARED_IDS) * PREFIX_BLOCK_TOKENS + rng.randint(20, 100)
    return TraceRow(arrival_s, prompt_tokens, rng.randint(20, 80), SHARED_IDS)


if __name__ == "__main__":
    write_trace(PATH, synthesize(SEED))
    print(PATH)
