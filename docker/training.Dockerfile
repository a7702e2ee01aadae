# Training, on CPUs or NVIDIA GPUs, from the repository's root (docs/operations.md, "Containers"):
#   docker build -f docker/training.Dockerfile -t palisade-training:latest .
# A package index of your own: --build-arg PIP_INDEX_URL=...; its certificate authority: --secret id=ca,src=FILE.

# Any image with `python` 3.11 or newer, its headers, venv and a Debian userland.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS tools
ARG PIP_INDEX_URL=
WORKDIR /src
COPY requirements/uv.txt requirements/build.txt requirements/
RUN --mount=type=secret,id=ca \
    if [ -s /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi; \
    python -m venv /tools \
    && /tools/bin/pip install --no-cache-dir --disable-pip-version-check --require-hashes \
        -r requirements/uv.txt -r requirements/build.txt

FROM tools AS dependencies
ARG PIP_INDEX_URL=
COPY requirements/training.txt requirements/
RUN --mount=type=secret,id=ca --mount=type=cache,target=/root/.cache/uv \
    if [ -s /run/secrets/ca ]; then export SSL_CERT_FILE=/run/secrets/ca; fi; \
    export UV_DEFAULT_INDEX="${PIP_INDEX_URL}" \
    && /tools/bin/uv venv --python "$(command -v python)" /opt/palisade \
    && /tools/bin/uv pip sync --python /opt/palisade/bin/python --require-hashes --link-mode copy --compile-bytecode \
        requirements/training.txt

FROM dependencies AS application
COPY pyproject.toml README.md LICENSE ./
COPY model model
COPY training training
# `service` was not copied, so the wheel has none, and its command has nothing to start.
RUN /tools/bin/uv build --offline --wheel --no-build-isolation --python /tools/bin/python --out-dir /wheel . \
    && /tools/bin/uv pip install --offline --python /opt/palisade/bin/python --prefix /staging --no-deps --compile-bytecode \
        /wheel/*.whl \
    && rm /staging/bin/palisade-serve

FROM ${BASE}
ARG BASE
ARG VERSION=0.1.0
ARG REVISION=
LABEL org.opencontainers.image.title="Palisade training" \
      org.opencontainers.image.description="Training of adversarially robust mixtures of experts" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${BASE}"
# `--compile` needs a compiler at run time: torch writes C++ for a processor, and for a GPU the code that starts its kernels.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 palisade \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin palisade
COPY --from=dependencies /opt/palisade /opt/palisade
COPY --from=application /staging /opt/palisade
ENV PATH=/opt/palisade/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /tmp
USER 10001:10001
ENTRYPOINT ["palisade-train"]
CMD ["--help"]
