# The trainer, which also evaluates and can sample, on an NVIDIA GPU. Build from the top of the checkout:
#   docker build -f deploy/docker/trainer.Dockerfile -t lightreasoner-trainer .
# Down to the line of dashes it is server.Dockerfile word for word, so that both images share those layers.

# CUDA of the minor release that vLLM's PyTorch is built for: 13.0, which wants driver 580 or newer.
FROM nvidia/cuda:13.0.3-base-ubuntu24.04

# The wheels bring CUDA's libraries. The rest is for what is compiled at run time: Triton wants a C compiler and
# Python's headers; FlashInfer wants nvcc and CUDA's headers. With wget KubeRay asks whether a pod is ready. Ubuntu drops
# old versions of packages: none is pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        python3.12-dev python3.12-venv gcc g++ wget \
        cuda-nvcc-13-0 cuda-cudart-dev-13-0 cuda-nvrtc-dev-13-0 libcublas-dev-13-0 libcurand-dev-13-0 \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
RUN python3.12 -m venv /opt/venv

# Dependencies before source: empty packages stand in for ours, so that a change of ours installs none of them again.
# Versions are pyproject.toml's.
WORKDIR /opt/lightreasoner
COPY pyproject.toml LICENSE ./
# hadolint ignore=DL3013
RUN mkdir client server trainer && touch README.md && pip install '.[server,aws]'
# ----------------------------------------------------------------------------------------------------------------------
# hadolint ignore=DL3013
RUN pip install '.[server,trainer,aws]'
COPY client client
COPY server server
COPY trainer trainer
RUN pip install --no-deps --force-reinstall .

# As in server.Dockerfile: the builder's user id, and a home folder for models and kernels.
ARG UID=1000
RUN userdel --remove ubuntu && useradd --uid "$UID" --create-home lightreasoner
USER $UID
WORKDIR /files

ENTRYPOINT ["lightreasoner-trainer"]
