"""Tells engines of the decode pool to compute prompts for others, or to decode again. Called in Serve's controller.

A role is a number that the engine itself tells of itself (`EngineStats.is_flipped`), so it ends with the engine, and
whoever sends requests or plans learns it as all other numbers. Engines that may be told have a name.
"""

import logging
from collections.abc import Iterable

import ray

from deployments.errors import brief

logger = logging.getLogger(__name__)

# Of the names of engines' actors, in all applications of a cluster.
NAMESPACE = "kvrelay-engines"


def tell_roles(flipped: Iterable[str], unflipped: Iterable[str]) -> None:
    """Tell engines their role, and do not wait: what they say of themselves shows whether they have heard.

    Args:
        flipped: names of replicas of which the engines are to compute prompts; those that are gone are left out.
        unflipped: likewise, that are to decode.
    """
    for names, is_flipped in ((flipped, True), (unflipped, False)):
        for name in names:
            try:
                ray.get_actor(name, namespace=NAMESPACE).take_role.remote(is_flipped)
            except Exception as error:  # it has just gone; or Ray does not answer, and it is told the next time
                logger.info("an engine is not told its role: %s", brief(error))
