# llamahome on processors. In the repository: docker build --file docker/cpu.Dockerfile --tag llamahome:cpu .
# How to run it, and which folders it needs: docs/Installation.md
FROM python:3.12.8-slim-bookworm

# The kernels for processors are compiled on the machine that runs them.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
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
    PYTHONUNBUFFERED=1

RUN python -m venv /opt/llamahome
ENV PATH=/opt/llamahome/bin:$PATH

# The exact versions of the lock file, without what only checks and tests; torch without CUDA, which PyTorch has in an index of its own.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /opt/llamahome/build
COPY requirements.lock ./
RUN sed "/^# what checks and tests it/,/^# what builds/d" requirements.lock > run.lock \
    && grep "^torch==" run.lock > torch.lock \
    && pip install --no-deps --index-url "$TORCH_INDEX" --requirement torch.lock \
    && pip install --no-deps --requirement run.lock

COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip install --no-deps --no-build-isolation .

USER llamahome
WORKDIR /work
ENTRYPOINT ["llamahome"]
CMD ["--help"]
