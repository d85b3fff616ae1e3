"""A `llamahome dashboard` process that tests talk to, and runs that were never trained for it to show."""

import http.client
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.support.projects import chats, write_rows
from tests.support.summary import SUMMARY
from tests.support.tokenizers import save_tokenizer

RUN_ID = "20261122-071405-brisk-otter"
PLANNED_MEMORY = {"weights": 2**29, "activations": 2**28, "loss": 2**28, "beside": 2**29}
CONFIG = """\
training:
  batch_size: 8
  learning_rate: 0.001
  max_steps: 400
"""


def records(steps: int, *, first: int = 1, every: int = 10) -> list[dict[str, Any]]:
    """What the recorder writes for these steps: losses that fall, an evaluation now and then."""
    found: list[dict[str, Any]] = [{"t": 1000.0, "step": 0, "eval/loss": 4.0, "eval/token_accuracy": 0.2}] if first == 1 else []
    for step in range(first, first + steps):
        line = {"t": 1000.0 + step, "step": step, "train/loss": 1 + 3 / step + 0.1 * math.sin(step), "train/grad_norm": 1 + 1 / step}
        line |= {"train/learning_rate": 1e-3 * (1 - step / 1e6), "train/tokens": 100 * step, "train/targets": 20 * step}
        line |= {"speed/tokens_per_s": 100.0, "speed/targets_per_s": 20.0, "memory/rss": 2**30 + step, "memory/peak": 2**30 + step}
        line |= {f"time/{part}": 0.1 for part in ("data", "forward", "backward", "exchange", "update")}
        found.append(line)
        if step % every == 0:
            found.append({"t": 1000.5 + step, "step": step, "eval/loss": 1.5 + 3 / step, "eval/token_accuracy": 1 - 1 / step})
    return found


def lines(content: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in content)


def write_run(home: Path, run_id: str = RUN_ID, *, steps: int = 40, state: str = "finished", config: str = CONFIG, **status: Any) -> Path:
    """The files of a run in the project `home`; its folder of metrics."""
    root, metrics = home / "output/runs" / run_id, home / "data/metrics/logs" / run_id
    root.mkdir(parents=True)
    metrics.mkdir(parents=True)
    (root / "config.yaml").write_text(config)
    (root / "run_id").write_text(run_id + "\n")
    (root / "environment.json").write_text(
        json.dumps({"command": ["x", "train", "a b"], "memory_bytes": 2**34, "packages": {"torch": "1"}})
    )
    (metrics / "metrics.jsonl").write_text(lines(records(steps)))
    machine = [{"t": 1000.0 + at, "system/cpu": 0.5, "system/ram": 0.25, "memory/rss": 2.0**30} for at in range(0, steps, 2)]
    (metrics / "system.jsonl").write_text(lines(machine))
    (metrics / "summary.json").write_text(json.dumps({**asdict(SUMMARY), "run_id": run_id, "planned_memory": PLANNED_MEMORY}))
    write_status(metrics, state=state, step=steps, horizon=max(steps, 8), **status)
    return metrics


def write_data(home: Path, run_id: str, rows: int = 9) -> None:
    """Rows in chats.jsonl, and the checkpoint of the run that says that it trains on them."""
    write_rows(home / "chats.jsonl", chats(rows))
    checkpoint = home / "output/runs" / run_id / "checkpoint-10"
    save_tokenizer(checkpoint / "model")
    (checkpoint / "trainer_state.json").write_text(json.dumps({"extra": {"data_path": ["chats.jsonl"]}}))


def write_status(metrics: Path, **status: Any) -> None:
    record = {"pid": os.getpid(), "host": socket.gethostname(), "t": time.time(), **status}
    (metrics / "status.json").write_text(json.dumps(record))


def append(path: Path, content: Iterable[dict[str, Any]]) -> None:
    with path.open("a") as file:
        file.write(lines(content))


@dataclass
class Dashboard:
    """A server process."""

    process: subprocess.Popen
    url: str

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def get(self, path: str, *, method: str = "GET", body: bytes | None = None, **headers: str) -> tuple[int, dict[str, str], str]:
        """Status, headers in small letters, and body; nothing is followed."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        found = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read().decode()
        connection.close()
        return found

    def page(self, path: str) -> str:
        """The body of a page that must be there."""
        status, _, body = self.get(path)
        assert status == 200, (path, status, body)
        return body

    def raw(self, request: bytes) -> int:
        """Send bytes as they are; the status, 0 if the connection is closed without one."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            try:
                connection.sendall(request)
                head = connection.makefile("rb").readline().split()
            except (BrokenPipeError, ConnectionResetError):
                return 0
        return int(head[1]) if len(head) > 1 else 0

    def __enter__(self) -> "Dashboard":
        return self

    def __exit__(self, *_: object) -> None:
        self.end(signal.SIGKILL)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Its exit status, also if it has ended before."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(timeout=30)
        self.process.stdout.close()
        self.process.stderr.close()
        return status


def started(home: Path, *words: str, port: int = 0) -> Dashboard:
    """The dashboard of the project in `home`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "llamahome", "dashboard", "--port", str(port), *words],
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    line = process.stdout.readline()
    if not line.startswith("listening on http://"):
        process.kill()
        raise AssertionError((line, process.communicate()[1]))
    return Dashboard(process, line.split()[-1].replace("//0.0.0.0:", "//127.0.0.1:"))
