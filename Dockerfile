# The trainer with PyTorch for CUDA, whose wheels bring CUDA itself; the host needs the driver and its container toolkit.
#
#   docker build --tag gptbert .
#   docker run --gpus all --ipc=host --user "$(id -u)" --volume "$PWD:/work" gptbert train --train_path=… …
#   docker run … --entrypoint torchrun gptbert --standalone --nproc_per_node=4 -m gptbert.train --train_path=… …

ARG PYTHON=3.13

FROM python:${PYTHON}-slim AS build
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim
# Triton and Inductor compile with it.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
ARG CUDA=cu130
COPY constraints.txt /tmp/
# Its version is in constraints.txt.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir torch --constraint /tmp/constraints.txt \
    --index-url "https://download.pytorch.org/whl/${CUDA}"
COPY --from=build /wheels /tmp/wheels/
# hadolint ignore=DL3013
RUN wheel="$(echo /tmp/wheels/*.whl)" && pip install --no-cache-dir "${wheel}[datasets]"

RUN useradd --uid 1000 gptbert && mkdir /work && chown gptbert /work
# Compilers' caches are in /tmp and named after the user, also where `--user` gives a number without a name.
ENV HOME=/tmp USER=gptbert
USER 1000
WORKDIR /work
ENTRYPOINT ["gptbert"]
