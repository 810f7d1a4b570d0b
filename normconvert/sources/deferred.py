"""A function of a package that takes long to import, imported when it is called.

transformers imports ``scipy.optimize`` with any model, four tenths of a second, for one function in the losses of
object detectors.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any


@contextmanager
def deferred(module: str, function: str) -> Iterator[None]:
    """Within, ``from module import function`` gives a function that imports the module when it is called.

    Whatever else is asked of the module imports it at once. If it is imported already, or its package is not installed,
    nothing is changed.
    """
    package = module.rpartition(".")[0]
    # What is imported costs nothing more, and what is not installed must still be seen to be missing.
    if module in sys.modules or find_spec(package) is None:
        yield
        return
    stand_in = _StandIn(module)
    # With its real path, submodules can be imported while it stands there.
    stand_in.__path__ = getattr(find_spec(module), "submodule_search_locations", None) or []

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(stand_in.real(), function)(*args, **kwargs)

    # Whoever imported the function keeps this one for good.
    call.__name__ = call.__qualname__ = function
    vars(stand_in)[function] = call
    sys.modules[module] = stand_in
    try:
        yield
    finally:
        stand_in.leave()


class _StandIn(ModuleType):
    """Stands in ``sys.modules`` for a module that is not imported yet."""

    def leave(self) -> None:
        """Make way for the module."""
        # Somebody may have imported the real one in the meantime.
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]

    def real(self) -> ModuleType:
        """The module."""
        self.leave()
        return import_module(self.__name__)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what asks every module there is
            raise AttributeError(name)
        return getattr(self.real(), name)
