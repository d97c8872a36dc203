"""Replaces vLLM in processes whose pair answers from memory: the import takes one second instead of twenty.

Every name in it is a class whose instances keep their keyword arguments. Nothing here generates or scores.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any


class Whatever(type):
    """A metaclass: its classes have every attribute."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Whatever(name, (Exception,), {"__init__": keep})


def keep(self: Any, *_: Any, **arguments: Any) -> None:
    self.__dict__.update({"extra_args": None, "logprobs": None, "seed": None} | arguments)


class Module(ModuleType):
    """A module with every name in it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = Whatever(name, (Exception,), {"__init__": keep})
        setattr(self, name, found)
        return found


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module below this one."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.startswith("vllm.") else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        found = Module(spec.name)
        found.__path__ = []
        return found

    def exec_module(self, module: ModuleType) -> None: ...


sys.meta_path.insert(0, Finder())
sys.modules[__name__].__class__ = Module
