"""The rows that all systems train on: made once by llamahome's own tokenization, in the order and the steps of its own loader.

    python -m benchmarks.rows TASK.json

writes into the folder of the task: rows.jsonl, which llamahome reads; ids.jsonl, the same rows as token ids and labels in the order of
training, which the peers read; adapter/, LoRA as it is before the first step, so that all begin at the same point.
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
    """Rows of one kind, and how many of them make a step of about 2,000 tokens."""

    name: str
    title: str
    batch: int
    length: int | None
    """Tokens of every row; None: as the sample data have them."""

    @property
    def max_length(self) -> int:
        """What rows are cut to."""
        return self.length or 2048


SCENARIOS = (
    Scenario("docstrings", "docstrings, mixed lengths", 8, None),
    Scenario("rows-256", "all rows 256 tokens", 8, 256),
    Scenario("rows-2048", "all rows 2,048 tokens", 1, 2048),
)

LENGTHS = tuple(Scenario(f"rows-{length}", f"all rows {length:,} tokens", 2048 // length, length) for length in (64, 512, 1024))
"""Further lengths, for the picture of cost against length."""


def scenario(name: str) -> Scenario:
    """The one with this name."""
    return next(each for each in SCENARIOS + LENGTHS if each.name == name)


def write_raw(path: Path, *, rows: int, length: int | None, model: str, skip: int = 0) -> None:
    """`rows` rows of the sample data after the first `skip`, or as many texts of a little more than `length` tokens made from it."""
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
    wanted, kept = length + length // 16 + 8, []
    while True:
        for text in texts:
            kept += tokenizer.encode(text + "\n", add_special_tokens=False)
            while len(kept) >= wanted:
                yield tokenizer.decode(kept[:wanted])
                kept = kept[wanted:]


def write_ids(raw: Path, path: Path, *, model: str, max_length: int) -> dict[str, int]:
    """The examples of `raw` as llamahome's loader gives them out, as token ids and labels."""
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
    told = {"rows": len(table), "tokens": len(table.tokens), "targets": int(table.targets.sum())}
    prepared.close()
    return told


def write_adapter(folder: Path, *, model: str) -> None:
    """llamahome's adapter before its first step."""
    import torch

    from llamahome.config.schema import LoraConfig
    from llamahome.model.adapter import save_model
    from llamahome.model.load import load_model
    from llamahome.model.lora import add_lora

    bare = load_model(Path(model), dtype=torch.float32, device=torch.device("cpu"))
    save_model(add_lora(bare, LoraConfig(), base=model, seed=SEED, lean=False), folder, base=Path(model))


def make(task: dict[str, Any]) -> dict[str, int]:
    """Write everything of one task."""
    folder = Path(task["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    write_raw(folder / "rows.jsonl", rows=task["rows"], length=task["length"], model=task["model"], skip=task.get("skip", 0))
    told = write_ids(folder / "rows.jsonl", folder / "ids.jsonl", model=task["model"], max_length=task["max_length"])
    write_adapter(folder / "adapter", model=task["model"])
    return told


if __name__ == "__main__":
    print(json.dumps(make(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
