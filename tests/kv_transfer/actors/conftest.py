"""One Ray for the modules that need one.

Its driver owns chunks, which Ray watches in a thread that outlives `ray.shutdown` and disturbs the next Ray of the
process: nothing that runs after this may start another there.
"""

from collections.abc import Iterator

import pytest
import ray

from tests.kv_transfer.handoff_engines import NUM_GPUS
from tests.ray_start import start_ray


@pytest.fixture(scope="package")
def cluster() -> Iterator[None]:
    start_ray(num_cpus=4, num_gpus=NUM_GPUS)
    yield
    ray.shutdown()
