"""Fields that all endpoints that generate have in common: how tokens are drawn, and what is said of the call."""

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from deployments.api.fields import LogitBias, Metadata, Stops, StopTokenIds
from deployments.api.strict import Strict
from deployments.messages import MAX_PENALTY, REPETITION_PENALTIES, Priority

# OpenAI's words for how urgent a call is.
ServiceTier = Literal["default", "flex", "priority"]
TIERS: Mapping[Priority, ServiceTier] = {
    Priority.LOW: "flex",
    Priority.NORMAL: "default",
    Priority.HIGH: "priority",
}


class DrawFields(Strict):
    """How tokens are drawn, what ends an answer, and what of it is shown; in the words of OpenAI and vLLM."""

    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, ge=0, le=1)
    top_k: int = Field(default=0, ge=-1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    presence_penalty: float = Field(default=0.0, ge=-MAX_PENALTY, le=MAX_PENALTY)
    frequency_penalty: float = Field(default=0.0, ge=-MAX_PENALTY, le=MAX_PENALTY)
    repetition_penalty: float = Field(default=1.0, ge=REPETITION_PENALTIES[0], le=REPETITION_PENALTIES[1])
    logit_bias: LogitBias = ()
    min_tokens: int = Field(default=0, ge=0)
    stop: Stops = ()
    stop_token_ids: StopTokenIds = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    ignore_eos: bool = False


class LabelFields(Strict):
    """What a caller says of a call: how urgent it is, whose cache it may use, and words for the operator's log."""

    cache_salt: str | None = Field(default=None, min_length=1, max_length=256)
    prompt_cache_key: str | None = Field(default=None, max_length=256)
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None
    priority: int | None = Field(default=None, ge=-(2**31), lt=2**31)
    user: str | None = Field(default=None, max_length=256)
    safety_identifier: str | None = Field(default=None, max_length=256)
    metadata: Metadata = Field(default_factory=dict)

    @property
    def salt(self) -> str:
        """What both fields about caches make of it; another pair makes another one."""
        salt, key = self.cache_salt or "", self.prompt_cache_key or ""
        return f"{len(salt)}:{salt}{key}" if salt or key else ""

    @model_validator(mode="after")
    def _check_priority(self) -> Self:
        if self.priority is not None and self.service_tier in ("flex", "priority"):
            message = "means the same as service_tier; give one of them"
            raise PydanticCustomError("priority", message, {"field": "priority"})
        return self
