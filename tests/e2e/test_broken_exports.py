"""Exports onto disks that cannot take them, of weights that are no safetensors, and of a run that has not ended: refused, or right."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.model.export.test_merge import save_adapter
from tests.support.projects import Project


@contextmanager
def disk(project: Project, options: str) -> Iterator[Path]:
    """A disk of its own at `disk` in the project."""
    folder = project.folder / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("only root may mount")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True, check=False).returncode:
        pytest.skip("this container may not mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [("size=8m", "the export needs about"), ("size=64m,nr_inodes=4", "No space left on device")],
    ids=["too small", "full in the middle"],
)
def test_a_disk_without_room_gets_nothing_and_the_reason_is_told(project: Project, options: str, said: str) -> None:
    with disk(project, options) as folder:
        answer = project.type("export", "tiny", "--to", "merged", "--output", "disk/out").expect(7)
        assert answer.codes == ["export.write-failed"] and said in answer.err
        assert answer.helps == ["--output DIR on another disk"], "nothing about checkpoints, which an export has none of"
        assert not list(folder.iterdir())


def test_a_disk_that_is_read_only_is_named_before_anything_is_computed(project: Project) -> None:
    with disk(project, "ro,size=64m") as folder:
        answer = project.type("export", "tiny", "--to", "gguf", "--output", "disk/out").expect(4)
        assert answer.codes == ["machine.output-not-writable"] and "cannot write the export" in answer.err
        assert "comparing" not in answer.err and not list(folder.iterdir())


def as_pickle(folder: Path, name: str) -> None:
    """The weights in the older form of PyTorch, which may run code when it is loaded."""
    (path,) = folder.glob("*.safetensors")
    torch.save(load_file(path), folder / name)
    path.unlink()


@pytest.mark.parametrize("to", ["merged", "gguf"])
def test_weights_in_pickle_are_refused_by_their_name(project: Project, to: str) -> None:
    as_pickle(project.folder / "data/models/base/tiny", "pytorch_model.bin")
    for model in ("tiny", "data/models/base/tiny"):
        answer = project.type("export", model, "--to", to, "--output", "out").expect(2)
        assert answer.codes == ["model.pickled-weights"] and "(pytorch_model.bin)" in answer.err
    assert not list(project.folder.glob("out*"))


def test_an_adapter_on_a_base_in_pickle_is_refused(project: Project) -> None:
    base = project.folder / "data/models/base/tiny"
    save_adapter(base, project.folder / "adapter", r=4, lora_alpha=8)
    as_pickle(base, "pytorch_model.bin")
    answer = project.type("export", "adapter", "--to", "merged", "--output", "out").expect(2)
    assert answer.codes == ["model.pickled-weights"] and "(pytorch_model.bin)" in answer.err
    assert not list(project.folder.glob("out*"))


@pytest.mark.parametrize(
    "words",
    [
        ("export", "adapter", "--to", "adapter", "--output", "out"),
        ("export", "adapter", "--to", "merged", "--output", "out"),
        ("chat", "adapter", "--prompt", "Hello"),
        ("train", "chats.jsonl", "--from-adapter", "adapter"),
    ],
    ids=lambda words: " ".join(words[::3]),
)
def test_an_adapter_in_pickle_is_never_opened(project: Project, words: tuple[str, ...]) -> None:
    adapter = save_adapter(project.folder / "data/models/base/tiny", project.folder / "adapter", r=4, lora_alpha=8)
    as_pickle(adapter, "adapter_model.bin")
    answer = project.type(*words).expect(2)
    assert answer.codes == ["model.pickled-weights"] and "(adapter_model.bin)" in answer.err
    assert not list(project.folder.glob("out*"))


def test_an_adapter_without_weights_is_refused(project: Project) -> None:
    adapter = save_adapter(project.folder / "data/models/base/tiny", project.folder / "adapter", r=4, lora_alpha=8)
    (adapter / "adapter_model.safetensors").unlink()
    assert project.type("export", "adapter", "--to", "merged", "--output", "out").expect(2).codes == ["model.no-weights"]
    assert not list(project.folder.glob("out*"))


def test_a_run_without_a_final_model_is_exported_from_its_newest_checkpoint_which_is_named(project: Project) -> None:
    """As a run is that still trains, or was killed."""
    answer = project.type("train", "chats.jsonl", "--max-steps", "2", at=[("llamahome.pipeline:write_chosen", 1, ["SIGKILL"])])
    assert answer.status != 0 and not (project.run.root / "final").exists()
    step = project.run.checkpoints[-1]
    answer = project.type("export", "latest", "--to", "merged", "--quant", "f32", "--output", "out").expect(0)
    assert f"has no final model yet; its checkpoint-{step} is used" in answer.err
    assert f"| steps | {step} |" in (project.folder / "out/README.md").read_text()


def test_a_run_without_any_checkpoint_is_refused(project: Project) -> None:
    project.type("train", "chats.jsonl", "--max-steps", "1").expect(0)
    root = project.run.root.resolve()
    for path in [root / "final", *root.glob("checkpoint-*")]:
        shutil.rmtree(path)
    answer = project.type("export", "latest", "--to", "merged", "--output", "out")
    assert answer.status == 7 and answer.codes == ["checkpoint.none"]
    assert not [path for path in project.folder.glob("out*") if path.name != "output"]
