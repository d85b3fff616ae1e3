"""What test_launch.py starts in place of `python -m llamahome`: python tests/support/launched.py SCENE FOLDER."""

import os
import signal
import sys
import time
from pathlib import Path

scene, folder = sys.argv[1], Path(sys.argv[2])
rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def without_torch() -> None:
    if scene == "done":
        (folder / f"done-{rank}").write_text(" ".join(sys.argv[1:]))
        (folder / f"node-{rank}").write_text(os.environ["GROUP_RANK"])
    elif scene == "first-shows-its-error":
        print("error of process", rank, file=sys.stderr)
        sys.exit(3 if rank == 0 else 0)
    elif scene == "second-ends-early":
        if rank == 1:
            print("error[data.empty]: nothing there", file=sys.stderr)
            sys.exit(3)
        time.sleep(30)
    elif scene == "killed":
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(30)
    elif scene == "sleeps":
        (folder / f"pid-{rank}").write_text(str(os.getpid()))
        time.sleep(60)


def in_a_world() -> None:
    import torch

    from llamahome.config.schema import DistributedConfig
    from llamahome.distributed.world import open_world
    from llamahome.errors import DataError, Problem, Stopped

    with open_world(DistributedConfig(timeout="20 s"), say=lambda text: None) as world:
        asked = []
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: asked.append(number))
        world.barrier()
        (folder / f"pid-{rank}").write_text(str(os.getpid()))
        if scene == "data-error":
            if world.rank == 1:
                raise DataError(Problem(code="data.bad-json", message="not JSON", where="x.jsonl:3", hint="llamahome data check x.jsonl"))
            world.sum_(torch.ones(3))
        elif scene == "peer-killed":
            if world.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            world.sum_(torch.ones(3))
        elif scene == "stop":
            while not world.any(bool(asked)):
                time.sleep(0.05)
            if world.is_main:
                time.sleep(0.5)
                (folder / "saved").write_text(f"signals {[int(each) for each in asked]}")
            raise Stopped(Problem(code="run.stopped", message="stopped with a checkpoint"))


if scene in ("data-error", "peer-killed", "stop"):
    in_a_world()
else:
    without_torch()
