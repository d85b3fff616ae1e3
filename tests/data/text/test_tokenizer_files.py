"""If a tokenizer cannot be loaded, the message names the file of the vocabulary, and a package only if that package reads it."""

import base64
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.support.tokenizers import CHATML, save_tokenizer
from transformers.utils import sentencepiece_model_pb2_new as sentencepiece_pb2

from llamahome.data.text.tokens import load_tokenizer, require_chat_template
from llamahome.errors import ConfigError, DataError, Problem

without_sentencepiece = pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="sentencepiece is here")


def write_pieces(path: Path) -> None:
    """A SentencePiece file of single letters, written as its protocol buffer."""
    proto = sentencepiece_pb2.ModelProto()
    for number, piece in enumerate(["<unk>", "<s>", "</s>", "\u2581", *"abcdefgh"]):
        proto.pieces.add(piece=piece, score=-float(number), type=2 if number == 0 else 3 if number < 3 else 1)
    proto.trainer_spec.model_type = 1
    path.write_bytes(proto.SerializeToString())


def problem_of(folder: Path) -> Problem:
    with pytest.raises(ConfigError) as error:
        load_tokenizer(folder)
    (problem,) = error.value.problems
    return problem


def folder_with(folder: Path, tokenizer_class: str | None) -> Path:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    if tokenizer_class is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class}))
    return folder


@without_sentencepiece
@pytest.mark.parametrize(
    ("name", "tokenizer_class", "hint"),
    [
        ("tokenizer.model", "LlamaTokenizer", "pip install sentencepiece"),
        ("tokenizer.model", None, "pip install sentencepiece"),
        ("spiece.model", "T5Tokenizer", "pip install sentencepiece"),
        ("sentencepiece.bpe.model", "XLMRobertaTokenizer", "pip install sentencepiece"),
        ("tokenizer.model.v3", None, None),
        ("spiece.model", None, None),
    ],
    ids=str,
)
def test_a_sentencepiece_file_of_any_name_is_recognised(tmp_path: Path, name: str, tokenizer_class: str | None, hint: str | None) -> None:
    """Tried with transformers 5.23: with the package it reads those with a hint, and not the last two."""
    write_pieces(folder_with(tmp_path, tokenizer_class) / name)
    problem = problem_of(tmp_path)
    assert problem.code == "model.no-tokenizer" and problem.hint == hint
    assert f"SentencePiece's {name}, and there is no tokenizer.json" in problem.message and "tiktoken" not in problem.message


@pytest.mark.skipif(find_spec("tiktoken") is not None, reason="tiktoken is here")
def test_a_tiktoken_file_is_distinguished_from_sentencepiece(tmp_path: Path) -> None:
    lines = [f"{base64.b64encode(bytes([number])).decode()} {number}\n" for number in range(256)]
    (folder_with(tmp_path, "PreTrainedTokenizerFast") / "tokenizer.model").write_text("".join(lines))
    problem = problem_of(tmp_path)
    assert "in the form of tiktoken" in problem.message and problem.hint == "pip install tiktoken"


def test_for_a_tokenizer_written_in_python_no_package_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\n[PAD]\n[MASK]\na\n")
    for name in ("BertJapaneseTokenizer", "ByT5Tokenizer", "XLMTokenizer"):
        problem = problem_of(folder_with(tmp_path, name))
        assert "works in Python alone" in problem.message and problem.hint is None, name


@pytest.mark.parametrize(
    ("name", "content", "code", "words"),
    [
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "model.lfs-pointer", "Git LFS pointer"),
        ("tokenizer.json", "", "model.no-tokenizer", "the file is empty"),
        ("tokenizer.json", '{"model": ', "model.no-tokenizer", "tokenizer.json is not valid JSON"),
        ("tokenizer_config.json", "{'a': 1}", "model.no-tokenizer", "tokenizer_config.json is not valid JSON"),
    ],
    ids=str,
)
def test_a_damaged_file_is_reported_as_the_reason(tmp_path: Path, name: str, content: str, code: str, words: str) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / name).write_text(content)
    problem = problem_of(tmp_path)
    assert problem.code == code and words in problem.message


def test_mistrals_tekken_file_is_named(tmp_path: Path) -> None:
    (folder_with(tmp_path, None) / "tekken.json").write_text("{}")
    assert "tekken.json" in problem_of(tmp_path).message


def test_templates_without_a_default_are_named(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, template=None)
    for name in ("rag", "tool_use"):
        (tmp_path / "additional_chat_templates").mkdir(exist_ok=True)
        (tmp_path / "additional_chat_templates" / f"{name}.jinja").write_text(CHATML)
    with pytest.raises(DataError, match=r"none of the chat templates of the model's tokenizer \(rag, tool_use\) is the default"):
        require_chat_template(load_tokenizer(tmp_path), what="the rows are chats")
    (tmp_path / "mine.jinja").write_text(CHATML)
    require_chat_template(load_tokenizer(tmp_path, chat_template=str(tmp_path / "mine.jinja")), what="the rows are chats")
