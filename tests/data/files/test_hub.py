"""A data set of the hub is distinguished from a path, needs the extra that the error names, and is read like a file."""

import json
import sys
from pathlib import Path

import pytest

from llamahome.data.files.hub import fetch, is_hub_id
from llamahome.data.files.sources import open_source
from llamahome.data.files.splits import Wanted
from llamahome.errors import DataError, MachineError


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_id_is_distinguished_from_a_path(scratch: Path) -> None:
    (scratch / "data").mkdir()
    ids = ("org/name", "org/name:config", "org/name:config:split", "org/name::test", "Some-Org_1/data.set-v1.2")
    paths = (
        "data/raw",
        "data/mine.jsonl",
        "org/rows.csv",
        "org/a.json.gz",
        "/org/name",
        "./org/name",
        "../org/name",
        "name",
        "a/b/c",
        "org/n me",
    )
    assert [path for path in ids if not is_hub_id(path)] == [] and [path for path in paths if is_hub_id(path)] == []


def test_an_existing_folder_wins_and_a_misspelt_one_is_no_data_set(scratch: Path) -> None:
    (scratch / "org/name").mkdir(parents=True)
    (scratch / "org/name/a.jsonl").write_text('{"text": "x"}')
    assert len(open_source("org/name")) == 1
    with pytest.raises(DataError, match="nearest name there is org/name"):
        open_source("org/nam")


def test_without_the_extra_the_command_that_installs_it_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MachineError) as caught:
        open_source("org/name")
    (problem,) = caught.value.problems
    assert (problem.code, problem.hint, problem.where) == ("machine.extra-missing", "pip install 'llamahome[hub]'", "org/name")


def test_a_data_set_is_read_from_the_arrow_files_of_the_library(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library takes a folder org/name for a data set too, so that no network is needed."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", scratch / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (scratch / "org/name").mkdir(parents=True)
    for split in ("train", "test"):
        (scratch / f"org/name/{split}.jsonl").write_text("".join(json.dumps({"text": f"{split} {number}"}) + "\n" for number in range(3)))
    notes: list[str] = []
    for words, split in (("org/name", "train"), ("org/name:default:test", "test"), ("org/name::test", "test")):
        source = open_source(fetch(words, notes.append).files)
        assert source.row(2).value == {"text": f"{split} 2"} and source.row(2).where.endswith(".arrow:row 3")
    assert "org/name: fetching the split train from the hub" in notes
    assert fetch("org/name", notes.append).apart == (("test", fetch("org/name::test", notes.append).files),)
    assert fetch("org/name", notes.append, Wanted("test")).files == fetch("org/name::test", notes.append).files
    for words in ("org/name::valid", "org/name:other"):
        with pytest.raises(DataError) as caught:
            fetch(words, notes.append)
        assert caught.value.problems[0].code == "data.hub-refused"
    with pytest.raises(MachineError) as refused:
        fetch("no/such", notes.append)
    assert refused.value.problems[0].code == "machine.hub-unreachable"
