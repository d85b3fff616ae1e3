"""Files from strangers: pickles under every name run no code, and no file leads out of its folder or fills the disk.

tests/test_architecture.py walks the source for everything that could unpickle.
"""

import gzip
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tests.support.checkpoints import save_step
from tests.support.models import save_tiny
from tests.support.tokenizers import save_tokenizer

from llamahome.checkpoint import manifest
from llamahome.checkpoint.store import load
from llamahome.data.files import spool
from llamahome.data.files.guarded_file import ReaderLimits
from llamahome.data.files.kinds import ENDINGS
from llamahome.data.files.locate import locate
from llamahome.data.files.sources import Source
from llamahome.data.text.tokens import load_tokenizer
from llamahome.errors import CheckpointError, ConfigError, DataError, MachineError
from llamahome.model.adapter import open_trained
from llamahome.model.load import find_model, load_model
from llamahome.rundir import RunPaths


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


@pytest.fixture
def pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A pickle that would show that it was opened; at the end it must not have been, and no reader of pickles may have been called."""
    marker = tmp_path / "the payload ran"
    content = pickle.dumps(Payload(marker))
    pickle.loads(content)  # noqa: S301 (our own, to see that it works)
    assert marker.is_dir()
    marker.rmdir()
    called: list[str] = []
    for module, name in ((torch, "load"), (np, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, _recorded(f"{module.__name__}.{name}", called))
    yield content
    assert not marker.exists() and called == []


def _recorded(name: str, called: list[str]) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        called.append(name)
        raise ValueError(f"{name} was called")

    return call


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "model.pt", "model-00001-of-00001.safetensors"])
def test_a_pickled_base_is_refused(name: str, pickled: bytes, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickled)
    with pytest.raises(ConfigError, match=r"pickled .*and are not opened|no safetensors file|cut short") as caught:
        load_model(find_model(str(folder), say=print), dtype=torch.float32, device=torch.device("cpu"))
    assert caught.value.problems[0].code in ("model.pickled-weights", "model.unreadable")


def test_pickles_beside_the_files_of_a_model_are_not_opened(pickled: bytes, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "vocab.pkl", "tokenizer.model", "spiece.model"):
        (folder / name).write_bytes(pickled)
    load_model(find_model(str(folder), say=print), dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize("listed", ["pytorch_model.bin", "../outside.safetensors", "/etc/hostname"])
def test_an_index_of_weights_names_only_safetensors_files_of_its_folder(listed: str, pickled: bytes, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base")
    shutil.copy(folder / "model.safetensors", tmp_path / "outside.safetensors")
    (folder / "pytorch_model.bin").write_bytes(pickled)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": listed}}))
    with pytest.raises(ConfigError, match=r"names files that are no \.safetensors files of this folder"):
        find_model(str(folder), say=print)


def test_a_pickled_adapter_is_refused(pickled: bytes, tmp_path: Path) -> None:
    base, adapter = save_tiny(tmp_path / "base"), tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "base_model_name_or_path": str(base), "task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    for name, code in ((None, "model.no-weights"), ("adapter_model.bin", "model.pickled-weights"), ("adapter_model.safetensors", None)):
        if name is not None:
            (adapter / name).write_bytes(pickled)
        with pytest.raises(ConfigError) as caught:
            open_trained(adapter, dtype=torch.float32, device=torch.device("cpu"), say=print)
        assert code is None or caught.value.problems[0].code == code


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.pkl", "tokenizer_config.json"])
def test_a_pickled_tokenizer_is_refused(name: str, pickled: bytes, tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / name).write_bytes(pickled)
    with pytest.raises(ConfigError, match="no-tokenizer"):
        load_tokenizer(tmp_path)


def test_code_beside_a_tokenizer_is_not_run(pickled: bytes, tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    marker = tmp_path / "the code ran"
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass Evil: pass\n")
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    try:
        load_tokenizer(tmp_path)
    except ConfigError as error:
        assert error.problems[0].code == "model.no-tokenizer"
    assert not marker.exists()


@pytest.mark.parametrize("ending", [*ENDINGS, ".gz", ".zst", ".jsonl.gz", ".json", ""])
def test_a_pickle_under_the_name_of_data_is_refused(ending: str, pickled: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(f"rows{ending}").write_bytes(gzip.compress(pickled) if ending == ".jsonl.gz" else pickled)
    with pytest.raises(DataError):
        Source((f"rows{ending}",))


@pytest.mark.parametrize("ending", [".pkl", ".pickle", ".npz", ".npy", ".pt", ".pth", ".bin", ".yaml", ".joblib", ".ckpt", ".h5"])
def test_files_that_hold_pickles_are_no_data(ending: str, pickled: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(f"rows{ending}").write_bytes(pickled)
    with pytest.raises(DataError):
        locate(f"rows{ending}")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_pickled_metadata_of_a_table_is_not_opened(kind: str, pickled: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    planted = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickled}
    schema = pa.schema([pa.field("text", pa.string(), metadata=planted)], metadata={b"pandas": pickled, **planted})
    table = pa.table({"text": ["a harmless row"]}, schema=schema)
    if kind == "parquet":
        pq.write_table(table, "rows.parquet")
    else:
        with pa.ipc.new_file("rows.arrow", schema) as writer:
            writer.write_table(table)
    rows = Source((f"rows.{kind}",))
    assert rows.row(0).value == {"text": "a harmless row"}


def _run_with_a_checkpoint(folder: Path) -> tuple[RunPaths, Path]:
    folder.mkdir()
    run = RunPaths(folder, "20260101-000000-brisk-otter")
    return run, save_step(run, 1)


def _seal_again(checkpoint: Path) -> None:
    (checkpoint / manifest.NAME).unlink()
    manifest.seal(checkpoint, run_id="20260101-000000-brisk-otter", step=1, fingerprints=manifest.Fingerprints("d" * 64, "b" * 64))


@pytest.mark.parametrize("name", ["optimizer/optimizer.safetensors", "optimizer/optimizer.json", "trainer_state.json", manifest.NAME])
def test_a_pickle_in_a_checkpoint_is_refused_even_if_its_manifest_is_right(name: str, pickled: bytes, tmp_path: Path) -> None:
    _, checkpoint = _run_with_a_checkpoint(tmp_path / "run")
    (checkpoint / name).write_bytes(pickled)
    if name != manifest.NAME:
        _seal_again(checkpoint)
    with pytest.raises(CheckpointError) as caught:
        load(checkpoint)
    assert "was called" not in str(caught.value)


@pytest.mark.parametrize("part", ["config.yaml", "optimizer"])
def test_a_link_out_of_a_checkpoint_is_refused_even_if_what_it_shows_is_right(part: str, tmp_path: Path) -> None:
    _, checkpoint = _run_with_a_checkpoint(tmp_path / "run")
    (checkpoint / part).rename(tmp_path / "outside")
    (checkpoint / part).symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="link to a file outside of the checkpoint"):
        load(checkpoint)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "model/../../outside"])
def test_a_manifest_cannot_name_files_outside_of_its_folder(name: str, tmp_path: Path) -> None:
    _, checkpoint = _run_with_a_checkpoint(tmp_path / "run")
    known = manifest.read(checkpoint)
    planted = {**known.files, name: manifest.FileRecord(1, "0" * 64)}
    text = manifest.render(manifest.Manifest(known.run_id, 1, known.fingerprints, known.versions, planted))
    (checkpoint / manifest.NAME).write_bytes(text)
    with pytest.raises(CheckpointError, match="a field is missing or has a wrong type"):
        load(checkpoint)


@pytest.mark.parametrize("packed", ["gz", "zst"])
def test_an_archive_that_unpacks_to_more_than_the_disk_holds_leaves_the_disk_as_it_was(
    packed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pa.OSFile(f"bomb.jsonl.{packed}", "wb") as raw, pa.CompressedOutputStream(raw, {"gz": "gzip", "zst": "zstd"}[packed]) as stream:
        for _ in range(64):
            stream.write(b" " * (1 << 20))
    assert Path(f"bomb.jsonl.{packed}").stat().st_size < 1 << 20
    written: list[int] = []

    def usage(folder: Any) -> Any:
        written.append(sum(path.stat().st_size for path in Path(folder).glob("*.tmp")))
        return shutil._ntuple_diskusage(1 << 40, 0, (16 << 20) - written[-1])

    monkeypatch.setattr(spool.shutil, "disk_usage", usage)
    with pytest.raises(MachineError, match="no room for a copy"):
        Source((f"bomb.jsonl.{packed}",), limits=ReaderLimits(free_disk=4 << 20))
    assert 0 < max(written) <= 14 << 20
    assert [path.name for path in (tmp_path / spool.PROCESSED_DATA / "spool").iterdir() if not path.name.endswith(".lock")] == []
