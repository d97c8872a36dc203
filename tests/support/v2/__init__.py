"""Runs vLLM's V2 model runner, the default on a GPU, on a machine without a GPU.

`V2_ON_CPU` holds the environment variables that a process needs. All Python code runs as on a GPU: scheduling, batches,
sampling, the scoring of given ids. The rest is replaced:

| on a GPU | here | by |
| --- | --- | --- |
| compiled Triton kernels | Triton's interpreter, over NumPy | TRITON_INTERPRET, `on_path/sitecustomize.py` |
| streams, events, pinned memory | none: work is done at once | vLLM (vllm/v1/worker/cpu/shm.py) |
| FlashAttention or FlashInfer; CUDA graphs | the CPU build's attention; none | vLLM |
| asynchronous scheduling, vLLM's default | the same; vLLM would turn it off on a CPU | `on_path/sitecustomize.py` |
| spawned engines, no fork server | engines are forks | the server |
"""

from __future__ import annotations

import os
from pathlib import Path

ON_PATH = Path(__file__).parent / "on_path"
V2_ON_CPU = {
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, (str(ON_PATH), os.environ.get("PYTHONPATH")))),
}
