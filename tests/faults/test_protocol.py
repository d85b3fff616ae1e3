"""The promises of a save, checked at every file operation, and twenty broken versions of the code that must all be noticed."""

import errno
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.checkpoints import differences, save_step
from tests.support.power import Disk, write_tree

from llamahome import durable
from llamahome.checkpoint import collective_save, manifest, retention, store
from llamahome.checkpoint.store import SaveFailed, choose, load
from llamahome.errors import CheckpointError
from llamahome.rundir import RunPaths

RUN_ID = "20260101-000000-brisk-otter"


def _fresh(folder: Path) -> RunPaths:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    run = RunPaths(folder, RUN_ID)
    for step in (1, 2):
        save_step(run, step)
    return run


def _save_and_retire(run: RunPaths, step: int) -> None:
    save_step(run, step)
    retention.apply(run, keep_last=1, keep_best=0, warn=lambda problem: None)


def _newest(run: RunPaths) -> int:
    """The step that a resume takes; a wrong content raises."""
    saved = load(choose(run, warn=lambda problem: None))
    assert differences(saved) == [], differences(saved)
    return saved.state.step


def power_cuts(folder: Path) -> list[str]:
    """What is wrong on the disks that a power cut before any operation of a save leaves."""
    run = _fresh(folder / "run")
    (run.root / "checkpoint-3.tmp").mkdir()
    (run.root / "checkpoint-3.tmp/stale").write_text("of an earlier save")
    (run.root / "checkpoint-1.tmp").mkdir()
    return _cut_everywhere(run, folder)


def power_cuts_in_a_replacement(folder: Path) -> list[str]:
    """The same for a save of a step whose checkpoint is there but damaged."""
    run = _fresh(folder / "run")
    (save_step(run, 3) / "config.yaml").unlink()
    return _cut_everywhere(run, folder, replaced="checkpoint-3")


def _cut_everywhere(run: RunPaths, folder: Path, *, replaced: str = "") -> list[str]:
    disk = Disk(run.root)
    with disk.watching():
        _save_and_retire(run, 3)
    found = [f"{path.name} is removed under its own name" for path in disk.removed if path.name[-4:] != ".tmp" and path.name[0] != "."]
    for number, (label, tree) in enumerate(disk.images):
        root = folder / f"image-{number}"
        root.mkdir()
        write_tree(tree, root)
        image = RunPaths(root, RUN_ID)
        replaced_now = not (root / "checkpoint-1").exists()  # retention comes after the rename
        for _, each in image.checkpoints():
            if each.name != replaced or replaced_now:
                found += [f"{label}: {each.name}: {problem.message}" for problem in manifest.verify(each)]
        try:
            step = _newest(image)
        except (CheckpointError, AssertionError, OSError, KeyError) as error:
            found.append(f"{label}: {error!r}")
            continue
        if step < (3 if "the end" in label else 2):
            found.append(f"{label}: only step {step} is left")
    left = sorted(path.name for path in run.root.iterdir())
    return found + ([] if left == ["checkpoint-3"] else [f"left after retention: {left}"])


def failing_operations(folder: Path) -> list[str]:
    """What is wrong after the n-th operation of a save and its retention failed, for every n and two errors."""
    found: list[str] = []
    for code in (errno.EIO, errno.ENOSPC):
        for number in range(300):
            run, failed, said = _fresh(folder / "failing"), [], []
            durable.observer = _failing(number, code, failed)
            try:
                with suppress(SaveFailed):
                    save_step(run, 3)
                    said.append("saved")
                if said:
                    retention.apply(run, keep_last=1, keep_best=0, warn=said.append)
            except OSError as error:
                found.append(f"{failed}: {error!r} is not reported as a failed save")
            finally:
                durable.observer = None
            if not failed:
                break
            found += [f"{failed}: {what}" for what in _after_a_failure(run, saved=bool(said))]
    return found


def _failing(number: int, code: int, failed: list[str]) -> Callable[[str, Path, Path | None], None]:
    seen = itertools.count()

    def fail(operation: str, path: Path, source: Path | None) -> None:
        if next(seen) == number:
            failed.append(f"{operation} {path.name}")
            raise OSError(code, os.strerror(code))

    return fail


def _after_a_failure(run: RunPaths, *, saved: bool) -> list[str]:
    found = []
    try:
        step = _newest(run)
    except (CheckpointError, AssertionError) as error:
        return [repr(error)]
    if step != 3 and (saved or step != 2):
        found.append(f"step {step} is left")
    if not saved and list(run.root.glob("*.tmp")):
        found.append("the partial checkpoint stays")
    _save_and_retire(run, 4)
    if _newest(run) != 4 or sorted(path.name for path in run.root.iterdir()) != ["checkpoint-4"]:
        found.append("the next save is not clean")
    return found


def damages(folder: Path) -> list[str]:
    """What is wrong when one byte of any file of the newest checkpoint is changed, or the file is gone."""
    found = []
    names = sorted(path.relative_to(folder) for path in _fresh(folder).checkpoint(2).rglob("*") if path.is_file())
    for name, gone in itertools.product(names, (False, True)):
        run = _fresh(folder)
        path = folder / name
        content = path.read_bytes()
        path.unlink() if gone else path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        problems: list[object] = []
        chosen = choose(run, warn=problems.append)
        if chosen.name != "checkpoint-1" or not problems:
            found.append(f"{name} {'gone' if gone else 'changed'}: {chosen.name} is taken, {len(problems)} problems are named")
        if retention.apply(run, keep_last=1, keep_best=0, warn=lambda problem: None):
            found.append(f"{name}: an older checkpoint is deleted although the newest is damaged")
    run = _fresh(folder)
    listed = set(manifest.read(run.checkpoint(2)).files)
    present = {path.relative_to(run.checkpoint(2)).as_posix() for path in run.checkpoint(2).rglob("*") if path.is_file()}
    found += [f"the manifest does not list {name}" for name in sorted(present - listed - {manifest.NAME})]
    copy = shutil.copytree(run.checkpoint(1), run.checkpoint(9))
    if choose(run, warn=lambda problem: None) == copy:
        found.append("a copy under a later name is taken for the newest")
    return found


CHECKS = (damages, power_cuts, power_cuts_in_a_replacement, failing_operations)


def broken_promises() -> Iterator[str]:
    """Everything that is wrong; nothing for the code as it is."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch:
        for check in CHECKS:
            folder = Path(scratch, check.__name__)
            folder.mkdir()
            try:
                yield from (f"{check.__name__}: {what}" for what in check(folder))
            except Exception as error:  # noqa: BLE001 (a broken version may fail anywhere)
                yield f"{check.__name__}: {error!r}"


def test_a_save_keeps_its_promises_at_every_operation() -> None:
    assert list(broken_promises()) == []


def _nothing(*_: object, **__: object) -> None:
    """Do nothing."""


def _flush_only(operation: str) -> Callable[[Path], None]:
    return lambda path: durable._observe(operation, path)


def _seal_without(*names: str) -> Callable[..., manifest.Manifest]:
    def seal(folder: Path, **arguments: object) -> manifest.Manifest:
        aside = {name: (folder / name).rename(folder.parent / f"aside-{name}") for name in names}
        made = _SEAL(folder, **arguments)
        for name, path in aside.items():
            path.rename(folder / name)
        return made

    return seal


def _rename_before_the_manifest(folder: Path, **arguments: object) -> manifest.Manifest:
    final = folder.with_name(folder.name.removesuffix(".tmp"))
    durable.rename(folder, final)
    made = _SEAL(final, **arguments)
    shutil.copytree(final, folder)
    return made


def _write_unflushed(path: Path, content: bytes | str) -> None:
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def _rename_unflushed(source: Path, target: Path, *, flush: bool = True) -> None:
    durable._observe("rename", target, source)
    source.replace(target)


def _remove_before(partial: Path, folder: Path) -> None:
    durable.remove_tree(folder)
    durable.rename(partial, folder)


def _remove_unless_partial(folder: Path) -> None:
    if not folder.name.endswith(".tmp"):
        _REMOVE(folder)


def _copy_instead(partial: Path, folder: Path) -> None:
    folder.mkdir()
    for path in sorted(partial.rglob("*")):
        durable._observe("write", folder)
        path.is_dir() and (folder / path.relative_to(partial)).mkdir()
        path.is_file() and shutil.copy(path, folder / path.relative_to(partial))
    durable.flush_tree(folder)
    shutil.rmtree(partial)


def _delete_all_but_the_last(checkpoints: list[tuple[int, float | None]], **_: object) -> list[int]:
    return sorted(step for step, _ in checkpoints)


def _newest_unverified(run: RunPaths, *, warn: object) -> Path:
    return run.checkpoints()[-1][1]


def _oldest(run: RunPaths, *, warn: object) -> Path:
    return run.checkpoints()[0][1]


class _Guard(store.WriteGuard):
    """Swallows the error of a save."""

    def __exit__(self, *error: object) -> bool:
        shutil.rmtree(self.partial, ignore_errors=True)
        return True


class _KeepsPartial(store.WriteGuard):
    """Leaves the partial checkpoint."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise SaveFailed([]) from error


_SEAL, _REMOVE = manifest.seal, durable.remove_folder
MUTATIONS: dict[str, tuple[object, str, object]] = {
    "files are not flushed": (durable, "flush_open", _nothing),
    "folders are not flushed": (durable, "flush_folder", _nothing),
    "the manifest is not flushed": (durable, "write", _write_unflushed),
    "the parent is not flushed after the rename": (durable, "rename", _rename_unflushed),
    "the rename comes before the manifest": (manifest, "seal", _rename_before_the_manifest),
    "the manifest comes before the state": (manifest, "seal", _seal_without("trainer_state.json")),
    "the manifest does not list the settings": (manifest, "seal", _seal_without("config.yaml")),
    "the old checkpoint is removed before the new one is renamed": (durable, "replace_folder", _remove_before),
    "the checkpoint is copied to its name file by file": (durable, "replace_folder", _copy_instead),
    "old checkpoints are removed under their own name": (durable, "remove_folder", durable.remove_tree),
    "old checkpoints are not removed": (durable, "remove_folder", _nothing),
    "a partial checkpoint of an earlier save is not removed": (durable, "remove_folder", _remove_unless_partial),
    "retention deletes the newest": (retention, "which_to_delete", _delete_all_but_the_last),
    "retention does not verify before it deletes": (retention.manifest, "verify", lambda folder: []),
    "only sizes are compared": (manifest, "_wrong_content", manifest._wrong_size),
    "missing files are not noticed": (manifest, "_compare", lambda folder, wrong: []),
    "the newest is taken without a check": (store, "choose", _newest_unverified),
    "the oldest is taken": (store, "choose", _oldest),
    "a failed save is reported as done": (collective_save, "WriteGuard", _Guard),
    "the partial checkpoint of a failed save stays": (collective_save, "WriteGuard", _KeepsPartial),
    "the position is not saved": (collective_save.TrainerState, "to_json", lambda self: _TO_JSON(replace(self, consumed=0))),
    "a copy under another name is believed": (manifest, "_wrong_name", lambda folder, manifest: []),
}
_TO_JSON = collective_save.TrainerState.to_json


@pytest.mark.parametrize("mutation", [pytest.param(mutation, marks=pytest.mark.medium) for mutation in MUTATIONS])
def test_a_broken_protocol_is_noticed(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, broken = MUTATIONS[mutation]
    monkeypatch.setattr(owner, name, broken)
    monkeypatch.setitem(globals(), "choose", store.choose)
    assert next(broken_promises(), None) is not None
