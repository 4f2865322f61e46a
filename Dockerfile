# The image that `cluster.kubernetes.image` names: a bundle (./dev bundle) under /opt/ditharos, OpenMPI, and the ssh daemon by which the Kubeflow
# MPI operator's launcher reaches its workers.
#   docker build -t ditharos .                                          for GPUs
#   docker build -t ditharos --build-arg BUNDLE=--cpu .                 without the CUDA half
FROM rust:1-bookworm AS build
ARG TORCH_INDEX=pypi
ARG BUNDLE=
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv git && rm -rf /var/lib/apt/lists/*
COPY . /src
WORKDIR /src
RUN ./dev setup --torch-index "$TORCH_INDEX" && ./dev bundle /opt/ditharos $BUNDLE

FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends openmpi-bin openssh-server openssh-client ca-certificates \
    && rm -rf /var/lib/apt/lists/* \
    && mkdir -p /run/sshd \
    # Pods of a job have new names every time; the operator mounts its key with other permissions than sshd wants.
    && printf 'StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\n' >> /etc/ssh/ssh_config \
    && printf 'StrictModes no\nPasswordAuthentication no\n' >> /etc/ssh/sshd_config
COPY --from=build /opt/ditharos /opt/ditharos
ENV PATH=/opt/ditharos/bin:$PATH
