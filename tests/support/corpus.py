"""The corpus of bad input: the files under tests/corpus, binary files that are written here, and what is wrong with each."""

import gzip
import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tests.support.projects import chats

CORPUS = Path(__file__).resolve().parents[1] / "corpus"
TABLE = CORPUS / "table.toml"
_TURN = b"<|im_start|>{{ m.role }}\\n{{ m.content }}<|im_end|>\\n"
_PROMPT = b"{% if add_generation_prompt %}<|im_start|>assistant\\n{% endif %}"
_FIND = re.compile(r"(error|warning) ([a-z0-9.-]+) (\d+|-)(?: (\S+))?: (.*)")


@dataclass(frozen=True)
class Expected:
    """One finding, as in the table: `error data.null-content 3 messages[1].content: is null`."""

    level: str
    code: str
    line: int | None
    path: str | None
    words: str
    """Part of the message."""


@dataclass(frozen=True)
class Case:
    """One file and all that is wrong with it."""

    file: str
    settings: tuple[str, ...]
    finds: tuple[Expected, ...]

    @property
    def refused(self) -> bool:
        return any(finding.level == "error" for finding in self.finds)


def cases() -> list[Case]:
    """Every case of the table."""
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))["case"]
    return [Case(case["file"], tuple(case.get("set", ())), tuple(_expected(text) for text in case["finds"])) for case in table]


def _expected(text: str) -> Expected:
    match = _FIND.fullmatch(text)
    assert match, text
    level, code, line, path, words = match.groups()
    return Expected(level, code, None if line == "-" else int(line), path, words)


def lines(*rows: object) -> bytes:
    return b"".join(row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def table(rows: list[dict[str, object]], path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_unreadable_as_text(folder: Path) -> None:
    """Write the files that are not text: bytes, encodings, archives, tables."""
    good = chats(4)
    files = {
        "nul-byte.jsonl": lines(*good[:2], lines(good[2]).replace(b"messages", b"mess\0ages"), good[3]),
        "nul-line.jsonl": lines(*good[:2], b"\0\0\0\0\n", good[3]),
        "latin-1.jsonl": lines(*good[:2], '{"text": "Müller"}\n'.encode("latin-1"), good[3]),
        "cut-character.jsonl": lines(*good[:2], '{"text": "Mü'.encode()[:-1] + b'"}\n', good[3]),
        "utf-16.jsonl": lines(*good).decode().encode("utf-16"),
        "deep.jsonl": lines(*good[:2], b'{"messages": ' + b"[" * 100_000 + b"\n", good[3]),
        "long-number.jsonl": lines(*good[:2], b'{"messages": ' + b"1" * 5000 + b"}\n", good[3]),
        "windows-lines.jsonl": lines(*good[:2], {"messages": []}, good[3]).replace(b"\n", b"\r\n"),
        "no-end.jsonl": lines(*good[:2]) + b"{",
        "far-too-long.jsonl": lines(*chats(120), {"messages": [{**turn, "content": "the cat sat " * 120} for turn in good[0]["messages"]]}),
        "packed.jsonl.gz": gzip.compress(lines(*good[:2], {"messages": None}, good[3]), mtime=0),
        "cut.jsonl.gz": gzip.compress(lines(*chats(50)), mtime=0)[:-200],
        "not-packed.jsonl.gz": lines(*good),
        "nul-byte.csv": b"prompt,completion\nCount to three.,One two three.\nName a col\0our.,Blue.\n",
        "latin-1.csv": "prompt,completion\nCount to three.,One two three.\nName a colour.,Türkis.\n".encode("latin-1"),
        "noise.parquet": bytes(range(256)) * 4,
        "noise.arrow": bytes(range(256)) * 4,
        "noise.jsonl.zst": bytes(range(256)) * 4,
        "columns.jsonl": lines({"question": "Hello?", "answer": "Hello."}, {"question": "Bye?", "answer": "Bye."}),
        "refused.jsonl": lines(*good),
        "refuses.jinja": b"{{ raise_exception('no chats here') }}",
        "left-out.jsonl": lines(*good),
        "leaves-out.jinja": b"{% for m in messages if m.role == 'assistant' %}" + _TURN + b"{% endfor %}" + _PROMPT,
        "unproved.jsonl": lines(*good),
        "shouts.jinja": b"{% for m in messages %}" + _TURN.replace(b"content", b"content | upper") + b"{% endfor %}" + _PROMPT,
        "empty.parquet": b"",
    }
    (folder / "empty-folder").mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    prompts: list[dict[str, object]] = [
        {"prompt": "Count to three.", "completion": "One two three."},
        {"prompt": "Hello?", "completion": None},
    ]
    table(prompts, folder / "null-answer.parquet")
    table([{"prompt": "What is 6 times 7?", "completion": 42}], folder / "number-answer.parquet")
    whole = (folder / "null-answer.parquet").read_bytes()
    (folder / "cut.parquet").write_bytes(whole[: len(whole) // 2])
