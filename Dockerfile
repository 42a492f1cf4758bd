# ResIST in a container. The torch wheels bring CUDA with them, so the base needs nothing but Python,
# and GPUs need nothing but the host's driver. A compiler (apt-get install g++) is wanted by --compile alone.
#   docker build -t resist-ds .
#   docker run --rm --gpus all --ipc=host resist-ds     # the demo; leave out --gpus without GPUs
# --ipc=host: NCCL and data workers share memory between processes, and Docker's 64 MB are too few.
FROM python:3.12-slim-bookworm

ENV PYTHONUNBUFFERED=1

RUN useradd --create-home --uid 1000 resist
WORKDIR /home/resist/resist_ds

# The large layer (downloads about 2.7 GB) comes first: a change of train.py, tools or presets keeps it.
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY resist_ds ./resist_ds
RUN DS_BUILD_OPS=0 PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
    pip install --no-cache-dir --root-user-action ignore -c constraints.txt .

COPY --chown=resist:resist train.py ./
COPY --chown=resist:resist ds_configs ./ds_configs
COPY --chown=resist:resist tools ./tools
RUN chown resist:resist .
USER resist

CMD ["python", "tools/demo.py"]
