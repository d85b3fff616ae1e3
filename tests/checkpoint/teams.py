"""What the worker processes of test_together.py do: save one checkpoint, all of them; one may be refused by its disk."""

from pathlib import Path

from tests.support.checkpoints import PRINTS, save, state_at, tensors_at, write_model_of

from llamahome.checkpoint.store import SaveFailed
from llamahome.checkpoint.together import save_together
from llamahome.distributed.tensorfiles import Part
from llamahome.distributed.world import World
from llamahome.rundir import RunPaths

GIVEN = {"config_text": "training: {seed: 3}\n", "fingerprints": PRINTS, "optimizer_values": {"lr": 1e-3, "betas": [0.9, 0.999]}}


def save_and_be_refused(world: World, payload):
    paths = RunPaths(Path(payload["folder"]), "20260101-000000-brisk-otter")
    save(paths, state=state_at(3), write_model=write_model_of(3), optimizer_tensors=tensors_at(3), world=world, **GIVEN)

    def refuse(folder: Path, part: Part) -> list[Path]:
        (folder / f"part-{part.number}").write_text("half")
        if world.rank == payload["refused"]:
            raise OSError(28, "No space left on device")
        return [folder / f"part-{part.number}"]

    try:
        save_together(world, paths, state=state_at(4), writes={"model": refuse, "optimizer": lambda *_: []}, needed=1, **GIVEN)
    except SaveFailed as error:
        return {"code": error.problems[0].code, "message": error.problems[0].message}
    return {}
