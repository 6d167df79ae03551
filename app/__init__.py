"""The application: `serve run app:graph` builds it from the arguments in `app/config.py`."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from app.graph import graph

__all__ = ["graph"]


class _Package(ModuleType):
    """This package, whose `graph` is the function of the module of that name.

    Loaded when asked for, so that `python -m app.local down` does not load torch.
    """

    @property
    def graph(self) -> Any:
        return import_module("app.graph").graph

    @graph.setter
    def graph(self, module: ModuleType) -> None:
        """Python puts a submodule under its name when it is first imported; the function keeps the name here."""


sys.modules[__name__].__class__ = _Package
