"""A process that is killed while it saves: python tests/support/saver.py loop|announced|once|sweep|limited FOLDER [...].

The content of every checkpoint is a function of its step (tests/support/checkpoints.py).
"""

import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import torch
from tests.support.checkpoints import differences, save_step

from llamahome.checkpoint.retention import apply
from llamahome.checkpoint.store import SaveFailed, choose, load
from llamahome.rundir import RunPaths

_FILE_EVENTS = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree", "os.listdir", "os.scandir", "os.truncate")


def loop(run: RunPaths) -> None:
    """Save and apply retention forever; print a line once the first checkpoint is committed."""
    for step in range(1, 1_000_000):
        save_step(run, step, size=20_000)
        apply(run, keep_last=2, keep_best=0, warn=lambda problem: None)
        if step == 1:
            print("saving", flush=True)


def announced(run: RunPaths) -> None:
    """Save and apply retention forever; print each step after its save has returned."""
    for step in range(1, 1_000_000):
        save_step(run, step, size=20_000)
        print(step, flush=True)
        apply(run, keep_last=2, keep_best=0, warn=lambda problem: None)


def once(run: RunPaths, step: int) -> None:
    save_step(run, step)


def sweep(run: RunPaths) -> None:
    """Kill a save and its retention before the 1st, 2nd, 3rd, ... file operation, each in a child process; print the results."""
    torch.set_num_threads(1)
    points, faults, survivors = 0, [], set()
    while True:
        shutil.rmtree(run.root, ignore_errors=True)
        run.root.mkdir()
        for step in (1, 2):
            save_step(run, step)
        (run.root / "checkpoint-0.tmp").mkdir()
        child = os.fork()
        if child == 0:
            _die_at_event(points, run.root)
            save_step(run, 3)
            apply(run, keep_last=1, keep_best=0, warn=lambda problem: None)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        problems = []
        saved = load(choose(run, warn=problems.append))
        faults += [f"killed at event {points}: {what}" for what in differences(saved)]
        faults += [f"killed at event {points}: {problem.render()}" for problem in problems]
        if saved.state.step < 2:
            faults.append(f"killed at event {points}: fell back to step {saved.state.step}")
        survivors.add(saved.state.step)
        if differences(load(save_step(run, 4))) or list(run.root.glob("*.tmp")):
            faults.append(f"killed at event {points}: the next save is not clean")
        if status == 0:
            break
        points += 1
    print(json.dumps({"points": points, "faults": faults, "survivors": sorted(survivors)}))


def _die_at_event(number: int, root: Path) -> None:
    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event not in _FILE_EVENTS or (isinstance(arguments[0], str) and arguments[0].startswith("/") and str(root) not in arguments[0]):
            return
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    sys.addaudithook(hook)


def limited(run: RunPaths, size: int, file_limit: int) -> None:
    """Save with a limit on the size of a file (0: none); print the error, if any."""
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    try:
        save_step(run, 2, size=size)
    except SaveFailed as error:
        problem = error.problems[0]
        print(json.dumps({"code": problem.code, "message": problem.message}))


if __name__ == "__main__":
    paths = RunPaths(Path(sys.argv[2]), "20260101-000000-brisk-otter")
    {"loop": loop, "announced": announced, "once": once, "sweep": sweep, "limited": limited}[sys.argv[1]](
        paths, *(int(word) for word in sys.argv[3:])
    )
