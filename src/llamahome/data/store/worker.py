"""A process that tokenizes rows for another one: `python -m llamahome.data.store.worker`, started by workers.py only.

It reads requests from stdin and answers on stdout. It imports no torch, gives way as it is told to (nice), leaves signals to its parent,
and ends when the parent closes the pipe or is gone, however it went.
"""

import contextlib
import gc
import json
import os
import queue
import select
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from llamahome.config.schema import DataConfig
from llamahome.data.files.sources import open_source
from llamahome.data.store.messages import FAILED, PROBLEMS, READY, ROWS, receive, send
from llamahome.data.store.packed import pack
from llamahome.data.store.reading import Reading, read_rows
from llamahome.data.text.place import SystemRole
from llamahome.data.text.tokens import ChatTokenizer, load_tokenizer
from llamahome.errors import LlamaHomeError

_LOOK_S = 1.0
"""How often a worker looks whether its parent still lives; the end of the pipe tells sooner, unless a fork of the parent holds it open."""

Requests = queue.SimpleQueue[bytes]


def main() -> None:
    """Answer requests until stdin ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.nice(int(sys.argv[2]))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    requests: Requests = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests, int(sys.argv[1])), daemon=True).start()
    try:
        reading = _open(requests.get())
        gc.freeze()  # or the collector walks through every imported library again and again: a tenth of the time
        send(answers, READY, f"{reading.tokenizer.fingerprint} {reading.source.fingerprint}".encode())
        while True:
            send(answers, ROWS, answer(reading, json.loads(requests.get())))
    except LlamaHomeError as error:
        send(answers, PROBLEMS, json.dumps([type(error).__name__, [asdict(problem) for problem in error.problems]]).encode())
    except BaseException as error:
        line = traceback.format_exception_only(error)[-1].strip()
        send(answers, FAILED, json.dumps([getattr(error, "row", None), line]).encode())
        raise


def _listen(requests: Requests, parent: int) -> None:
    """Take requests as they come; end this process when nobody is there any more to answer to."""
    stream = sys.stdin.buffer
    while True:
        waiting, _, _ = select.select([stream], [], [], _LOOK_S)
        if waiting:
            message = receive(stream)
            if message is None:
                os._exit(0)
            requests.put(message)
        elif os.getppid() != parent:
            os._exit(0)


def _open(message: bytes) -> Reading:
    told = json.loads(message)
    tokenizer = _tokenizer(told["tokenizer"], told["system_role"])
    source = open_source(told["opened"])
    return Reading(tuple(told["opened"]), source, DataConfig.model_validate(told["data"]), told["format"], tokenizer)


def _tokenizer(files: dict[str, str], system_role: SystemRole) -> ChatTokenizer:
    """The tokenizer that its files describe; the parent compares fingerprints before it believes that it is the same."""
    with tempfile.TemporaryDirectory(prefix="llamahome-") as folder:
        for name, text in files.items():
            Path(folder, name).write_text(text, encoding="utf-8")
        return load_tokenizer(folder, system_role=system_role)


def answer(reading: Reading, numbers: Sequence[int]) -> bytes:
    """The rows asked for. When that fails they are read one by one, so that the failure can be told with its row."""
    try:
        return pack(*read_rows(reading, numbers))
    except LlamaHomeError:
        raise
    except BaseException:
        for number in numbers:
            _alone(reading, number)
        raise


def _alone(reading: Reading, number: int) -> None:
    try:
        read_rows(reading, [number])
    except BaseException as error:
        error.row = number  # type: ignore[attr-defined]
        raise


if __name__ == "__main__":
    main()
