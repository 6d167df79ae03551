"""What a router makes of what an engine says of itself."""

import pytest

from deployments.engine.config import EngineLimits
from deployments.engine.stats import EngineStats
from deployments.routing.load import ReplicaLoad


@pytest.mark.parametrize(
    ("windows", "num_blocks"),
    [
        ((None,), 63),  # of 1,000 tokens
        ((100,), 9),  # of a window and a step
        ((None, 100, 100), 63 + 2 * 9),
    ],
)
def test_a_sequence_takes_blocks_of_each_group_of_layers(windows: tuple[int | None, ...], num_blocks: int) -> None:
    stats = EngineStats.begin(EngineLimits(4096, 16, 1000, 8, 32, kv_windows=windows))
    stats.num_used_blocks = 60
    load = ReplicaLoad()
    load.update(stats, 0.0, 0.0)
    assert load.blocks_held(1000, 16) == num_blocks
    assert stats.num_used_tokens == 60 * 16 / len(windows)
