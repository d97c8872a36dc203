# The server on an NVIDIA GPU. Build from the top of the checkout:
#   docker build -f deploy/docker/server.Dockerfile -t lightreasoner-server .
# For Ray Serve add --build-arg EXTRAS=server,aws,ray.
# Down to the line of dashes it is trainer.Dockerfile word for word, so that both images share those layers.

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
ARG EXTRAS=server,aws
# hadolint ignore=DL3013
RUN pip install ".[$EXTRAS]"
COPY client client
COPY server server
COPY trainer trainer
RUN pip install --no-deps --force-reinstall .

# Whoever builds can lend their own user id (--build-arg UID=$(id -u)), so that mounted folders are written as theirs.
# The home folder holds downloaded models and compiled kernels: keep it on a volume.
ARG UID=1000
RUN userdel --remove ubuntu && useradd --uid "$UID" --create-home lightreasoner
USER $UID
WORKDIR /home/lightreasoner

EXPOSE 8000
# Ready when both engines have loaded, which takes minutes and, with a download, more.
HEALTHCHECK --start-period=30m --start-interval=5s --interval=30s --timeout=10s --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/ready', timeout=5)"]
# Every setting can come from the environment: LIGHTREASONER_EXPERT__MODEL, LIGHTREASONER_LIMITS__BODY_BYTES, …
ENV LIGHTREASONER_HOST=0.0.0.0
# Exec form: SIGTERM reaches the server, which finishes what is running before it ends.
ENTRYPOINT ["lightreasoner-server"]
