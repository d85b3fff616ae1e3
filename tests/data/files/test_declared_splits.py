"""What a data set declares about its splits holds however it is written, and what it declares and lacks is an error or a note."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from llamahome.data.files.locate import Located, locate
from llamahome.data.files.splits import Wanted
from llamahome.errors import DataError

TWO = "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: TRAIN}\n  - {split: test, path: TEST}\n---\n"


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def made(*names: str, **others: str) -> str:
    """A folder of these files, a row in each; `readme` and `dict` are the text of README.md and dataset_dict.json."""
    texts = {name: json.dumps({"text": name}) for name in names}
    texts |= {{"readme": "README.md", "dict": "dataset_dict.json"}[name]: text for name, text in others.items()}
    for name, text in texts.items():
        path = Path("d", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return "d"


def parts(located: Located) -> Mapping[str, list[str]]:
    found = {"read": located.files, "evaluated": located.evaluation, **dict(located.apart)}
    return {name: sorted(Path(file).relative_to("d").as_posix() for file in files) for name, files in found.items() if files}


@pytest.mark.parametrize("before", ["\ufeff", ""])
@pytest.mark.parametrize("line_end", ["\r\n", "\n"])
def test_a_readme_counts_with_a_byte_order_mark_and_any_line_end(before: str, line_end: str) -> None:
    readme = before + TWO.replace("TRAIN", "a.jsonl").replace("TEST", "b.jsonl").replace("\n", line_end)
    assert parts(locate(made("a.jsonl", "b.jsonl", readme=readme))) == {"read": ["a.jsonl"], "test": ["b.jsonl"]}


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("'x/{a,b}.jsonl'", "'x/[cd].jsonl'"),
        ("'x/[!cd].jsonl'", "'x/{c,d}.*'"),
        ("'*/[a-b].json?'", "['x/c.jsonl', x/d.jsonl]"),
        ("'**/{a,[b]}*'", "'x/[c-d]*'"),
    ],
)
def test_every_wildcard_of_a_readme_is_obeyed(train: str, test: str) -> None:
    names = [f"x/{letter}.jsonl" for letter in "abcd"]
    located = locate(made(*names, readme=TWO.replace("TRAIN", train).replace("TEST", test)))
    assert parts(located) == {"read": names[:2], "test": names[2:]}


def test_a_subset_that_names_only_its_folder_has_the_splits_that_the_files_name_and_may_be_the_default() -> None:
    names = [f"{folder}/{split}.jsonl" for folder in ("main", "other") for split in ("test", "train")]
    configs = "- {config_name: main, data_dir: main}\n- {config_name: other, data_dir: ./other/, default: true}\n"
    folder = made(*names, "main2/train.jsonl", readme=f"---\nconfigs:\n{configs}---\n")
    assert parts(locate(folder)) == {"read": ["other/train.jsonl"], "test": ["other/test.jsonl"]}
    assert parts(locate(folder, wanted=Wanted(subset="main"))) == {"read": ["main/train.jsonl"], "test": ["main/test.jsonl"]}
    (Path(folder) / "README.md").write_text("---\nconfigs:\n- {config_name: main, data_dir: main2}\n---\n")
    assert parts(locate(folder)) == {"read": ["main2/train.jsonl"]}


@pytest.mark.parametrize("train", ["a.jsonl", "'a-*'", "[b2.jsonl, a.jsonl]", "a.xlsx"])
def test_a_split_to_read_that_is_declared_and_not_there_is_no_reason_to_read_another(train: str) -> None:
    folder = made("b.jsonl", "b2.jsonl", "a.xlsx", readme=TWO.replace("TRAIN", train).replace("TEST", "b.jsonl"))
    with pytest.raises(DataError) as caught:
        locate(folder)
    (problem,) = caught.value.problems
    words = "no rows are read from it" if train == "a.xlsx" else "it is not there"
    assert problem.code == "data.not-found" and problem.where in ("d/a.jsonl", "d/a-*", "d/a.xlsx") and words in problem.message
    assert parts(locate(folder, wanted=Wanted(split="test")))["read"] == ["b.jsonl"]


def test_a_pattern_beside_another_that_matches_may_match_nothing() -> None:
    readme = TWO.replace("TRAIN", "['a.jsonl', '*.parquet']").replace("TEST", "b.jsonl")
    assert parts(locate(made("a.jsonl", "b.jsonl", readme=readme)))["read"] == ["a.jsonl"]


def test_a_saved_split_that_is_not_there_is_an_error_if_it_is_to_be_read_and_a_note_otherwise() -> None:
    folder = made("validation/x.jsonl", "test/x.jsonl", dict='{"splits": ["train", "validation", "test"]}')
    with pytest.raises(DataError, match=r"dataset_dict\.json names this for the split train, and it is not there"):
        locate(folder)
    made("train/x.jsonl")
    Path("d/validation/x.jsonl").unlink()
    notes: list[str] = []
    assert parts(locate(folder, say=notes.append)) == {"read": ["train/x.jsonl"], "test": ["test/x.jsonl"]}
    assert "validation, which it names for validation, is not there" in notes[0]


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl"], "d/train: 1 of 3 parts missing"),
        (["train-00000-of-00002.jsonl", "test-00000-of-00002.jsonl"], "d/train: 1 of 2 parts missing"),
        (["train-00000-of-00002-0123456789abcdef.jsonl"], "d/train: 1 of 2 parts missing"),
        (["train-00001-of-00002.jsonl", "train-00002-of-00002.jsonl"], None),
        (["train-00000-of-00001.jsonl", "test-00000-of-00002.jsonl"], None),
    ],
)
def test_parts_that_are_missing_from_what_is_read_are_told(names: list[str], missing: str | None) -> None:
    notes: list[str] = []
    locate(made(*names), say=notes.append)
    assert [note for note in notes if "parts missing" in note] == ([f"{missing}, so their rows are not read"] if missing else [])
