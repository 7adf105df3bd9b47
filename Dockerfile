# Two images from one file:
#   docker build --target teacher -t mekd-teacher .
#   docker build --target agent -t mekd-agent .
# TORCH_INDEX names an index with CPU-only torch wheels (several GB less):
#   docker build --build-arg TORCH_INDEX=URL --target agent -t mekd-agent .

FROM python:3.11-slim AS base
ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
# By numbers: Kubernetes takes no name for a user that is not root (runAsNonRoot).
RUN groupadd --gid 10001 mekd && useradd --create-home --uid 10001 --gid 10001 mekd && install --directory --owner=mekd --group=mekd /data
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY protos ./protos
COPY networks ./networks
COPY teacher_service ./teacher_service
COPY edge_agent ./edge_agent
COPY benchmarks ./benchmarks
RUN pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -c constraints.txt '.[postgres]'
WORKDIR /data
USER 10001:10001
VOLUME /data

# The ledger is /data/mekd-ledger.db; accounts are made in the same volume:
#   docker run --rm -v mekd:/data --entrypoint teacher-admin mekd-teacher account create my-device --budget 50000
#   docker run --init --stop-timeout 40 -p 50051:50051 -v mekd:/data mekd-teacher --model /data/teacher.pt \
#       --listen 0.0.0.0:50051 --tls-cert /data/tls.pem --tls-key /data/tls.key
# Files in the volume belong to user 10001. Beyond loopback the server wants --tls-cert and --tls-key (or
# --insecure-listen behind a proxy that has them). It drains for 20 seconds when it is stopped.
# No HEALTHCHECK here: it would have to know whether there is TLS, and a name on the certificate. To docker run give
#   --add-host teacher.example:127.0.0.1 --health-start-period 60s --health-timeout 10s \
#       --health-cmd "teacher-serve --check teacher.example:50051 --liveness --tls-ca /data/ca.pem"
# (--tls-cert and --tls-key, too, where clients must show a certificate), or with --insecure-listen
#   --health-cmd "teacher-serve --check 127.0.0.1:50051 --liveness"
FROM base AS teacher
EXPOSE 50051
STOPSIGNAL SIGTERM
ENTRYPOINT ["teacher-serve"]
CMD ["--help"]

# The run folder is /data/runs/mekd; local pictures are mounted read-only:
#   docker run --rm -e MEKD_API_KEY -v mekd-run:/data -v ~/pictures:/pictures:ro mekd-agent \
#       run --phase all --images /pictures --teacher teacher.example:50051 --tls-ca /data/ca.pem
FROM base AS agent
STOPSIGNAL SIGTERM
ENTRYPOINT ["edge-agent"]
CMD ["--help"]
