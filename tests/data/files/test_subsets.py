"""Subsets in file names are separated if the names leave no doubt; otherwise they are read together and a note says so."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from llamahome.data.files.locate import locate
from llamahome.data.files.splits import TO_TRAIN, Wanted
from llamahome.errors import DataError


def read(folder: Path, names: Iterable[str], wanted: Wanted = TO_TRAIN) -> tuple[list[str], str]:
    """The names of the files that are read, and the notes."""
    for name in names:
        (folder / name).write_text(json.dumps({"text": name}) + "\n")
    notes: list[str] = []
    return [Path(file).name for file in locate(str(folder), say=notes.append, wanted=wanted).files], "\n".join(notes)


CERTAIN = [
    (["en.train.jsonl", "de.train.jsonl"], "de", "en"),
    (["train_sft.jsonl", "train_prefs.jsonl"], "prefs", "sft"),
    (["main_train.jsonl", "socratic_train.jsonl", "main_test.jsonl", "socratic_test.jsonl"], "main", "socratic"),
    (["train.a.csv.gz", "train.b.csv.gz", "dev.a.csv.gz", "dev.b.csv.gz"], "a", "b"),
]


@pytest.mark.parametrize(("names", "one", "other"), CERTAIN)
def test_certain_subsets_are_refused_with_their_names_and_the_hint_reads_one_or_all(
    names: list[str], one: str, other: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, names)
    (problem,) = caught.value.problems
    assert problem.code == "data.several-subsets" and f"{one}, {other}" in problem.message
    assert f"data.subset={one} " in str(problem.hint)
    train = [name for name in names if "train" in name]
    assert read(tmp_path, names, Wanted(subset=one))[0] == [name for name in train if one in name.replace("train", "").split(".csv")[0]]
    assert read(tmp_path, names, Wanted(subset="all"))[0] == sorted(train)


@pytest.mark.parametrize("names", [["main_train.jsonl", "socratic_train.jsonl"], ["a_train.jsonl", "b-train.jsonl", "a-test.jsonl"]])
def test_uncertain_subsets_are_read_together_and_a_note_shows_a_setting_that_reads_one(names: list[str], tmp_path: Path) -> None:
    files, notes = read(tmp_path, names)
    train = sorted(name for name in names if "train" in name)
    assert files == train and "are read together" in notes
    one = notes.partition("--set data.subset=")[2].split()[0]
    assert read(tmp_path, names, Wanted(subset=one))[0] == [name for name in train if name.startswith(one)]


@pytest.mark.parametrize(
    "names",
    [
        ["train.jsonl", "train2.jsonl", "extra.jsonl"],
        ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"],
        ["train_2023.jsonl", "train_2024.jsonl"],
        ["train-part1.jsonl", "train-part2.jsonl"],
        ["train.jsonl", "train_extra.jsonl"],
    ],
)
def test_shards_parts_and_numbers_are_no_subsets(names: list[str], tmp_path: Path) -> None:
    assert read(tmp_path, names) == (sorted(names), "")
