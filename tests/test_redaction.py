"""Secrets are replaced where a run writes or shows them; nothing else is."""

import json
import logging
from pathlib import Path

import pytest

from llamahome import redaction
from llamahome.config.load import dump_config, load_config
from llamahome.errors import ConfigError, Problem
from llamahome.logs import log_to_file
from llamahome.monitoring.environment import write_environment
from llamahome.redaction import names_secret, redact, redact_values, redact_words

TOKEN = "hf_" + "AbCdEfGh" * 3
SECRET = "correct-horse-battery"


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"401 for {SECRET}!", "401 for ***!"),
        (f"token {TOKEN}", "token ***"),
        ("https://me:pa55@files.example.org/a.jsonl", "https://***@files.example.org/a.jsonl"),
        ("https://0123456789abcdef@example.org/x", "https://***@example.org/x"),
        ("GET https://h.org/x?a=1&X-Amz-Signature=0af3&access_token=zz9", "GET https://h.org/x?a=1&X-Amz-Signature=***&access_token=***"),
        ("Authorization: Bearer abcdefghijklmn", "Authorization: Bearer ***"),
        ("DB_PASSWORD=hunter2 other=1", "DB_PASSWORD=*** other=1"),
        ('{"api_key": "zzz", "step": 3}', '{"api_key": "***", "step": 3}'),
        ("llamahome serve run --api-key sesame --port 8000", "llamahome serve run --api-key *** --port 8000"),
        ("llamahome serve run --api-key=sesame", "llamahome serve run --api-key=***"),
        ("AKIAABCDEFGHIJKLMNOP and ghp_" + "a1" * 18, "*** and ***"),
    ],
)
def test_a_secret_is_replaced(text: str, shown: str) -> None:
    assert redact(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "training.micro_batch_tokens=2048 model.eos_token='<|im_end|>' pad_token=x",
        '{"tokens": 1200, "eos_token": "</s>", "sort_key": "step", "step": 5}',
        "step 5: loss 2.1, tokens/s=900, --set model.eos_token=<|end|> --micro-batch-tokens 4096",
        "https://huggingface.co/org/name?revision=main is at me@example.org: monkey=1 keyboard=2",
        "tokenizer=tokenizer.json TOKENIZERS_PARALLELISM=false",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


def test_names_say_what_is_secret() -> None:
    secret = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "password", "my-secret", "OPENAI_API_KEY", "token", "deploy_key")
    assert all(names_secret(name) for name in secret)
    plain = ("micro_batch_tokens", "eos_token", "tokenizer", "HF_TOKEN_PATH", "monkey", "sort_key", "tokens")
    assert not any(names_secret(name) for name in plain)


def test_words_and_values_are_searched_one_by_one() -> None:
    assert redact_words(["serve", "--api-key", "a b", f"x={SECRET}"]) == ["serve", "--api-key", "***", "x=***"]
    record = {"reason": f"refused {SECRET}", "hub": {"token": "short", "rows": [TOKEN, 3]}, "tokens": 5}
    assert redact_values(record) == {"reason": "refused ***", "hub": {"token": "***", "rows": ["***", 3]}, "tokens": 5}


def test_no_file_and_no_message_of_a_run_holds_a_secret(tmp_path: Path) -> None:
    write_environment(tmp_path / "environment.json", ["llamahome", "train", f"https://me:{SECRET}@h.org/rows", "--api-key", "sesame"])
    handler = log_to_file(tmp_path / "rank-0.log")
    try:
        raise ValueError(f"the hub refuses {TOKEN}")
    except ValueError:
        logging.getLogger("hub").exception("with %s", SECRET)
    handler.close()
    logging.getLogger().removeHandler(handler)
    loaded = load_config([], assignments=[f"model.name=https://me:{SECRET}@h.org/model", f"output.name={TOKEN}"], environment={})
    (tmp_path / "config.yaml").write_text(dump_config(loaded))
    error = ConfigError(Problem(code="model.hub-failed", message=f"refused {TOKEN}", where=f"https://x:{SECRET}@h.org", hint="again"))
    (tmp_path / "stderr").write_text(f"{error}\n{error.problems[0].render()}")
    texts = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert len(texts) == 4
    for name, text in texts.items():
        assert not any(secret in text for secret in (SECRET, TOKEN, "sesame")), name
        assert redaction.HIDDEN in text, name
    assert json.loads(texts["environment.json"])["command"] == ["llamahome", "train", "https://***@h.org/rows", "--api-key", "***"]


def test_settings_do_not_change_because_a_password_is_a_common_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD_TOKEN", "training")
    loaded = load_config([], assignments=["output.dir=output/training"], environment={})
    assert "output/training" in dump_config(loaded)


def test_a_help_line_offers_a_token_that_can_be_typed() -> None:
    problem = Problem(
        code="usage.host-without-key", message="--token abcdefghijkl is not enough", where="--host", hint="--token mnopqrstuvwx"
    )
    assert problem.render().splitlines()[0].endswith("--host: --token *** is not enough")
    assert problem.render().splitlines()[-1] == "help: --token mnopqrstuvwx"


def test_a_run_of_the_python_api_has_no_command_to_redact() -> None:
    assert redaction.redact_words([]) == []
