"""Real processes that exchange over gloo on loopback, in one line: run_workers("tests/distributed/tasks.py:sums", 2).

A task is a function (world, payload) -> JSON value; it runs in every process and the values come back in rank order.
"""

import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def worker_environment(**variables: str) -> dict[str, str]:
    """This environment, with the project's tests importable and one thread per process."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "PYTHONDONTWRITEBYTECODE": "1", **variables}


def run_workers(task: str, world_size: int, payload: Any = None, *, timeout: float = 60.0) -> list[Any]:
    """What `task` ("path/to/file.py:function", from the project's root) returns on each of `world_size` processes.

    AssertionError with the stderr of the first that failed; every process is ended by its id, whatever happens.
    """
    port = str(free_port())
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        processes = []
        for rank in range(world_size):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "MASTER_PORT": port}
            errors = stack.enter_context(open(f"{folder}/stderr-{rank}", "w"))
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.workers", task, json.dumps(payload), f"{folder}/result-{rank}.json"],
                env=worker_environment(MASTER_ADDR="127.0.0.1", **{name: str(value) for name, value in place.items()}),
                stderr=errors,
                cwd=ROOT,
            )
            stack.callback(_end, process)
            processes.append(process)
        _wait(processes, Path(folder), time.monotonic() + timeout)
        return [json.loads(Path(f"{folder}/result-{rank}.json").read_text()) for rank in range(world_size)]


def _wait(processes: list[subprocess.Popen], folder: Path, deadline: float) -> None:
    while any(process.poll() is None for process in processes):
        failed = [rank for rank, process in enumerate(processes) if process.poll()]
        if failed or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    for rank, process in enumerate(processes):
        if process.poll():
            raise AssertionError(f"worker {rank} ended with {process.poll()}:\n{(folder / f'stderr-{rank}').read_text()}")
    if any(process.poll() is None for process in processes):
        raise AssertionError("the workers did not finish in time")


def _end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()


def _main() -> None:
    from llamahome.config.schema import DistributedConfig
    from llamahome.distributed.world import open_world

    task, payload, result = sys.argv[1:]
    path, name = task.rsplit(":", 1)
    spec = importlib.util.spec_from_file_location("task", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with open_world(DistributedConfig(timeout="50 s"), say=lambda text: None) as world:
        value = getattr(module, name)(world, json.loads(payload))
    Path(result).write_text(json.dumps(value))
    sys.stderr.flush()
    os._exit(0)  # the end of Python aborted once in torch's threads after several groups ("terminate called"); the result is there


if __name__ == "__main__":
    _main()
