"""What is imported when it is used: torch, of which commands that read files need nothing."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
else:

    class _Late:
        """Stands for a module until a name of it is asked for."""

        def __getattr__(self, name: str) -> Any:
            found = getattr(import_module("torch"), name)
            setattr(self, name, found)
            return found

    torch = _Late()


def offered(package: str, name: str, homes: Mapping[str, str]) -> Any:
    """A public name of a package, imported now; `homes` has its modules and the names of each.

    For the package's `__getattr__`: AttributeError for any other name.
    """
    for module, names in homes.items():
        if name in names.split():
            return getattr(import_module(f"{package}.{module}"), name)
    raise AttributeError(f"module {package!r} has no attribute {name!r}")
