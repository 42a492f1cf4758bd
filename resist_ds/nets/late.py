"""Packages that wait until they are used: timm imports many that few runs need.

timm's two modules of ResNets need one class of torchvision's. Whoever imports that gets the whole of
torchvision, and with it torch's compiler and sympy; so does whoever imports timm's other nets; and timm looks
whether wandb is there. Half of a start went there. `defer` puts the packages themselves, the real ones, among
the imported modules, with their `__init__` still to be run. Python runs it when something of the package is
first asked for. Their submodules can be imported before.

For programs of our own, whose every import is known. A user's program that imports `resist_ds` is left alone:
it may rely on what importing a package does besides, such as the operators that torchvision registers.
"""

import importlib
import sys
import threading
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

PACKAGES = ("timm", "timm.models", "torchvision", "torchvision.ops", "torchvision.models", "wandb")
# What they import of each other is theirs to change: other versions are imported as ever.
TRIED = {"timm": "1.0.31", "torchvision": "0.29.2"}

_lock = threading.RLock()
_running: set[str] = set()


class _Late(ModuleType):
    """A package whose `__init__` has not been run."""

    def __getattr__(self, name: str) -> Any:  # called for what is not there
        run(self)
        return ModuleType.__getattribute__(self, name)


def defer() -> None:
    """Let `PACKAGES` wait, but for those that are imported already or not installed."""
    if any(find_spec(name) is None or version(name) != tried for name, tried in TRIED.items()):
        return
    for name in PACKAGES:  # parents stand before their children
        spec = None if name in sys.modules else find_spec(name)
        if spec is None or spec.loader is None:
            continue
        module = module_from_spec(spec)
        module.__class__ = _Late
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    # What their own submodules take out of them by name, which would run them half-way through.
    sys.modules["timm"].__version__ = TRIED["timm"]  # type: ignore[attr-defined]
    importlib.import_module("torchvision.transforms")


def run(module: ModuleType) -> None:
    """Have a package whole now, if it has been waiting."""
    with _lock:  # another thread that runs it is waited for
        if type(module) is not _Late or module.__name__ in _running:  # it asks for what it has not made yet
            return
        spec = module.__spec__
        assert spec is not None and spec.loader is not None
        _running.add(module.__name__)
        try:
            spec.loader.exec_module(module)
        finally:
            _running.discard(module.__name__)
        module.__class__ = ModuleType  # type: ignore[assignment]  # whole, and as any other
