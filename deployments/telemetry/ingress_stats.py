"""What one ingress replica tells of itself when one of them asks all: plain numbers, as in `replica_stats.py`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from deployments.load.admission import Admission, Reason
from deployments.load.held import Held
from deployments.load.outlook import Outlook
from deployments.messages import Priority
from deployments.routing.pools import PoolRouters
from deployments.telemetry.client_stats import ClientStats

NOBODY_HELD = Held()


@dataclass(frozen=True, slots=True)
class PoolOutlook:
    """What a prompt meets that comes to a pool now, as this replica estimates it.

    Attributes:
        wait_s: until its turn comes.
        least_wait_s: the optimistic end of that.
        queued_tokens: of prompts before it.
        speed: prompt tokens per second of one engine in full steps; None: not measured yet.
    """

    wait_s: float
    least_wait_s: float
    queued_tokens: float
    speed: float | None

    @classmethod
    def of(cls, outlook: Outlook) -> Self:
        wait = outlook.wait
        return cls(wait.best, wait.low, outlook.queued_tokens, outlook.speed)


@dataclass(frozen=True, slots=True)
class IngressStats:
    """Everything one ingress replica tells of itself.

    Attributes:
        replica: its name.
        clients: what its clients see.
        refusals: calls that admission refused, by reason and priority.
        num_readings: times that it has read the pools' numbers.
        outlooks: by pool.
        choices: replicas that it chose, by pool and by what decided.
        promised_tokens: by pool, prompt tokens that the chosen replicas were taken to have cached.
        routing_s: seconds that the choices took.
        held: requests that wait for a decode replica to start.
    """

    replica: str
    clients: ClientStats = field(default_factory=ClientStats)
    refusals: Mapping[tuple[str, str], int] = field(default_factory=dict)
    num_readings: int = 0
    outlooks: Mapping[str, PoolOutlook] = field(default_factory=dict)
    choices: Mapping[tuple[str, str], int] = field(default_factory=dict)
    promised_tokens: Mapping[str, int] = field(default_factory=dict)
    routing_s: float = 0.0
    held: Held = NOBODY_HELD

    @classmethod
    def of(
        cls,
        replica: str,
        clients: ClientStats,
        admission: Admission,
        routers: PoolRouters,
        held: Held = NOBODY_HELD,
    ) -> Self:
        """As it is now; an independent snapshot."""
        return cls(
            replica=replica,
            clients=clients.copy(),
            refusals={
                (reason.value, priority.name.lower()): admission.refusals[reason, priority]
                for reason in Reason
                for priority in Priority
            },
            num_readings=admission.num_readings,
            outlooks={pool: PoolOutlook.of(admission.outlook(pool)) for pool in admission.pools},
            choices={(pool, reason.value): count for (pool, reason), count in sorted(routers.choices.items())},
            promised_tokens=dict(routers.promised_tokens),
            routing_s=routers.seconds,
            held=held,
        )
