"""Starts the process of a system and requests steps from it. Its other output goes to a log file."""

import json
import os
import selectors
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_LOAD_S = 900.0
_STEP_S = 900.0
_LEVEL = "LLAMAHOME_CPU_LEVEL"
_QUIET = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}


class SystemFailed(RuntimeError):
    """A system whose process ended, or did not answer in time."""


def environment() -> dict[str, str]:
    """Environment of every process of the benchmark: without the hub, with the modules of this checkout."""
    kept = {name: value for name, value in os.environ.items() if name == _LEVEL or not name.startswith(("LLAMAHOME_", "PYTHONPATH"))}
    return {**kept, **_QUIET, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "src")))}


class TrainerProcess:
    """The process of one system. The caller must close it."""

    def __init__(self, python: str, peer: str, task: Mapping[str, Any], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
        self._log = folder / "log"
        self._started = time.perf_counter()
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [python, "-m", f"benchmarks.peers.{peer}", "task.json"],
                cwd=folder,
                env=environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self._buffer = b""

    def wait_until_ready(self) -> None:
        """Wait until the system has loaded everything."""
        self._answer(_LOAD_S)

    def run_steps(self, steps: int) -> dict[str, Any]:
        """Run the next steps and return their measurements."""
        return self._request({"go": steps}, _STEP_S * max(1, steps))

    def command(self, name: str) -> dict[str, Any]:
        """Run another command of this system and return its answer."""
        return self._request({name: True}, _STEP_S)

    def time_start(self, first: int, more: int) -> tuple[float, float, dict[str, Any]]:
        """Seconds from the start of the process to the end of `first` steps and of `more` further steps, and the last measurements.

        The requests are written to stdin in advance, so that the system never waits for this process.
        """
        for steps in filter(None, (first, more)):
            self._write({"go": steps})
        self._answer(_LOAD_S)
        self._answer(_STEP_S * first)
        first_seconds = time.perf_counter() - self._started
        measurements = self._answer(_STEP_S * more) if more else {}
        return first_seconds, time.perf_counter() - self._started, measurements

    def finish(self) -> None:
        """Let the system finish by itself: it has no steps left."""
        self._write({"go": 1})
        if self._process.wait(_LOAD_S):
            raise SystemFailed(f"ended: {self.last_log_line()}")

    def close(self) -> None:
        """Kill the process if it is still running."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # requests that were never read
                    pipe.close()

    def _request(self, value: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        self._write(value)
        return self._answer(seconds)

    def _write(self, value: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(value).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise SystemFailed(f"ended: {self.last_log_line()}") from None

    def _answer(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(seconds):
                    raise SystemFailed(f"no answer within {seconds:.0f} s")
                more = os.read(self._process.stdout.fileno(), 1 << 16)
                if not more:
                    raise SystemFailed(f"ended: {self.last_log_line()}")
                self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def last_log_line(self) -> str:
        """The last line of the log, which is usually the error."""
        lines = [line.strip() for line in self._log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return lines[-1][:200] if lines else "no output"
