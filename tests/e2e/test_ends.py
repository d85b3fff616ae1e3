"""Learned end tokens are saved where other tools read them, and system texts are rendered in the same way in training and use."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from tests.support.projects import Project, chats, write_rows
from tests.support.tokenizers import CHATML
from transformers import AutoTokenizer, GenerationConfig

REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
SILENT = CHATML.replace("{{ '<|im_start|>'", "{% if turn.role != 'system' %}{{ '<|im_start|>'").replace(
    "\n' }}{% endfor", "\n' }}{% endif %}{% endfor"
)


def edit(project: Project, name: str, **changes: Any) -> Path:
    """Set keys in a JSON file of the model; None removes a key."""
    path = project.folder / "data/models/base/tiny" / name
    content = {**json.loads(path.read_text()), **changes} if path.exists() else changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return path


def typed(helped: str) -> list[str]:
    """The setting of a help line."""
    words = shlex.split(helped)
    at = words.index("--set")
    return words[at : at + 2]


@pytest.mark.medium
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_learned_end_token_is_saved_for_other_tools(project: Project, method: str) -> None:
    edit(project, "tokenizer_config.json", eos_token="<|endoftext|>")
    edit(project, "generation_config.json", eos_token_id=0)
    answer = project.type("train", "chats.jsonl", "--max-steps", "1", "--method", method).expect(0)
    assert "answers end in <|im_end|> (id 2)" in answer.err and "the end token is <|endoftext|> (id 0)" in answer.err
    for folder in ("final", "checkpoint-1/model"):
        assert GenerationConfig.from_pretrained(project.run.root / folder).eos_token_id == [0, 2]
    for words in (("plan", "chats.jsonl"), ("data", "check", "chats.jsonl"), ("data", "show", "chats.jsonl")):
        shown = project.type(*words).expect(0)
        assert "answers end in <|im_end|>" in shown.out + shown.err


@pytest.mark.medium
def test_without_an_end_token_the_help_sets_one_that_is_learned_and_saved(project: Project) -> None:
    edit(project, "tokenizer_config.json", eos_token=None)
    edit(project, "generation_config.json", eos_token_id=None)
    edit(project, "config.json", eos_token_id=None)
    write_rows(project.folder / "texts.jsonl", [{"text": f"{n} {row['messages'][1]['content']}"} for n, row in enumerate(chats(12))])
    before = project.type("train", "texts.jsonl", "--max-steps", "1", "--set", "data.eval_split=0").expect(0)
    assert "no end is learned" in before.err and len(before.helps) == 1
    setting = typed(before.helps[0])
    after = project.type("train", "texts.jsonl", "--max-steps", "1", "--set", "data.eval_split=0", *setting).expect(0)
    assert "no end is learned" not in after.err
    final, token = project.run.root / "final", setting[1].partition("=")[2]
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert tokenizer.eos_token == token and GenerationConfig.from_pretrained(final).eos_token_id == tokenizer.eos_token_id
    shown = project.type("data", "show", "texts.jsonl", "--json", "-n", "1", "--model", str(final)).expect(0)
    assert shown.json["tokens"][-1] == {"id": tokenizer.eos_token_id, "text": token, "target": True}
    project.type("train-resume", "latest", "--max-steps", "2").expect(0)


@pytest.mark.medium
@pytest.mark.parametrize("template", [REFUSES, SILENT], ids=["refuses", "silent"])
def test_the_help_for_a_system_text_trains_it_and_other_tools_render_it_the_same_way(project: Project, template: str) -> None:
    (project.folder / "data/models/base/tiny/chat_template.jinja").write_text(template)
    rows = [{"messages": [{"role": "system", "content": "Be short."}, *row["messages"]]} for row in chats(8)]
    write_rows(project.folder / "rows.jsonl", rows)
    short = ("--max-steps", "1", "--set", "data.eval_split=0")
    refused = project.type("train", "rows.jsonl", *short).expect(3)
    setting = typed(refused.helps[-1])
    answer = project.type("train", "rows.jsonl", *short, *setting).expect(0)
    assert "8 rows with the system text before the first question" in answer.err
    shown = project.type("data", "show", "rows.jsonl", "--json", "-n", "1", *setting).expect(0).json
    theirs = AutoTokenizer.from_pretrained(project.run.root / "final").apply_chat_template(rows[0]["messages"], tokenize=False)
    assert "".join(token["text"] for token in shown["tokens"]) == theirs and "Be short.\n\n0:" in theirs
    arguments = ("--system", "Be short.", "--prompt", "hello", "--max-new-tokens", "1")
    project.type("chat", "output/training/final", *arguments).expect(0)
    hint = project.type("chat", "tiny", *arguments).expect(3).helps[0]
    project.type("chat", "tiny", *arguments, *typed(hint)).expect(0)
