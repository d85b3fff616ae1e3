"""Only the right split is read, however it is named; folders without splits are read whole; notes say what is read and left alone."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.tokenizers import train_tokenizer

from llamahome.config.load import load_config
from llamahome.config.schema import DataConfig
from llamahome.data.files.locate import Located, locate
from llamahome.data.files.split_files import role_of
from llamahome.data.files.splits import TO_TRAIN, Wanted, to_evaluate, to_measure, to_train
from llamahome.data.prepare import prepare, read_all
from llamahome.data.steps.mixture import order_of
from llamahome.data.text.tokens import ChatTokenizer
from llamahome.errors import DataError, Problem

README = """---
configs:
- config_name: en
  default: true
  data_files:
  - {split: train, path: "e/t*.jsonl"}
  - {split: test, path: [e/x.jsonl]}
- config_name: fr
  data_dir: f
  data_files:
  - {split: train, path: "**"}
---
# Rows
"""
SHARD = "{}-00000-of-00001.jsonl"
TRAIN, DEV, TEST = (SHARD.format(split) for split in ("train", "validation", "test"))


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(names: Iterable[str], folder: str = "d", others: Mapping[str, str] | None = None) -> str:
    """A folder of these files, each with a row that says its name; `others` have a text of their own."""
    for name, text in {**{name: json.dumps({"text": name}) for name in names}, **(others or {})}.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return folder


def inside(files: Iterable[str], folder: str = "d") -> list[str]:
    return sorted(Path(file).relative_to(folder).as_posix() for file in files)


def chosen(names: Iterable[str], wanted: Wanted = TO_TRAIN, **others: str) -> tuple[list[str], list[str], list[str]]:
    """What is read, there to evaluate on, and left alone."""
    located = locate(make(names, others=others), wanted=wanted)
    return inside(located.files), inside(located.evaluation), inside(file for _, files in located.apart for file in files)


def refused(names: Iterable[str], wanted: Wanted = TO_TRAIN, **others: str) -> Problem:
    with pytest.raises(DataError) as caught:
        chosen(names, wanted, **others)
    (problem,) = caught.value.problems
    return problem


def saved(split: str, rows: int, *, leftover: bool = False) -> None:
    """A split as `save_to_disk` leaves it; `leftover` adds a file of an earlier map."""
    folder = Path("d", split)
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist([{"prompt": f"{split} {n}", "completion": "yes"} for n in range(rows)])
    for name in ("data-00000-of-00001.arrow", *(["cache-0123456789abcdef.arrow"] if leftover else [])):
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": split}))


SPLIT = [
    (["train.jsonl", "test.jsonl"], ["train.jsonl"], [], ["test.jsonl"]),
    (["train.csv", "validation.csv"], ["train.csv"], ["validation.csv"], []),
    (["Train.jsonl", "VALID.jsonl"], ["Train.jsonl"], ["VALID.jsonl"], []),
    (["a_train.jsonl", "b-train.jsonl", "a-test.jsonl"], ["a_train.jsonl", "b-train.jsonl"], [], ["a-test.jsonl"]),
    (["train-v1.1.json", "dev-v1.1.json"], ["train-v1.1.json"], ["dev-v1.1.json"], []),
    (["training.jsonl.gz", "eval.json"], ["training.jsonl.gz"], ["eval.json"], []),
    (["train/a.jsonl", "train/b.jsonl", "test/a.csv", "dev/a.tsv"], ["train/a.jsonl", "train/b.jsonl"], ["dev/a.tsv"], ["test/a.csv"]),
    ([f"data/{TRAIN}", f"data/{DEV}"], [f"data/{TRAIN}"], [f"data/{DEV}"], []),
    ([f"snapshots/0a/{TRAIN}", f"snapshots/0a/{TEST}"], [f"snapshots/0a/{TRAIN}"], [], [f"snapshots/0a/{TEST}"]),
    (["rows.jsonl", "test.jsonl"], ["rows.jsonl"], [], ["test.jsonl"]),
    (["my_train/a.jsonl", "my_test/a.jsonl"], ["my_train/a.jsonl"], [], ["my_test/a.jsonl"]),
    (["train_times/train.jsonl", "train_times/test.jsonl"], ["train_times/train.jsonl"], [], ["train_times/test.jsonl"]),
    (["all/partial-train/0.parquet", "all/test/0.parquet"], ["all/partial-train/0.parquet"], [], ["all/test/0.parquet"]),
]


@pytest.mark.parametrize(("names", "read", "evaluated", "left"), SPLIT)
def test_only_train_is_read_if_names_tell_the_splits(names: list[str], read: list[str], evaluated: list[str], left: list[str]) -> None:
    assert chosen(names) == (read, evaluated, left)
    notes: list[str] = []
    located = locate("d", say=notes.append)
    assert len(notes) == 1 and "is read" in notes[0] and ("left alone" in notes[0]) == bool(left)
    assert ("to evaluate on" in notes[0]) == bool(evaluated) and located.ignored == ()


WHOLE = [
    ["latest.jsonl", "contest.jsonl", "training_data.jsonl", "testimonials.jsonl"],
    ["train.jsonl", "latest.jsonl"],
    ["greatest.jsonl", "attestation.jsonl", "developer.jsonl", "evaluator.jsonl", "trainer.jsonl"],
    ["rows.jsonl", "dev_notes.jsonl"],
    ["test.jsonl"],
    ["validation/a.jsonl", "validation/b.jsonl"],
    ["dev.jsonl", "test.jsonl"],
    ["en/train.jsonl", "de/train.jsonl"],
    ["part-00000-of-00002.jsonl", "part-00001-of-00002.jsonl"],
]


@pytest.mark.parametrize("names", WHOLE)
def test_a_folder_without_splits_is_read_whole(names: list[str]) -> None:
    assert chosen(names) == (sorted(names), [], [])


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from("b-xyz"), st.sampled_from(["train", "test", "dev", "val", "valid", "eval"]), st.sampled_from(["", "q", "qs", "_rows"])
)
def test_a_split_is_a_whole_word_of_a_name(before: str, word: str, after: str) -> None:
    whole = before == "-" and not after.startswith("q")
    assert (role_of(before + word + after) is not None) == whole


def test_a_named_file_and_a_glob_are_read_whole() -> None:
    make(["train.jsonl", "test.jsonl"])
    assert inside(locate("d/test.jsonl").files) == ["test.jsonl"]
    assert inside(locate("d/*.jsonl").files) == ["test.jsonl", "train.jsonl"]
    assert inside(locate(["d/test.jsonl", "d"]).files) == ["test.jsonl", "train.jsonl"]


def test_a_file_without_split_beside_train_and_test_is_reported() -> None:
    assert chosen(["train.jsonl", "test.jsonl", "all.jsonl"]) == (["train.jsonl"], [], ["test.jsonl"])
    assert inside(locate("d").ignored) == ["all.jsonl"]


def test_the_setting_chooses_a_split_by_its_name_or_its_usual_one() -> None:
    names = ["train.jsonl", "dev.jsonl", "test.jsonl"]
    assert chosen(names, Wanted("test")) == (["test.jsonl"], ["dev.jsonl"], ["train.jsonl"])
    assert chosen(names, Wanted("validation"))[0] == chosen(names, Wanted("dev"))[0] == ["dev.jsonl"]
    assert chosen(names, Wanted("all"))[0] == sorted(names)
    problem = refused(names, Wanted("tests"))
    assert problem.code == "data.unknown-split" and "there are dev" not in problem.message and problem.hint == "--set data.split=test"
    with pytest.raises(DataError, match="there is no split test; there are none"):
        locate("d/train.jsonl", wanted=Wanted("test"))


def test_the_hint_of_a_split_error_fixes_it() -> None:
    for names, wanted in (
        (["en/train.jsonl", "de/train.jsonl", "de/test.jsonl"], TO_TRAIN),
        (["en/train.jsonl", "de/train.jsonl"], Wanted(subset="fr")),
        (["train.jsonl", "test.jsonl"], Wanted("tast")),
        (["a.jsonl"], Wanted("test")),
        ([f"data/{SHARD.format(split)}" for split in ("train_sft", "train_gen", "test_sft")], TO_TRAIN),
    ):
        problem = refused(names, wanted)
        assert problem.hint is not None
        key, value = problem.hint.split("   ")[0].removeprefix("--set ").split("=")
        given_ = {f"data.{name}": each for name in ("split", "subset") if (each := getattr(wanted, name)) is not None}
        typed = load_config(assignments=[f"{name}={each}" for name, each in {**given_, key: value}.items()]).config.data
        assert locate("d", wanted=to_train(typed)).files
        for path in sorted(Path("d").rglob("*.jsonl")):
            path.unlink()


def test_subsets_are_chosen_or_refused_unless_one_is_the_default() -> None:
    names = [f"{folder}/{SHARD.format(split)}" for folder in ("de", "en") for split in ("train", "test")]
    problem = refused(names)
    assert problem.code == "data.several-subsets" and "de, en" in problem.message
    assert chosen(names, Wanted(subset="EN"))[0] == [names[2]]
    assert chosen(names, Wanted(subset="all"))[::2] == ([names[0], names[2]], [names[1], names[3]])
    assert chosen([*names, SHARD.format("train")])[0] == [SHARD.format("train")]


def test_the_readme_of_a_data_set_names_its_files() -> None:
    names = ["e/t1.jsonl", "e/x.jsonl", "f/a.jsonl", "f/deep/b.jsonl", "other.jsonl"]
    assert chosen(names, **{"README.md": README}) == (["e/t1.jsonl"], [], ["e/x.jsonl"])
    assert chosen(names, Wanted(subset="fr"), **{"README.md": README}) == (["f/a.jsonl", "f/deep/b.jsonl"], [], [])
    plain = "---\nconfigs:\n- config_name: default\n  data_files: 'e/*'\n---\n"
    assert chosen(names, **{"README.md": plain})[0] == ["e/t1.jsonl", "e/x.jsonl"]
    for broken in ("---\nconfigs: [\n---\n", "---\nconfigs: 7\n---\n", "---\nconfigs:\n- data_files: {a: 1}\n---\n", "# only words"):
        assert chosen(names, **{"README.md": broken})[0] == names


def test_what_save_to_disk_wrote_is_read_without_leftovers_and_whole_or_not_at_all() -> None:
    for split, rows in (("train", 5), ("validation", 2), ("test", 3)):
        saved(split, rows, leftover=True)
    Path("d/dataset_dict.json").write_text('{"splits": ["train", "validation", "test"]}')
    located = locate("d")
    name = "data-00000-of-00001.arrow"
    assert [inside(part) for part in (located.files, located.evaluation)] == [[f"train/{name}"], [f"validation/{name}"]]
    assert inside(locate("d/test").files) == [f"test/{name}"]
    Path("d/train", name).unlink()
    with pytest.raises(DataError, match="names this file of the data set, and it is not there"):
        locate("d")


def test_a_finished_model_is_measured_on_test_and_a_run_evaluates_on_validation() -> None:
    make(["train.jsonl", "dev.jsonl", "test.jsonl"])
    data = DataConfig()
    assert inside(locate("d", wanted=to_measure(data)).files) == ["test.jsonl"]
    assert inside(locate("d", wanted=to_evaluate(data)).files) == ["dev.jsonl"]
    assert inside(locate("d", wanted=to_evaluate(DataConfig(split="train"))).files) == ["dev.jsonl"]
    assert inside(locate("d", wanted=to_measure(DataConfig(split="train"))).files) == ["train.jsonl"]


def rows(name: str, numbers: range) -> None:
    text = "".join(json.dumps({"prompt": f"What is {n}?", "completion": f"It is {n}."}) + "\n" for n in numbers)
    Path("d").mkdir(exist_ok=True)
    Path("d", name).write_text(text)


def test_a_run_trains_on_train_evaluates_on_validation_and_reports_rows_in_two_splits() -> None:
    rows("train.jsonl", range(20))
    rows("dev.jsonl", range(18, 24))
    rows("test.jsonl", range(17, 18))
    tokenizer = ChatTokenizer(train_tokenizer())
    notes: list[str] = []
    prepared = prepare(DataConfig(), "d", tokenizer, say=notes.append)
    assert (prepared.order.epoch_rows, len(prepared.evaluation_hashes)) == (20, 6)
    lines = prepared.report.lines()
    assert any(
        line.startswith("2 rows to train on that are in the evaluation") and "d/train.jsonl:19 is d/dev.jsonl:1" in line for line in lines
    )
    assert any("1 row to train on in the split test too, for example d/train.jsonl:18 is d/test.jsonl:1" in line for line in lines)
    streamed = prepare(DataConfig(streaming=True), "d", tokenizer, say=notes.append)
    assert streamed.fingerprint == prepared.fingerprint and len(streamed.evaluation_hashes) == 6
    streamed.close()
    given_ = prepare(DataConfig(eval_path="d/dev.jsonl"), "d/train.jsonl", tokenizer, say=notes.append)
    assert given_.fingerprint == prepared.fingerprint, "a split that is found equals one that is given"
    held = prepare(DataConfig(eval_split=0.3), "d", tokenizer, say=notes.append)
    assert held.order.epoch_rows < 20 and "data.eval_split is 0.3, so the validation split is left alone" in notes
    assert read_all(DataConfig(), "d", tokenizer, say=notes.append).counts.rows == 1
    for one in (prepared, given_, held):
        one.close()


def test_the_store_of_one_split_outlives_that_of_another() -> None:
    rows("train.jsonl", range(8))
    rows("test.jsonl", range(8, 11))
    tokenizer = ChatTokenizer(train_tokenizer())
    first = prepare(DataConfig(), "d", tokenizer, say=lambda _: None)
    read_all(DataConfig(), "d", tokenizer, say=lambda _: None)
    assert first.folder is not None and first.folder.is_dir()
    first.close()


def test_a_mixture_names_the_split_that_is_read_by_its_folder() -> None:
    rows("train.jsonl", range(4))
    rows("test.jsonl", range(4, 6))
    prepared = prepare(DataConfig(split="test"), "d", ChatTokenizer(train_tokenizer()), say=lambda _: None)
    order = order_of(prepared.reading.source, prepared.order.held, {"d": 3})
    assert order.epoch_rows == 6
    prepared.close()


def test_parquet_by_split_is_read_like_lines() -> None:
    for split, count in (("train", 3), ("test", 2)):
        Path("d/data").mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist([{"text": f"{split} {n}"} for n in range(count)])
        pq.write_table(table, f"d/data/{split}-00000-of-00001.parquet")
    assert isinstance(locate("d"), Located) and inside(locate("d").files) == ["data/train-00000-of-00001.parquet"]


@pytest.mark.parametrize("test", ["holdout.jsonl", "heldout/rows.jsonl", "my_holdout_v2.jsonl"])
def test_held_out_rows_are_a_test_split(test: str) -> None:
    located = locate(make(["train.jsonl", test]))
    assert inside(located.files) == ["train.jsonl"] and [split for split, _ in located.apart] == ["test"]


@pytest.mark.parametrize(
    "configs",
    [
        "configs:\n- config_name: default\n  data_files: {train: a.jsonl, test: b.jsonl}\n",
        "configs:\n  config_name: default\n  data_files:\n  - {split: train, path: a.jsonl}\n  - {split: test, path: b.jsonl}\n",
    ],
)
def test_splits_in_a_readme_are_read_in_other_forms_too(configs: str) -> None:
    located = locate(make(["a.jsonl", "b.jsonl"], others={"README.md": f"---\n{configs}---\n"}))
    assert inside(located.files) == ["a.jsonl"] and [split for split, _ in located.apart] == ["test"]
