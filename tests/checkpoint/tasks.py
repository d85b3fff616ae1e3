"""Tasks of the worker processes of test_collective_save.py: all save one checkpoint, and the disk of one of them may be full."""

from pathlib import Path

from tests.support.checkpoints import PRINTS, save, state_at, tensors_at, write_model_of

from llamahome.checkpoint.collective_save import save_together
from llamahome.checkpoint.store import SaveFailed
from llamahome.distributed.tensorfiles import WriterShare
from llamahome.distributed.world import World
from llamahome.rundir import RunPaths

ARGUMENTS = {"config_text": "training: {seed: 3}\n", "fingerprints": PRINTS, "optimizer_values": {"lr": 1e-3, "betas": [0.9, 0.999]}}


def save_with_a_full_disk(world: World, payload):
    paths = RunPaths(Path(payload["folder"]), "20260101-000000-brisk-otter")
    save(paths, state=state_at(3), write_model=write_model_of(3), optimizer_tensors=tensors_at(3), world=world, **ARGUMENTS)

    def fail(folder: Path, share: WriterShare) -> list[Path]:
        (folder / f"part-{share.number}").write_text("half")
        if world.rank == payload["full"]:
            raise OSError(28, "No space left on device")
        return [folder / f"part-{share.number}"]

    try:
        save_together(world, paths, state=state_at(4), writes={"model": fail, "optimizer": lambda *_: []}, needed=1, **ARGUMENTS)
    except SaveFailed as error:
        return {"code": error.problems[0].code, "message": error.problems[0].message}
    return {}
