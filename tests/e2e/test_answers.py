"""train-eval: figures beside the base, scores of answers, their file, and what is refused before any work."""

import csv
import json
import shlex
from pathlib import Path

import pytest
from tests.support.projects import Answer, Project, chats, write_rows

from llamahome.comparison import compare

KEYS = {"loss", "perplexity", "token_accuracy", "metrics", "base", "difference"}


@pytest.fixture
def tuned(project: Project) -> Project:
    """A project with a run, and eight rows that it has not seen, of which one has no answer."""
    write_rows(project.folder / "test.jsonl", chats(9, seed=5))
    project.type("train", "chats.jsonl", "--max-steps", "6").expect(0)
    return project


def measured(project: Project, *words: str) -> Answer:
    return project.type("train-eval", *words, "--max-new-tokens", "8")


@pytest.mark.medium
def test_a_run_is_measured_beside_its_base_and_all_answers_are_written(tuned: Project) -> None:
    answer = measured(tuned, "latest", "test.jsonl", "--metric", "f1", "--metric", "exact", "--json").expect(0)
    found = answer.json
    assert found.keys() >= KEYS and found["metrics"].keys() == {"f1", "exact"} == found["base"]["metrics"].keys()
    assert found["difference"].keys() == {"loss", "token_accuracy", "f1", "exact"}
    assert all(each.keys() == {"mean", "low", "high", "verdict"} for each in found["difference"].values())
    path = tuned.folder / found["answers"]
    assert path.parent == (tuned.folder / "output/training/answers").resolve() and f"answers: {found['answers']}" in answer.err
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    sources = [json.loads(line)["messages"] for line in (tuned.folder / "test.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(9)) and [row["reference"] for row in rows] == [
        each[-1]["content"] for each in sources
    ]
    assert all(each[0]["content"] in row["prompt"] for row, each in zip(rows, sources, strict=True))
    for name in ("f1", "exact"):
        values, theirs = ([row[key][name] for row in rows] for key in ("scores", "base_scores"))
        assert found["metrics"][name] == pytest.approx(sum(values) / 9) and found["base"]["metrics"][name] == pytest.approx(sum(theirs) / 9)
        assert found["difference"][name] == compare(values, theirs).as_json()
    again = measured(tuned, "latest", "test.jsonl", "--metric", "exact").expect(0)
    assert f"answers: {found['answers'].removesuffix('.jsonl')}-2.jsonl" in again.out and len(list(path.parent.iterdir())) == 2


@pytest.mark.medium
def test_the_base_by_switching_the_adapter_off_is_the_base_alone(tuned: Project) -> None:
    beside = measured(tuned, "latest", "test.jsonl", "--answers", "a.jsonl", "--json").expect(0).json
    alone = measured(tuned, "tiny", "test.jsonl", "--answers", "b.jsonl", "--json").expect(0).json
    assert alone["base"] == {} and alone["difference"] == {}
    assert beside["base"]["loss"] == pytest.approx(alone["loss"], rel=1e-5) and beside["loss"] != alone["loss"]
    first, second = ([json.loads(line) for line in (tuned.folder / name).read_text().splitlines()] for name in ("a.jsonl", "b.jsonl"))
    assert [row["base_answer"] for row in first] == [row["answer"] for row in second]
    typed = measured(tuned, "tiny", "test.jsonl", "--base", "latest", "--json").expect(0).json
    assert typed["base"]["loss"] == pytest.approx(beside["loss"], rel=1e-5)
    assert typed["difference"]["loss"]["mean"] == pytest.approx(-beside["difference"]["loss"]["mean"], rel=1e-3)
    nothing = measured(tuned, "latest", "test.jsonl", "--base", "none", "--json").expect(0).json
    assert nothing["base"] == {} and nothing["loss"] == beside["loss"]


def test_a_fully_trained_run_is_compared_with_the_base_that_it_names(project: Project) -> None:
    project.type("train", "chats.jsonl", "--max-steps", "2", "--method", "full").expect(0)
    found = measured(project, "latest", "chats.jsonl", "--rows", "5", "--json").expect(0).json
    alone = measured(project, "tiny", "chats.jsonl", "--rows", "5", "--json").expect(0).json
    assert found["base"]["loss"] == pytest.approx(alone["loss"], rel=1e-5) and found["rows"] == alone["rows"] == 5
    assert found["difference"]["loss"]["mean"] == pytest.approx(found["loss"] - alone["loss"], rel=1e-3)


@pytest.mark.medium
def test_rows_without_an_answer_are_counted_and_texts_alone_are_refused(tuned: Project) -> None:
    rows = [*chats(3), {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "fine", "weight": 0}]}]
    write_rows(tuned.folder / "some.jsonl", rows)
    skip = ("--set", "data.on_bad_row=skip", "--set", "data.max_bad_share=0.5")
    answer = measured(tuned, "latest", "some.jsonl", "--metric", "exact", "--json", *skip).expect(0)
    assert answer.json["answered"] == 3 and "1 row" in answer.err and "no answer of the assistant" in answer.err
    write_rows(tuned.folder / "texts.jsonl", [{"text": "the cat sat on the mat"}] * 3)
    refused = measured(tuned, "latest", "texts.jsonl", "--metric", "exact").expect(3)
    assert refused.codes == ["evaluation.no-answers"]
    assert measured(tuned, "latest", "texts.jsonl", "--json").expect(0).json["loss"] > 0


@pytest.mark.medium
def test_a_function_of_the_user_gets_the_row_and_its_error_keeps_the_answers(tuned: Project) -> None:
    write_rows(tuned.folder / "test.jsonl", [{**row, "id": number} for number, row in enumerate(chats(4))])
    functions = {"score": "row['id']", "broken": "1 / (2 - row['id'])"}
    text = "".join(f"def {name}(answer, reference, row):\n    return {value}\n" for name, value in functions.items())
    (tuned.folder / "mine.py").write_text(text)
    found = measured(tuned, "latest", "test.jsonl", "--metric", "mine.py:score", "--json").expect(0).json
    assert found["metrics"] == {"score": 1.5}
    failed = measured(tuned, "latest", "test.jsonl", "--metric", "mine.py:broken", "--answers", "kept.jsonl").expect(2)
    assert failed.codes == ["evaluation.metric-failed"] and "test.jsonl:3" in failed.err and "mine.py" in failed.err
    assert len((tuned.folder / "kept.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--metric", "exat"), "evaluation.unknown-metric"),
        (("--metric", "mine.py"), "evaluation.metric-unreadable"),
        (("--metric", "mine.py:scor"), "evaluation.metric-unreadable"),
        (("--metric", "exact", "--answers", "there.jsonl"), "evaluation.answers-exist"),
        (("--metric", "exact", "--answers", "new.xlsx"), "evaluation.answers-ending"),
    ],
)
def test_what_cannot_be_done_is_refused_first_and_its_help_helps(project: Project, words: tuple[str, ...], code: str) -> None:
    (project.folder / "mine.py").write_text("def score(answer, reference):\n    return 1\n")
    (project.folder / "there.jsonl").write_text("mine\n")
    refused = measured(project, "tiny", "chats.jsonl", *words).expect(2)
    assert refused.codes == [code] and "evaluation ..." not in refused.err
    typed = shlex.split(refused.helps[0])
    kept = [each for each in words if typed[0] not in words or each not in (typed[0], words[words.index(typed[0]) + 1])]
    measured(project, "tiny", "chats.jsonl", "--rows", "2", *kept, *typed).expect(0)
    assert (project.folder / "there.jsonl").read_text() == "mine\n"


@pytest.mark.parametrize("ending", ["md", "csv", "html"])
def test_answers_are_readable_in_every_form(project: Project, ending: str) -> None:
    write_rows(project.folder / "odd.jsonl", [{"prompt": "<b>one</b> | two\n```\n", "completion": 'a, "b" <i>```` & c'}])
    measured(project, "tiny", "odd.jsonl", "--metric", "exact", "--answers", f"all.{ending}").expect(0)
    text = (project.folder / f"all.{ending}").read_bytes().decode()
    if ending == "csv":
        (row,) = csv.DictReader(text.splitlines(keepends=True))
        assert row["Reference"] == 'a, "b" <i>```` & c' and row["source"] == "odd.jsonl" and row["row"] == "0"
    if ending == "html":
        assert "a, &quot;b&quot; &lt;i&gt;```` &amp; c" in text and "<i>" not in text
    if ending == "md":
        assert '`````text\na, "b" <i>```` & c\n`````' in text
    assert not list(Path(project.folder).glob(".all*"))


@pytest.mark.parametrize("model", [(), ("--model", "tiny")], ids=["of the settings", "typed"])
def test_answers_given_as_rows_are_refused_with_the_command_that_makes_rows_of_them(project: Project, model: tuple[str, ...]) -> None:
    chat = [{"role": "system", "content": "Be kind."}, *chats(1)[0]["messages"], *chats(2, seed=3)[1]["messages"]]
    write_rows(project.folder / "test.jsonl", [*chats(10), {"messages": chat}])
    measured(project, "tiny", "test.jsonl", "--answers", "answers.jsonl").expect(0)
    columns = ("--set", "data.columns={prompt: prompt, completion: reference}")  # the answers of this model are random bytes
    train = ("--max-steps", "1", *model, *columns)
    refused = project.type("train", "answers.jsonl", *train).expect(3)
    assert set(refused.codes) == {"data.rendered-chat", "data.bad-rows"}, refused.err
    command = shlex.split(refused.helps[0].split("   ")[0])
    assert command == ["llamahome", "data", "check", "answers.jsonl", *model, "--fix", "clean.jsonl"]
    assert set(refused.helps) == {refused.helps[0]}
    project.type(*command[1:], *columns)
    rows = [json.loads(line) for line in (project.folder / "clean.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [[chat["messages"][0]] for chat in chats(10)] + [chat[:-1]]
    project.type("train", "clean.jsonl", *train).expect(0)


def test_tasks_need_lm_eval(project: Project) -> None:
    refused = project.type("train-eval", "tiny", "--tasks", "arc_easy")
    if refused.codes == ["machine.needs-lm-eval"]:
        assert refused.status == 4 and refused.helps == ["pip install 'llamahome[eval]'"]
    assert project.type("train-eval", "tiny").expect(2).codes == ["usage.command-line"]
