"""The engine at the other end of a link, as a test wants it."""

from ray.exceptions import RayError

from deployments.kv_transfer.link import Peer


class FakePeer(Peer):
    """Lives, hangs or is dead as the test says."""

    def __init__(self) -> None:
        self.is_dead = False
        self.has_been_silent_s = 0.0

    def silent_s(self, interval_s: float) -> float:
        if self.is_dead:
            raise RayError
        return self.has_been_silent_s
