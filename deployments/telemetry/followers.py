"""Tells several of the calls that are over: whoever counts, logs or traces them."""

import logging
from collections.abc import Callable, Sequence

from deployments.api.observer import EndedCall, Observer

logger = logging.getLogger(__name__)

Follower = Callable[[EndedCall], None]


class ObservedCalls:
    """An `api.observer.Observer` with followers.

    Args:
        counts: told of everything; what is told of every token goes to it directly.
        followers: told of each call that is over, with its receipt. What fails there is logged and harms no call.
    """

    def __init__(self, counts: Observer, followers: Sequence[Follower] = ()) -> None:
        self._counts = counts
        self._followers = followers
        self.wants_receipts = bool(followers)
        self.request_started = counts.request_started
        self.request_denied = counts.request_denied
        self.first_token = counts.first_token
        self.inter_token = counts.inter_token
        self.request_finished = counts.request_finished

    def call_ended(self, call: EndedCall) -> None:
        for follower in (self._counts.call_ended, *self._followers):
            try:
                follower(call)
            except Exception:
                logger.exception("a call that is over was not told of to one of those who follow them")
