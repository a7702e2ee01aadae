# The service, from the repository's root (docs/operations.md, "Containers"):
#   docker build -f docker/service.Dockerfile -t palisade:latest .
#   docker build -f docker/service.Dockerfile -t palisade:latest-cuda --build-arg VARIANT=cuda .
# A package index of your own: --build-arg PIP_INDEX_URL=...; its certificate authority: --secret id=ca,src=FILE.

# Any image with `python` 3.11 or newer, venv and a Debian userland; pin it by digest for a build that repeats.
ARG BASE=python:3.11-slim-bookworm
# cpu: OpenVINO, no torch, no CUDA. cuda: torch with CUDA's libraries.
ARG VARIANT=cpu

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
ARG VARIANT
ARG PIP_INDEX_URL=
COPY requirements/service-${VARIANT}.txt requirements/
# Byte code is compiled here: the root is read-only where the image runs.
RUN --mount=type=secret,id=ca --mount=type=cache,target=/root/.cache/uv \
    if [ -s /run/secrets/ca ]; then export SSL_CERT_FILE=/run/secrets/ca; fi; \
    export UV_DEFAULT_INDEX="${PIP_INDEX_URL}" \
    && /tools/bin/uv venv --python "$(command -v python)" /opt/palisade \
    && /tools/bin/uv pip sync --python /opt/palisade/bin/python --require-hashes --link-mode copy --compile-bytecode \
        "requirements/service-${VARIANT}.txt"

FROM dependencies AS application
COPY pyproject.toml README.md LICENSE ./
COPY model model
COPY service service
# `training` was not copied, so the wheel has none, and its command has nothing to start.
RUN /tools/bin/uv build --offline --wheel --no-build-isolation --python /tools/bin/python --out-dir /wheel . \
    && /tools/bin/uv pip install --offline --python /opt/palisade/bin/python --prefix /staging --no-deps --compile-bytecode \
        /wheel/*.whl \
    && rm /staging/bin/palisade-train

FROM ${BASE} AS runtime
# Nothing installs packages into a running image, and no program in it runs as its owner.
RUN stdlib="$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
    && rm -rf "$stdlib"/ensurepip "$stdlib"/site-packages/* /usr/local/bin/pip* /usr/local/bin/wheel /usr/share/python-wheels \
    && groupadd --gid 10001 palisade \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin palisade \
    && find / -xdev -type f -perm /6000 -exec chmod a-s {} +
# What changes rarely first: a new version of Palisade alone is a layer of its own.
COPY --from=dependencies /opt/palisade /opt/palisade
COPY --from=application /staging /opt/palisade
COPY docker/healthcheck.py /opt/palisade/healthcheck.py
ENV PATH=/opt/palisade/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PALISADE_HOST=0.0.0.0
WORKDIR /tmp
USER 10001:10001
EXPOSE 8000 8002
HEALTHCHECK --interval=5s --timeout=4s --start-period=60s --retries=4 CMD ["python", "-I", "/opt/palisade/healthcheck.py"]
ENTRYPOINT ["palisade-serve"]
CMD ["run"]

FROM runtime AS cpu
ENV PALISADE_DEVICE=cpu

FROM runtime AS cuda
ENV PALISADE_DEVICE=cuda \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# hadolint ignore=DL3006
FROM ${VARIANT}
ARG BASE
ARG VARIANT
ARG VERSION=0.1.0
ARG REVISION=
LABEL org.opencontainers.image.title="Palisade" \
      org.opencontainers.image.description="Image classification by an adversarially robust mixture of experts (${VARIANT})" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${BASE}"
