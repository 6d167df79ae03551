"""What a user can set about the planner. `app/config.py` has it as `planner.*`."""

from pydantic import BaseModel, ConfigDict, Field

_DAY_S = 86_400.0


class PlannerSettings(BaseModel):
    """What the pools are to keep, and what they may cost.

    Attributes:
        enabled: the planner decides how many replicas the pools have; else Ray Serve does, by ongoing requests.
        dry_run: where it is enabled, the planner only logs what it would do, and Ray Serve decides.
        ttft_s: bound of the time to first token.
        itl_s: bound of the gaps between tokens.
        quantile: share of the requests, and of the gaps, that are to keep the bounds.
        max_cost: of all replicas together; 0: as many as the pools' `max_replicas` allow.
        prefill_cost: of a prefill replica, in any unit: GPUs, dollars per hour.
        decode_cost: of a decode replica.
        hold_s: a replica is removed once it was not needed for so long, and for twice its start-up time; longer where
            one that was removed was soon needed again.
        start_s: what a replica is taken to need for its start until one was seen to start.
        flip: decode replicas that have too little to do compute prompts where prefill lacks replicas. Decode engines
            set memory aside for that, as prefill engines do.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    enabled: bool = False
    dry_run: bool = False
    ttft_s: float = Field(default=2.0, ge=0.0001, le=_DAY_S)
    itl_s: float = Field(default=0.1, ge=0.0001, le=_DAY_S)
    quantile: float = Field(default=0.95, ge=0.5, le=0.9999)  # as far as `need.py` knows the tail
    max_cost: float = Field(default=0.0, ge=0, le=1e12)
    prefill_cost: float = Field(default=1.0, ge=1e-6, le=1e9)
    decode_cost: float = Field(default=1.0, ge=1e-6, le=1e9)
    hold_s: float = Field(default=60.0, ge=1, le=7 * _DAY_S)
    start_s: float = Field(default=60.0, ge=0, le=_DAY_S)
    flip: bool = False
