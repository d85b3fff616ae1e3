"""Checkpoints whose content is a function of the step, so that a loaded checkpoint can be checked."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from llamahome.checkpoint.collective_save import save_together
from llamahome.checkpoint.manifest import Fingerprints
from llamahome.checkpoint.state import TrainerState
from llamahome.checkpoint.store import Saved, space_needed
from llamahome.distributed.tensorfiles import WriterShare, write_files
from llamahome.distributed.world import World
from llamahome.rundir import RunPaths

PRINTS = Fingerprints(data="d" * 64, base="b" * 64)


ALONE = World(0, 1, 0, torch.device("cpu"))


def save(
    paths: RunPaths,
    *,
    write_model: Callable[[Path], None],
    optimizer_tensors: dict[str, torch.Tensor],
    world: World = ALONE,
    **arguments: Any,
) -> Path:
    """Save a checkpoint whose model is written by process 0 and whose tensors are written by all."""

    def model(folder: Path, part: WriterShare) -> list[Path]:
        if part.number == 0:
            write_model(folder)
        return []

    def tensors(folder: Path, part: WriterShare) -> list[Path]:
        return write_files(folder, "optimizer", optimizer_tensors, part=part).mine

    writes = {"model": model, "optimizer": tensors}
    return save_together(world, paths, writes=writes, needed=lambda: space_needed(paths, optimizer_tensors), **arguments)


def state_at(step: int, **changes) -> TrainerState:
    values = {
        "step": step,
        "consumed": step * 32,
        "tokens": step * 1000,
        "targets": step * 240,
        "bad_steps": 0,
        "best_loss": None,
        "best_step": None,
        "evaluations_without_gain": 0,
        "elapsed_s": step / 3,
        "micro_batch_tokens": 2048,
    }
    return TrainerState(**{**values, **changes})


def tensors_at(step: int, size: int = 64) -> dict[str, torch.Tensor]:
    noise = torch.Generator().manual_seed(step)
    return {
        "layer.weight/exp_avg": torch.randn(size, generator=noise),
        "layer.weight/exp_avg_sq": torch.rand(size, generator=noise),
        "layer.weight/step": torch.tensor(float(step)),
    }


def write_model_of(step: int, size: int = 64):
    def write(folder: Path) -> None:
        safetensors.torch.save_file({"weight": torch.full((size,), float(step))}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(f'{{"step": {step}}}')

    return write


def save_step(paths: RunPaths, step: int, *, size: int = 64, **changes) -> Path:
    return save(
        paths,
        state=state_at(step, **changes),
        config_text=f"training: {{seed: {step}}}\n",
        fingerprints=PRINTS,
        write_model=write_model_of(step, size),
        optimizer_tensors=tensors_at(step, size),
        optimizer_values={"lr": 1e-3, "betas": [0.9, 0.999]},
    )


def differences(saved: Saved, size: int = 64) -> list[str]:
    """The parts of a loaded checkpoint that differ from what `save_step` wrote at its step."""
    step = saved.state.step
    expected = tensors_at(step, size)
    same = {
        "name": saved.folder.name == f"checkpoint-{step}",
        "state": saved.state == state_at(step),
        "config": saved.config_path.read_text() == f"training: {{seed: {step}}}\n",
        "tensor names": set(saved.optimizer_tensors) == set(expected),
        "tensors": all(torch.equal(saved.optimizer_tensors[name], value) for name, value in expected.items()),
        "values": saved.optimizer_values == {"lr": 1e-3, "betas": [0.9, 0.999]},
        "fingerprints": saved.fingerprints == PRINTS,
        "model": bool((safetensors.torch.load_file(saved.model_dir / "adapter_model.safetensors")["weight"] == step).all()),
    }
    return [name for name, holds in same.items() if not holds]
