"""Lets vLLM's V2 model runner, made for GPUs, start on a CPU; see `support.v2`. Runs in every process at its start.

It changes two modules as they are loaded, and nothing else:

- `triton.backends` gets a backend "cpu". Without it, vLLM on a CPU treats Triton as missing. TRITON_INTERPRET=1 runs
  the kernels, so the backend never compiles one.
- vLLM's CPU platform turns asynchronous scheduling off. Here it stays as vLLM's configuration set it, as on CUDA.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any


class InterpretedDriver:
    """Triton's driver for kernels that are interpreted."""

    @staticmethod
    def is_active() -> bool:
        return True


def add_backend(module: ModuleType) -> None:
    module.backends["cpu"] = module.Backend(compiler=None, driver=InterpretedDriver)


def keep_async_scheduling(module: ModuleType) -> None:
    platform = module.CpuPlatform
    update = platform.check_and_update_config.__func__

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        decided = vllm_config.scheduler_config.async_scheduling
        update(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = decided

    platform.check_and_update_config = classmethod(check_and_update_config)


CHANGES = {"triton.backends": add_backend, "vllm.platforms.cpu": keep_async_scheduling}


class Changed(importlib.abc.MetaPathFinder):
    """Finds the modules in `CHANGES`, and changes each one when it has been loaded."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if name not in CHANGES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            CHANGES[name](module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Changed())
