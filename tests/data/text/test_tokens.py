"""A tokenizer is loaded from files alone, says what is missing, and does not import torch."""

import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.tokenizers import CHATML, save_tokenizer

from llamahome.data.text.tokens import load_tokenizer
from llamahome.errors import ConfigError


def test_a_template_file_replaces_the_template_of_the_model(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, template=None)
    (tmp_path / "mine.jinja").write_text(CHATML)
    assert load_tokenizer(tmp_path).chat_template is None
    tokenizer = load_tokenizer(tmp_path, chat_template=str(tmp_path / "mine.jinja"))
    assert tokenizer.render([{"role": "user", "content": "x"}]) == "<|im_start|>user\nx<|im_end|>\n"


def test_a_template_that_is_not_valid_jinja_is_reported_with_its_line(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "bad.jinja").write_text("{% for a in messages %}\n{{ a.role }\n{% endfor %}")
    with pytest.raises(ConfigError, match=r"bad.jinja:2: the chat template is not valid Jinja"):
        load_tokenizer(tmp_path, chat_template=str(tmp_path / "bad.jinja"))
    with pytest.raises(ConfigError, match="cannot read the chat template"):
        load_tokenizer(tmp_path, chat_template=str(tmp_path / "gone.jinja"))


def test_a_folder_without_a_tokenizer_is_reported(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "gone"):
        with pytest.raises(ConfigError) as caught:
            load_tokenizer(folder)
        assert caught.value.problems[0].code == "model.no-tokenizer" and caught.value.problems[0].where == str(folder)


def test_truncation_and_padding_saved_with_a_tokenizer_are_ignored(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    import tokenizers

    path = str(tmp_path / "tokenizer.json")
    saved = tokenizers.Tokenizer.from_file(path)
    saved.enable_truncation(4)
    saved.enable_padding(length=16)
    saved.save(path)
    assert len(load_tokenizer(tmp_path).encode(["x " * 50])[0].ids) > 50


@pytest.mark.parametrize(
    "module", ["cli.data", "data.files.sources", "data.rows.formats", "data.steps.order", "data.sample", "data.view", "data.prepare"]
)
def test_reading_data_does_not_import_torch(module: str) -> None:
    code = f"import sys, llamahome.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
