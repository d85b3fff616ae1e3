# llamahome on NVIDIA GPUs. In the repository: docker build --file docker/cuda.Dockerfile --tag llamahome:cuda .
# The driver comes from the host (NVIDIA Container Toolkit), CUDA's libraries come with torch. How to run it: docs/Installation.md
FROM python:3.12.8-slim-bookworm

# torch.compile needs a compiler, and so do the kernels for processors.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# Any user may run it (docker run --user), so the caches are open to all, like /tmp. USER: libraries ask for a name that such a user has not.
RUN useradd --create-home --uid 1000 llamahome \
    && mkdir -p /work /var/cache/llamahome \
    && chown llamahome /work \
    && chmod 1777 /var/cache/llamahome
ENV USER=llamahome \
    XDG_CACHE_HOME=/var/cache/llamahome \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

RUN python -m venv /opt/llamahome
ENV PATH=/opt/llamahome/bin:$PATH

# The exact versions of the lock files, without what only checks and tests.
WORKDIR /opt/llamahome/build
COPY requirements.lock requirements-gpu.lock ./
RUN sed "/^# what checks and tests it/,/^# what builds/d" requirements.lock > run.lock \
    && pip install --requirement run.lock --requirement requirements-gpu.lock

COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip install --no-deps --no-build-isolation .

USER llamahome
WORKDIR /work
ENTRYPOINT ["llamahome"]
CMD ["--help"]
