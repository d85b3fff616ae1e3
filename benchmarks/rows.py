"""Writes the rows that all systems train on, tokenized by llamahome and in the order of its loader.

    python -m benchmarks.rows TASK.json

writes into the folder of the task: rows.jsonl for llamahome; ids.jsonl for the peers, the same rows as token ids and labels in the order of
training; adapter/, the initial LoRA weights, so that all systems start from the same weights.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.turn import IGNORED

SEED = 0


@dataclass(frozen=True)
class Scenario:
    """Rows of one kind, and how many of them are a step of about 2,000 tokens."""

    name: str
    title: str
    batch: int
    length: int | None
    """Tokens of every row; None keeps the lengths of the sample data."""

    @property
    def max_length(self) -> int:
        """Length to which rows are truncated."""
        return self.length or 2048


SCENARIOS = (
    Scenario("docstrings", "docstrings, mixed lengths", 8, None),
    Scenario("rows-256", "all rows 256 tokens", 8, 256),
    Scenario("rows-2048", "all rows 2,048 tokens", 1, 2048),
)

LENGTHS = tuple(Scenario(f"rows-{length}", f"all rows {length:,} tokens", 2048 // length, length) for length in (64, 512, 1024))
"""More lengths, for the chart of cost by length."""


def scenario(name: str) -> Scenario:
    """Return the scenario with this name."""
    return next(each for each in SCENARIOS + LENGTHS if each.name == name)


def write_raw(path: Path, *, rows: int, length: int | None, model: str, skip: int = 0) -> None:
    """Write `rows` rows of the sample data after the first `skip`, or texts from it of a little more than `length` tokens."""
    from llamahome.data.sample import write_sample

    write_sample(path, rows=None if length else skip + rows)
    lines = path.read_text(encoding="utf-8").splitlines()
    if length:
        texts = _texts([" ".join(turn["content"] for turn in json.loads(line)["messages"]) for line in lines], length, model)
        lines = [json.dumps({"text": next(texts)}) for _ in range(skip + rows)]
    path.write_text("".join(line + "\n" for line in lines[skip : skip + rows]), encoding="utf-8")


def _texts(texts: list[str], length: int, model: str) -> Iterator[str]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    size, tokens = length + length // 16 + 8, []
    while True:
        for text in texts:
            tokens += tokenizer.encode(text + "\n", add_special_tokens=False)
            while len(tokens) >= size:
                yield tokenizer.decode(tokens[:size])
                tokens = tokens[size:]


def write_ids(raw: Path, path: Path, *, model: str, max_length: int) -> dict[str, int]:
    """Write the examples of `raw` as token ids and labels, in the order of llamahome's loader."""
    import numpy as np

    from llamahome.config.schema import DataConfig
    from llamahome.data.prepare import prepare
    from llamahome.data.text.tokens import load_tokenizer

    data = DataConfig(eval_split=0, max_length=max_length, max_lost_share=1)
    prepared = prepare(data, str(raw), load_tokenizer(model), say=lambda text: None, processed=path.parent / "processed")
    order = prepared.order.rows_at(np.arange(prepared.order.epoch_rows, dtype=np.int64), seed=SEED)
    table = prepared.examples.examples_of(order)
    with path.open("w", encoding="utf-8") as file:
        for number in range(len(table)):
            example = table.example(number)
            labels = np.where(example.targets, example.tokens, IGNORED)
            file.write(json.dumps({"input_ids": example.tokens.tolist(), "labels": labels.tolist()}) + "\n")
    counts = {"rows": len(table), "tokens": len(table.tokens), "targets": int(table.targets.sum())}
    prepared.close()
    return counts


def write_adapter(folder: Path, *, model: str) -> None:
    """Write llamahome's initial adapter."""
    import torch

    from llamahome.config.schema import LoraConfig
    from llamahome.model.adapter import save_model
    from llamahome.model.load import load_model
    from llamahome.model.lora import add_lora

    base = load_model(Path(model), dtype=torch.float32, device=torch.device("cpu"))
    save_model(add_lora(base, LoraConfig(), base=model, seed=SEED, lean=False), folder, base=Path(model))


def make(task: dict[str, Any]) -> dict[str, int]:
    """Write all files of a task and return the counts."""
    folder = Path(task["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    write_raw(folder / "rows.jsonl", rows=task["rows"], length=task["length"], model=task["model"], skip=task.get("skip", 0))
    counts = write_ids(folder / "rows.jsonl", folder / "ids.jsonl", model=task["model"], max_length=task["max_length"])
    write_adapter(folder / "adapter", model=task["model"])
    return counts


if __name__ == "__main__":
    print(json.dumps(make(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
