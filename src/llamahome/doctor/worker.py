"""The process in which doctor's checks run: `python -m llamahome.doctor.worker`, started by watch.py.

It reads one line of JSON from stdin, the request and the names of the checks, and writes lines of JSON to stdout: a check begins, what it
is doing, its answers, it ends. What libraries print goes to stderr. A check that raises ends the process, and watch.py says so.
"""

import json
import os
import sys
from dataclasses import asdict
from typing import Any

from llamahome.distributed.processors import bound_caches, keep_freed_memory, share_processors
from llamahome.doctor.checks import Request, warned
from llamahome.doctor.probes import PROBES

_LAUNCHED_BY = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")


def main() -> None:
    """Do the checks in their order."""
    order = json.loads(sys.stdin.readline())
    request, names = Request.from_json(order["request"]), set(order["names"])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    _prepare()

    def write(**line: Any) -> None:
        answers.write(json.dumps(line) + "\n")
        answers.flush()

    importable = order["importable"]
    for probe in PROBES:
        if probe.name not in names:
            continue
        write(begin=probe.name)
        if probe.needs_packages and not importable:
            write(check=asdict(warned(probe.name, "not checked, because packages cannot be imported")))
        else:
            for check in probe.look(request, lambda text: write(doing=text)):
                write(check=asdict(check))
                importable = importable and (check.name, check.status) != ("imports", "FAIL")
        write(end=probe.name)


def _prepare() -> None:
    """The environment of a run, but without what an outer launcher has left: the checks are one process."""
    for name in list(os.environ):
        if name in _LAUNCHED_BY or name.startswith(("SLURM_", "OMPI_", "PMI_", "TORCHELASTIC_")):
            del os.environ[name]
    share_processors(os.environ)
    bound_caches(os.environ)
    keep_freed_memory(os.environ)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


if __name__ == "__main__":
    main()
