"""The routers of this process, by the deployment that they choose replicas of.

A file of its own: Serve copies the whole module of a custom router class into each process, variables and all
(`RequestRouterConfig` pickles it by value, Ray 2.60), so that what such a module keeps is seen by nobody else.
"""

from deployments.routing.router import Router

_routers: dict[str, Router] = {}


def register(deployment: str, router: Router) -> None:
    """Calls of this process to a deployment are routed by it from now on."""
    _routers[deployment] = router


def router_of(deployment: str) -> Router | None:
    """None: nobody has registered one."""
    return _routers.get(deployment)
