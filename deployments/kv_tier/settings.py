"""What a user can set about the shared tier. `app/config.py` has it as `tier.*`."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deployments.errors import UnsupportedModelError

_COPY_SHARES = {"cpu": 0.02, "cuda": 0.5}


class TierSettings(BaseModel):
    """KV that outlives its engine, in the memory of Ray's object store.

    Attributes:
        max_bytes: of KV in the tier, over all nodes; 0: there is none. Ray spills to disk what exceeds its memory.
        object_bytes: blocks of a prompt are kept together up to so many bytes; a block that is larger, alone.
        num_shards: processes that know what is there.
        copy_share: of an engine's time, while it has work, that its copies to the tier may take; 0.02 on a CPU, of a
            core that would compute meanwhile, 0.5 on a GPU.
        name: applications of one cluster that give the same one share the tier, as far as their KV is the same.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_bytes: int = Field(default=0, ge=0, le=1 << 50)
    object_bytes: int = Field(default=4 << 20, ge=1, le=1 << 30)
    num_shards: int = Field(default=1, ge=1, le=64)
    copy_share: float | None = Field(default=None, gt=0, le=1)
    name: str = Field(default="kvrelay", min_length=1)

    @model_validator(mode="after")
    def _check_room(self) -> Self:
        if 0 < self.max_bytes < self.num_shards * self.object_bytes:
            raise ValueError(
                f"max_bytes is {self.max_bytes}, less than one object of {self.object_bytes} bytes (object_bytes) for"
                f" each of {self.num_shards} shards (num_shards): nothing would be kept"
            )
        return self

    @property
    def is_on(self) -> bool:
        return self.max_bytes > 0

    def check_object(self, num_bytes: int) -> None:
        """Refuse a budget that keeps nothing of a model whose objects have so many bytes.

        Raises:
            UnsupportedModelError: says so.
        """
        if num_bytes > self.max_bytes // self.num_shards:
            raise UnsupportedModelError(
                f"tier.max_bytes is {self.max_bytes}, for {self.num_shards} shards (tier.num_shards): none of them"
                f" keeps an object of {num_bytes} bytes, the least that this model's KV takes"
            )

    def copy_share_on(self, device_type: str) -> float:
        """See `copy_share`."""
        return self.copy_share or _COPY_SHARES[device_type]
