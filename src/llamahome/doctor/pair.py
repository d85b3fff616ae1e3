"""Starts two processes on this machine that exchange a tensor over loopback, as the ranks of a run do. Standard library only."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llamahome.doctor.checks import Check, failed, one_line, passed, warned
from llamahome.units import show_bytes

_SLOW = 50e6
"""Bytes a second. measured: two processes on two cores reach 0.3 to 1 GB/s over loopback."""


@dataclass(frozen=True)
class PairResult:
    """How the exchange of a back end of torch.distributed ended."""

    backend: str
    right: bool
    """Whether both processes got the sum."""
    rate: float
    """Bytes of the tensor a second, in the fastest of the exchanges."""
    trouble: str | None
    """What the processes said when they failed."""


def exchange(folder: Path, *, seconds: float, backend: str = "gloo") -> PairResult:
    """Run both processes; they meet in a file of `folder`. None of them is left behind."""
    meeting = folder / f"meeting-{backend}"
    command = [sys.executable, "-m", "llamahome.distributed.exchange_probe", str(meeting), backend]
    started = [_start([*command, str(rank)]) for rank in range(2)]
    try:
        results = [process.communicate(timeout=seconds) for process in started]
    except subprocess.TimeoutExpired:
        return PairResult(backend, False, 0.0, f"the two processes did not finish within {seconds:g} s")
    finally:
        for process in started:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    for process, (_, err) in zip(started, results, strict=True):
        if process.returncode != 0:
            return PairResult(backend, False, 0.0, last_line(err) or f"exit status {process.returncode}")
    answers = [json.loads(out) for out, _ in results]
    return PairResult(backend, all(each["right"] for each in answers), min(each["bytes_per_s"] for each in answers), None)


def _start(command: Sequence[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def last_line(text: str) -> str:
    """The last line that is not empty."""
    return next((one_line(line) for line in reversed(text.splitlines()) if line.strip()), "")


def pair_check(result: PairResult) -> Check:
    """Whether processes of one machine can train together."""
    name = "two-processes" if result.backend == "gloo" else f"two-processes-{result.backend}"
    if result.trouble is not None:
        return failed(name, f"{result.backend}: {result.trouble}", None)
    if not result.right:
        return failed(name, f"{result.backend}: the sum of two tensors came out wrong")
    detail = f"{result.backend} sums a tensor over two processes at {show_bytes(result.rate)}/s"
    return passed(name, detail) if result.rate >= _SLOW else warned(name, f"{detail}: other programs use the processors")
