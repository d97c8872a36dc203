"""vLLM's V2 model runner, which is the default on a GPU, on a machine without one.

`V2_ON_CPU` is what a process needs in its environment. Everything that is Python runs as it does on a GPU: scheduling,
batches, sampling, the scoring of given ids. What stands in for hardware:

| on a GPU | here | by |
| --- | --- | --- |
| compiled Triton kernels | Triton's interpreter, over NumPy | TRITON_INTERPRET, `on_path/sitecustomize.py` |
| streams, events, pinned memory | nothing: each does its work at once | vLLM (vllm/v1/worker/cpu/shm.py) |
| FlashAttention or FlashInfer; CUDA graphs | the CPU build's attention; none | vLLM |
| asynchronous scheduling, vLLM's default | the same, which vLLM turns off on a CPU | `on_path/sitecustomize.py` |
| the fork server's absence: engines are spawned | engines are forks | the server |
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
