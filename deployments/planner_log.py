"""The planner's last decisions, on their way from Serve's controller to the ingress, which shows them.

They lie in Ray's internal key-value store, as Serve's own state does, under the name of the application. The policies
write, when there is something new; an ingress replica reads while somebody watches.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import msgspec
import ray
from ray.serve._private.storage.kv_store import RayInternalKVStore  # nothing public keeps a few bytes for a cluster

from deployments.planner.shared import Decision

logger = logging.getLogger(__name__)

_NAMESPACE = "kvrelay-planner"
_decoder = msgspec.json.Decoder(list[Decision])


def publish(app: str, decisions: Sequence[Decision]) -> None:
    """Leave the last decisions of an application; returns at once, for the controller must not wait.

    Where there is no Ray, as in the simulator, there is nobody to read them.
    """
    if ray.is_initialized():
        _writer().submit(_write, app, msgspec.json.encode(decisions))


def read(app: str) -> list[Decision]:
    """What was left last, the newest at the end; nothing before there was any. Asks Ray: call it in a thread."""
    told = RayInternalKVStore(_NAMESPACE).get(app)
    return [] if told is None else _decoder.decode(told)


@cache
def _writer() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="planner-log")  # so that they stay in order


def _write(app: str, told: bytes) -> None:
    try:
        RayInternalKVStore(_NAMESPACE).put(app, told)
    except Exception as error:  # they are there to be looked at: nothing depends on them
        logger.warning("the planner's decisions cannot be shown: %r", error)
