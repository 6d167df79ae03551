"""The benchmark that plays both fronts by hand still speaks their language. It is not timed here."""

from collections.abc import Iterator

import pytest
import ray

from app.config import AppConfig
from tests.bench.bench_handoff import Driver, random_prompt


@pytest.fixture
def local_ray() -> Iterator[None]:
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_a_prompt_that_the_source_has_cached_is_handed_over_whole(local_ray: None) -> None:
    driver = Driver(AppConfig.model_validate({"decode.engine.enable_prefix_caching": "false"}))
    prompt = random_prompt(100, seed=0)
    driver.warm(prompt)
    for name in ("first", "second"):
        seconds, num_bytes = driver.hand_over(prompt, name)
        assert seconds > 0
        num_blocks = -(-len(prompt) // driver.info.block_size)
        assert num_bytes == num_blocks * driver.info.bytes_per_block
