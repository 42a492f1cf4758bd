# ResIST in a container.
#   docker build -t resist-ds .
#   docker run --rm --gpus all --ipc=host resist-ds     # the demo; leave out --gpus without GPUs
#   docker run --rm --gpus all --ipc=host -v "$PWD/runs:/home/resist/runs" resist-ds \
#     torchrun --nproc_per_node 4 -m resist_ds --model resnetv2_50 --dataset digits --workers 8
# --ipc=host: NCCL and data workers share memory between processes, and Docker's 64 MB are too few.
# A mounted folder must be writable for user 1000. --compile alone wants a compiler (apt-get install g++).

# `base` is CUDA's runtime without the large libraries: torch's wheels bring these, of their own version, and
# `runtime` would hold them twice. It asks the host for GPUs and refuses a driver that is too old; 13.0 asks
# for the oldest that any CUDA 13, the wheels' too, works with.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

LABEL org.opencontainers.image.title="resist-ds" \
      org.opencontainers.image.description="ResIST: deep ResNets trained as shallow sub-ResNets" \
      org.opencontainers.image.licenses="Apache-2.0"

# Without versions: Ubuntu's archive keeps the newest build alone, so that a pinned one is gone within weeks.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
# Ubuntu's own user 1000 would own what is mounted.
RUN userdel --remove ubuntu && useradd --create-home --uid 1000 resist

ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1
WORKDIR /opt/resist_ds

# The large layer (downloads about 2.7 GB) depends on two files: a change of the sources keeps it. It has the
# dependencies of pyproject.toml in the versions of constraints.txt. DeepSpeed comes as source: DS_BUILD_OPS=0
# builds none of its C++/CUDA operations ahead. setuptools: with it the last step needs no network.
COPY pyproject.toml constraints.txt ./
RUN python3 -m venv /opt/venv \
    && python -c "import tomllib; file = open('pyproject.toml', 'rb'); \
       print(*tomllib.load(file)['project']['dependencies'], sep='\n')" > requirements.txt \
    && DS_BUILD_OPS=0 PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
       pip install --no-cache-dir -c constraints.txt -r requirements.txt setuptools

# The code is root's, and compiled: the installed package is its only copy. The tools need the presets too.
COPY README.md LICENSE train.py ./
COPY ds_configs ./ds_configs
COPY tools ./tools
COPY resist_ds ./resist_ds
RUN pip install --no-cache-dir --no-deps --no-build-isolation . \
    && rm -r build resist_ds resist_ds.egg-info

USER 1000
WORKDIR /home/resist

# Unhealthy: a run in runs/ that is at work and has written nothing for far longer than its rounds take.
HEALTHCHECK --interval=1m --timeout=10s --start-period=2m --retries=3 \
    CMD ["python", "/opt/resist_ds/tools/health.py", "runs"]

CMD ["python", "/opt/resist_ds/tools/demo.py"]
