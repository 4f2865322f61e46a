# The image that `cluster.kubernetes.image` names: the binaries with their libtorch under /opt/ditharos, OpenMPI, and the ssh daemon by
# which the Kubeflow MPI operator's launcher reaches its workers.
FROM rust:1-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv git && rm -rf /var/lib/apt/lists/*
COPY . /opt/ditharos
WORKDIR /opt/ditharos
# Torch's wheel lies in the user's cache; here it has to come along.
ENV XDG_CACHE_HOME=/opt/ditharos/.cache
RUN ./dev build && find target/release -mindepth 1 -maxdepth 1 ! -type f -exec rm -rf {} +

FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends openmpi-bin openssh-server openssh-client ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/* \
    && mkdir -p /run/sshd \
    # Pods of a job have new names every time; the operator mounts its key with other permissions than sshd wants.
    && printf 'StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\n' >> /etc/ssh/ssh_config \
    && printf 'StrictModes no\nPasswordAuthentication no\n' >> /etc/ssh/sshd_config
COPY --from=build /opt/ditharos/target/release /opt/ditharos/target/release
COPY --from=build /opt/ditharos/.cache /opt/ditharos/.cache
COPY --from=build /opt/ditharos/configs /opt/ditharos/configs
ENV PATH=/opt/ditharos/target/release:$PATH
