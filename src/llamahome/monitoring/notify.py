"""Runs the user's command (monitoring.notify) when a run ends, fails or raises an alert. Nothing is sent without such a command.

The command gets the facts as environment variables and as JSON on stdin. It runs beside the training, in a process group of its own, for
at most 10 s; then it is killed with everything that it started, and so is what it leaves behind when it ends. It sees a short list of
environment variables, so no token or password of the training reaches it. A failure is reported once and changes nothing else.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import psutil

_LONGEST_SECONDS = 10.0
_AT_ONCE = 4
"""Commands that run at the same time; alerts that come meanwhile are not sent, which the warning says."""
_PASSED_ON = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TZ", "TMPDIR", "DISPLAY", "WAYLAND_DISPLAY", "XDG_RUNTIME_DIR")
_PASSED_ON_TOO = ("DBUS_SESSION_BUS_ADDRESS", "LC_ALL", "LC_CTYPE", "SYSTEMROOT")
_NOTIFIED = ("finished", "stopped", "failed", "alert")
_KEPT_OUTPUT = 4096
_LONGEST_VARIABLE = 2000


class Notifier:
    """Starts the command for events of one run; only rank 0 has one."""

    def __init__(
        self,
        command: str,
        *,
        run: str,
        warn: Callable[[str], None],
        longest: float = _LONGEST_SECONDS,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._command, self._run, self._warn, self._longest = command, run, warn, longest
        self._environment = {name: environ[name] for name in (*_PASSED_ON, *_PASSED_ON_TOO) if name in environ}
        self._threads: list[threading.Thread] = []
        self._warned = threading.Lock()

    def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Start the command if `kind` is the end, a failure or an alert; returns at once."""
        if kind not in _NOTIFIED:
            return
        facts = {"event": kind, "run": self._run, "step": fields.get("step", 0), "text": str(fields.get("text", kind)), **fields}
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        if len(self._threads) >= _AT_ONCE:
            self._fail(f"is still running {_AT_ONCE} times, so {facts['text']!r} was not sent")
            return
        thread = threading.Thread(target=self._send, args=(facts,), name="llamahome-notify", daemon=True)
        self._threads.append(thread)
        thread.start()

    def close(self) -> None:
        """Wait for commands that still run, each until it is killed."""
        for thread in self._threads:
            thread.join()

    def _send(self, facts: Mapping[str, Any]) -> None:
        variables = {f"LLAMAHOME_{name.upper()}": _plain(str(facts[name])) for name in ("event", "run", "step", "text")}
        try:
            process = subprocess.Popen(
                ["/bin/sh", "-c", self._command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**self._environment, **variables},
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            self._fail(f"cannot be started: {error}")
            return
        deadline = time.monotonic() + self._longest
        with process:
            output = _converse(process, json.dumps(facts, default=str).encode() + b"\n", deadline)
            in_time = _wait_unreaped(process, deadline)
            _kill_all(process)
        if not in_time:
            self._fail(f"took longer than {self._longest:g} s and was killed")
        elif process.returncode:
            last = output.decode(errors="replace").strip().splitlines()[-1:]
            self._fail(f"failed with status {process.returncode}" + "".join(f": {line[:200]}" for line in last))

    def _fail(self, what: str) -> None:
        if self._warned.acquire(blocking=False):  # never released: one warning is enough
            self._warn(f"the command of monitoring.notify {what}; the training goes on, and this is said once")


def _plain(text: str) -> str:
    """What a variable can hold: at most 2,000 characters that UTF-8 knows, no null."""
    return text[:_LONGEST_VARIABLE].encode("utf-8", "replace").decode().replace("\0", " ")


def _converse(process: "subprocess.Popen[bytes]", text: bytes, deadline: float) -> bytes:
    """Write `text` to the command and read what it says until it closes its output or time is up; returns the end of the output."""
    assert process.stdin is not None and process.stdout is not None
    output = b""
    with selectors.DefaultSelector() as selector:
        for pipe, events in ((process.stdin, selectors.EVENT_WRITE), (process.stdout, selectors.EVENT_READ)):
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, events)
        while process.stdout in (key.fileobj for key in selector.get_map().values()):
            if (left := deadline - time.monotonic()) <= 0:
                break
            for key, _ in selector.select(min(left, 0.5)):
                if key.fileobj is process.stdout:
                    chunk = os.read(key.fd, 65536)
                    output = (output + chunk)[-_KEPT_OUTPUT:]
                    if not chunk:
                        selector.unregister(process.stdout)
                    continue
                try:
                    text = text[os.write(key.fd, text) :]
                except BrokenPipeError:  # the command does not read it
                    text = b""
                if not text:
                    selector.unregister(process.stdin)
                    process.stdin.close()
    return output


def _wait_unreaped(process: "subprocess.Popen[bytes]", deadline: float) -> bool:
    """Wait until the command has ended, and leave it a zombie, so that nobody else gets the number of its group before it is killed."""
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.01)
    return True


def _kill_all(process: "subprocess.Popen[bytes]") -> None:
    """Kill the command's group and its descendants in other groups, then reap it."""
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: a group of zombies only
        os.killpg(process.pid, signal.SIGKILL)
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
    process.wait()
