"""What a form may hold, and which words become of it."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from llamahome.dashboard.commands import Form, RefusedForm, must_be_fetched, read_form
from llamahome.dashboard.uploads import RefusedUpload, safe_name

MODELS = ["smollm2-135m-instruct"]
FORM = {"data": "chats.jsonl", "model": MODELS[0], "method": "lora"}


@pytest.mark.parametrize("name", ["a/b.jsonl", "a\\b.jsonl", "..", ".a.jsonl", "a\n.jsonl", "x" * 101 + ".jsonl", "", "a.exe", "a"])
def test_a_name_that_is_no_plain_name_of_rows_is_refused(name: str) -> None:
    with pytest.raises(RefusedUpload):
        safe_name(name)


@pytest.mark.parametrize("name", ["--a.jsonl", "-rf.csv", "a;b.jsonl", "$(x).jsonl", "a b.jsonl.gz", "é.parquet"])
def test_a_safe_name_needs_no_quotes_and_is_no_option(name: str) -> None:
    assert re.fullmatch(r"\w[\w.-]*", safe_name(name))


def test_the_fields_become_the_words_that_one_types() -> None:
    form = Form("my rows.jsonl", "tiny", "full", "2", "30", "1e-4", "training.batch_size=8\n\n lora.rank=4 ")
    sets = ["--set", "training.batch_size=8", "--set", "lora.rank=4"]
    course = ["--model", "tiny", "--method", "full", "--epochs", "2", "--max-steps", "30", "--set", "training.learning_rate=1e-4", *sets]
    assert form.train() == ["train", "my rows.jsonl", *course] and form.plan() == ["plan", "my rows.jsonl", *course]
    assert form.check() == ["data", "check", "my rows.jsonl", "--model", "tiny", *sets]
    assert Form("--config=/etc/passwd").train()[1] == "./--config=/etc/passwd"


def test_only_the_starter_is_fetched_before_anything_else_and_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert must_be_fetched(MODELS[0]) and not must_be_fetched("org/name")
    assert Form(model=MODELS[0]).fetch() == ["models", "fetch", MODELS[0]]
    (tmp_path / "data/models/base" / MODELS[0]).mkdir(parents=True)
    (tmp_path / "data/models/base" / MODELS[0] / "config.json").write_text("{}")
    assert not must_be_fetched(MODELS[0])


def test_a_field_is_only_ever_the_value_of_its_option() -> None:
    odd = {field.name: "$(touch x); `y` | z" for field in fields(Form)} | {"method": "lora", "model": MODELS[0]}
    form = read_form({**odd, "epochs": "", "max_steps": "", "learning_rate": ""}, models=MODELS, confined=False)
    assert form.train() == ["train", odd["data"], "--model", MODELS[0], "--method", "lora", "--set", odd["settings"]]


FROM_AFAR = (
    {"data": "../secret.jsonl"},
    {"data": "/etc/passwd"},
    {"data": "~/secret.jsonl"},
    {"data": "link.jsonl"},
    {"data": "org/name"},
    {"settings": "monitoring.notify=touch x"},
    {"settings": "evaluation.metric=/tmp/evil.py:run"},
    {"settings": "training.epochs=1\nmodel.name=/etc"},
    {"settings": "output.dir=/tmp/x"},
    {"settings": "data.eval_path=/etc/passwd"},
    {"settings": "evaluation={metric: evil.py:run}"},
    {"settings": " monitoring . notify = x"},
)


@pytest.mark.parametrize("changed", FROM_AFAR, ids=str)
def test_other_machines_choose_neither_files_elsewhere_nor_commands(
    changed: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "secret.jsonl").write_text("{}\n")
    (tmp_path / "home/chats.jsonl").write_text("{}\n")
    (tmp_path / "home/link.jsonl").symlink_to("../secret.jsonl")
    monkeypatch.chdir(tmp_path / "home")
    usual = {**FORM, "settings": "training.batch_size=4\ndata.max_length=64"}
    assert read_form(usual, models=MODELS, confined=True).data == "chats.jsonl"
    with pytest.raises(RefusedForm, match="Other machines"):
        read_form({**usual, **changed}, models=MODELS, confined=True)
    read_form({**usual, **changed}, models=MODELS, confined=False)
