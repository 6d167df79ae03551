"""Ray Serve's controller, as far as the policies of the pools know it."""

from uuid import uuid4

from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from deployments.engine.stats import EngineStats
from deployments.planner.wire import to_numbers
from deployments.pool_policy import PoolPolicy


class Controller:
    """Calls both policies as Serve's controller does, each loop with what the replicas told last."""

    def __init__(self, **settings) -> None:
        self.app = uuid4().hex  # planners are kept by it, for as long as the process lives
        self.settings = {"enabled": True, "ttft_s": 1.0, "itl_s": 0.05, "start_s": 1.0} | settings
        self.policies = {pool: PoolPolicy(pool, False, self.settings) for pool in ("decode", "prefill")}
        self.stats = {pool: [self.engine()] for pool in self.policies}
        self.targets = dict.fromkeys(self.policies, 1)
        self.bounds = dict.fromkeys(self.policies, (1, 10))
        self.now_s = 1000.0

    def engine(self) -> EngineStats:
        return EngineStats(steps=100, max_num_batched_tokens=1000, max_num_seqs=64, num_blocks=100, block_size=16)

    def context(self, pool: str) -> AutoscalingContext:
        deployment = DeploymentID(name=pool, app_name=self.app)
        ids = [ReplicaID(f"{pool}{i}", deployment) for i in range(len(self.stats[pool]))]
        raw: dict[str, dict[ReplicaID, list[TimeStampedValue]]] = {}
        for replica, stats in zip(ids, self.stats[pool], strict=True):
            for name, value in to_numbers(stats).items():
                raw.setdefault(name, {})[replica] = [TimeStampedValue(self.now_s, value)]
        least, most = self.bounds[pool]
        return AutoscalingContext(
            deployment_id=deployment, deployment_name=pool, app_name=self.app, current_num_replicas=len(ids),
            target_num_replicas=self.targets[pool], running_replicas=ids, total_num_requests=0.0,
            total_queued_requests=0.0, aggregated_metrics=None, raw_metrics=raw, capacity_adjusted_min_replicas=least,
            capacity_adjusted_max_replicas=most, policy_state={}, last_scale_up_time=None, last_scale_down_time=None,
            current_time=self.now_s, config=AutoscalingConfig(min_replicas=least, max_replicas=most),
        )  # fmt: skip

    def loop(self, seconds=0.5) -> dict[str, int]:
        self.now_s += seconds
        for pool, policy in self.policies.items():
            answer, state = policy(self.context(pool))
            assert state == {}
            least, most = self.bounds[pool]
            self.targets[pool] = min(max(int(answer), least), most)  # as Serve does
        return self.targets

    def run(self, seconds: float, tokens=500, queued=0) -> dict[str, int]:
        """Prompts are computed each second."""
        for _ in range(int(seconds)):
            for engine in self.stats["prefill"]:
                engine.prompt_tokens += tokens
                engine.prefill_steps += 1
                engine.prefill_s += tokens / 5000
                engine.num_queued_prompt_tokens = queued
            self.loop()
            self.loop()
        return self.targets
