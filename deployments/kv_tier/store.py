"""What an engine asks of the tier, whatever it is made of. Asked from threads of its own, never from the engine's."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from deployments.kv_tier.index import Found, Offer, TierCounts


class TierStore(Protocol):
    """The tier, as one engine sees it."""

    def offer(self, offers: Sequence[Offer]) -> TierCounts:
        """Say what this engine could give; the tier asks for what it wants. Also with none: the engine lives.

        Returns:
            What the whole tier has.

        Raises:
            TierError: nobody heard.
        """
        ...

    def find(self, keys: Sequence[bytes], timeout_s: float) -> list[Found[Any]]:
        """The leading ones of these objects that are there.

        Raises:
            TierError: nobody answers.
        """
        ...

    def read(self, found: Found[Any], timeout_s: float) -> np.ndarray:
        """The bytes of an object, not to be written to.

        Raises:
            TierError: it is gone, or does not come in time.
        """
        ...

    def memory(self) -> Sequence[range]:
        """Addresses at which this process sees the objects of its node; some of it may have none."""
        ...


def leading(keys: Sequence[bytes], found: Sequence[Found[Any]]) -> list[Found[Any]]:
    """Of what was found in any order, that which the first of these objects have without a gap."""
    by_key, run = {one.key: one for one in found}, []
    for key in keys:
        if key not in by_key:
            break
        run.append(by_key[key])
    return run
