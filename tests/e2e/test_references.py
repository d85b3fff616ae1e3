"""Where the model learns from answers of its own, the answers in the rows are references, and no figure calls them learned."""

import json

import pytest
from tests.support.projects import Project, chats, write_rows

GRPO = ("--set", "training.objective=grpo", "--reward", "mine.py:score")
SHORT = ("--set", "grpo.max_new_tokens=5", "--set", "grpo.group_size=3", "--max-steps", "1")
ROWS = {"prompts": [{"prompt": row["messages"][0]["content"]} for row in chats(24)], "answers": chats(24)}


@pytest.fixture(params=[*ROWS, "named format"])
def rewarded(project: Project, request: pytest.FixtureRequest) -> tuple[Project, tuple[str, ...]]:
    """With rows, and the settings that learn from rewards: rows with answers also where data.format names their format."""
    (project.folder / "mine.py").write_text("def score(answer, reference):\n    return answer.count('e')\n")
    write_rows(project.folder / "rows.jsonl", ROWS.get(request.param, ROWS["answers"]))
    named = ("--set", "data.format=messages") if request.param == "named format" else ()
    return project, ("--set", "training.objective=grpo", "--set", "grpo.reward=mine.py:score", *named)


def test_the_data_commands_call_nothing_learned(rewarded: tuple[Project, tuple[str, ...]]) -> None:
    project, words = rewarded
    figures = project.type("data", "stats", "rows.jsonl", "--json", *words).expect(0).json
    assert figures["targets"] == figures["epoch_targets"] == 0 and figures["references"] >= 24
    assert not any(row["targets"] for row in (*figures["cuts"], *figures["longest"]))
    assert figures["epoch_examples"] == 24 and figures["epoch_tokens"] == figures["tokens"]
    assert "none of them learned" in project.type("data", "stats", "rows.jsonl", *words).expect(0).out
    row = json.loads(project.type("data", "show", "rows.jsonl", "-n", "1", "--json", *words).expect(0).out)
    assert not any(token["target"] for token in row["tokens"]) and any(token.get("reference") for token in row["tokens"])
    prepared = project.type("data", "prepare", "rows.jsonl", "--json", *words).expect(0).json
    assert prepared["targets"] == 0 and prepared["references"] == figures["references"]
    assert "answers of the model learned" in project.type("data", "prepare", "rows.jsonl", *words).expect(0).out


def test_a_row_that_max_length_cuts_within_its_prompt_loses_no_answer(project: Project) -> None:
    rows = [*ROWS["prompts"], {"prompt": "word " * 60}]
    write_rows(project.folder / "rows.jsonl", rows)
    (project.folder / "mine.py").write_text("def score(answer, reference):\n    return 1.0\n")
    words = ("--set", "training.objective=grpo", "--set", "grpo.reward=mine.py:score", "--set", "data.max_length=64")
    lost = ("--set", "data.max_lost_share=1")
    printed = project.type("data", "prepare", "rows.jsonl", *words, *lost).expect(0).out
    assert "1 row left out because max_length ends within their prompt" in printed and "targets" not in printed
    checked = project.type("data", "check", "rows.jsonl", *words, *lost).expect(0).err
    assert "data.max_length ends within the prompt, so the row is left out" in checked and "learned otherwise" not in checked


def test_the_lines_of_a_run_call_nothing_learned(project: Project) -> None:
    (project.folder / "mine.py").write_text("def score(answer, reference):\n    return answer.count('e')\n")
    write_rows(project.folder / "rows.jsonl", ROWS["prompts"])
    told = project.type("train", "rows.jsonl", *GRPO, *SHORT, "--set", "data.eval_split=auto").expect(0).err
    assert "answers of the model learned" in told and "% of them learned" not in told and "% learned" not in told
    assert "answers of the model learned" in (project.run.root / "report.html").read_text(), "the summary is read again"
    assert (
        project.type("plan", "rows.jsonl", *GRPO, *SHORT[-2:], "--set", "data.eval_split=auto")
        .expect(0)
        .out.count("answers of the model learned")
        == 1
    )
