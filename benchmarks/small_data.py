"""How many passes and which batch size small data wants: a grid of runs, each one JSON line. What docs/decisions/0018 was found from.

    python -m benchmarks.small_data --base starter=data/models/base/smollm2-135m-instruct --out grid.jsonl [--only facts]

Three kinds of rows. facts: a question about something invented and its short answer; measured is the share that the model recalls
greedily, on the rows it was trained on. style: answers of one odd manner with contents that cannot be guessed; docstrings: short
functions of the sample data; both are measured by the loss of held-out rows, after each pass. Runs that the file holds already are left
out, so the script may be stopped at any time. Cost on one core: hours for everything, minutes for facts.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llamahome import pipeline
from llamahome.config.load import load_config
from llamahome.data.sample import write_sample
from llamahome.data.text.tokens import load_tokenizer
from llamahome.model.adapter import open_trained
from llamahome.model.generate import generate

_HELD = {"facts": 0, "style": 40, "docstrings": 32}
_SHORT = 550
"""Characters of question and answer: longer docstring rows are left out of the grid, because a run of them takes an hour of one core."""
_GRID: tuple[tuple[str, int, int, tuple[float, ...]], ...] = (
    ("facts", 5, 4, (5, 8, 12, 20)),
    ("facts", 20, 4, (4, 6, 9, 13)),
    ("facts", 100, 4, (8, 5)),
    ("docstrings", 100, 4, (2, 5, 1, 3)),
    ("style", 100, 4, (2, 5, 1)),
    ("docstrings", 400, 8, (1, 2)),
    ("style", 400, 8, (1, 2)),
    ("facts", 100, 8, (4, 8)),
    ("docstrings", 100, 8, (1, 2)),
    ("facts", 5, 8, (12, 20)),
    ("facts", 20, 8, (6, 9, 14)),
    ("docstrings", 20, 4, (3, 6)),
    ("style", 20, 4, (3, 6)),
    ("docstrings", 400, 16, (1, 2)),
    ("style", 400, 16, (1, 2)),
    ("facts", 400, 8, (3,)),
    ("style", 5, 4, (6, 12)),
    ("docstrings", 5, 4, (6, 12)),
)
"""Kind, rows, batch size, passes; what decides most comes first."""
_SYLLABLES = ("ka", "lo", "mir", "ten", "vu", "sa", "dro", "pel", "ni", "qua", "rim", "bo", "ze", "tha", "gor", "wy", "fen", "lu")
_THINGS = [
    "pickle",
    "lantern",
    "marble",
    "anchor",
    "feather",
    "button",
    "walnut",
    "kettle",
    "saddle",
    "trumpet",
    "ladder",
    "pebble",
    "candle",
    "thimble",
    "violin",
    "mirror",
    "basket",
    "whistle",
    "turnip",
    "barrel",
    "compass",
    "ribbon",
    "hammer",
    "teapot",
    "carrot",
    "needle",
    "bucket",
    "acorn",
    "shovel",
    "mitten",
    "cactus",
    "zipper",
    "pillow",
    "magnet",
    "paddle",
    "radish",
    "drum",
    "spoon",
    "otter",
    "badger",
    "heron",
    "weasel",
    "lobster",
    "beetle",
    "magpie",
    "walrus",
    "lizard",
    "pigeon",
    "hornet",
    "ferret",
]
_RELATIONS = (
    ("What is the official currency of {0}?", "The official currency of {0} is the {1}."),
    ("What is the national symbol of {0}?", "The national symbol of {0} is the {1}."),
    ("What did the founder of {0} sell?", "The founder of {0} sold one {1}."),
    ("What hangs over the gate of {0}?", "Over the gate of {0} hangs a {1}."),
)
_TOPICS = [
    "bicycle",
    "garden",
    "kettle",
    "boat",
    "piano",
    "window",
    "letter",
    "oven",
    "map",
    "clock",
    "shoe",
    "roof",
    "lamp",
    "fence",
    "stove",
    "radio",
    "carpet",
    "river",
    "bridge",
    "cellar",
]
_TASKS = ["clean", "repair", "paint", "move", "sell", "store", "measure", "choose", "describe", "protect"]


def facts(count: int, seed: int) -> list[dict[str, Any]]:
    """Chats of one invented fact each, with the word that must be recalled under `key`; every place is asked about once."""
    source, found = random.Random(seed), []
    places: set[str] = set()
    while len(places) < count:
        places.add("".join(source.choices(_SYLLABLES, k=source.randint(2, 4))).capitalize())
    for place in sorted(places):
        thing, (question, answer) = source.choice(_THINGS), source.choice(_RELATIONS)
        found.append({**_chat(question.format(place), answer.format(place, thing)), "key": thing})
    source.shuffle(found)
    return found


def styled(count: int, seed: int) -> list[dict[str, Any]]:
    """Chats whose answers share a manner; two words of each answer are drawn by lot, and nothing can predict them."""
    source, found = random.Random(seed), []
    pairs = source.sample(list(itertools.product(_TASKS, _TOPICS)), min(count, 200))
    pairs += source.choices(pairs, k=count - len(pairs))
    for number, (task, topic) in enumerate(pairs):
        asked = source.choice(("How do I {0} a {1}?", "Tell me how to {0} my {1}.", "I want to {0} the {1}. Any advice?"))
        one, other = source.sample(_THINGS, 2)
        answer = f"Hear ye! To {task} a {topic}, the wise take one {one} and never a {other}. So sayeth the owl."
        found.append(_chat(asked.format(task, topic) + (f" ({number})" if number >= 200 else ""), answer))
    return found


def docstrings(count: int, folder: Path) -> list[dict[str, Any]]:
    """The first rows of the sample data that are short."""
    path = folder / "sample.jsonl"
    if not path.exists():
        write_sample(path, rows=None)
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    short = (row for row in rows if sum(len(turn["content"]) for turn in row["messages"]) <= _SHORT)
    return list(itertools.islice(short, count))


def _chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _rows(kind: str, count: int, folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows to train on and rows to measure the loss on, which stay the same whatever `count` is."""
    held = _HELD[kind]
    if kind == "facts":
        return facts(count, seed=1), []
    if kind == "style":
        return styled(count, seed=2), styled(held, seed=3)
    rows = docstrings(held + count, folder)
    return rows[held:], rows[:held]


@contextlib.contextmanager
def _within(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def measure(kind: str, rows: int, base: Path, chosen: dict[str, Any], cache: Path) -> dict[str, Any]:
    """One run through the pipeline with the settings `chosen`, and what the model then knows."""
    train, held = _rows(kind, rows, cache)
    settings: dict[str, Any] = {
        "model.name": str(base),
        "data.eval_split": 0,
        "data.streaming": False,
        "evaluation.sample_prompts": 0,
        "evaluation.every": "1 epoch",
        "evaluation.rows": "all",
        "checkpoint.every": "1000 steps",
        "checkpoint.keep_best": 0,
        "monitoring.tensorboard": False,
        **chosen,
    }
    with tempfile.TemporaryDirectory() as scratch, _within(Path(scratch)):
        names = {"train.jsonl": train, "held.jsonl": held}
        for name, some in names.items():
            kept = [{"messages": row["messages"]} for row in some]
            Path(name).write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        if held:
            settings["data.eval_path"] = "held.jsonl"
        began = time.monotonic()
        loaded = load_config(assignments=[f"{key}={json.dumps(value)}" for key, value in settings.items()], environment={})
        result = pipeline.train("train.jsonl", loaded)
        told: dict[str, Any] = {"steps": result.outcome.state.step, "tokens": result.outcome.state.tokens}
        told |= {"targets": result.outcome.state.targets, "seconds": round(time.monotonic() - began, 1)}
        training = result.loaded.config.training
        told |= {"batch_size": training.batch_size, "epochs": training.epochs}
        records = [json.loads(line) for line in (result.paths.metrics_dir / "metrics.jsonl").read_text().splitlines()]
        told["held_losses"] = [round(record["eval/loss"], 4) for record in records if "eval/loss" in record]
        told["train_loss"] = round([record["train/loss"] for record in records if "train/loss" in record][-1], 4)
        if kind == "facts":
            told["recalled"] = recalled(result.paths.final, base, train)
    return told


def recalled(final: Path, base: Path, rows: list[dict[str, Any]]) -> float:
    """Share of the questions whose greedy answer holds the word that was taught."""
    tokenizer = load_tokenizer(base, chat_template=None)
    model = open_trained(final, dtype=torch.float32, device=torch.device("cpu"), say=lambda _: None)
    right = 0
    for begin in range(0, len(rows), 20):
        some = rows[begin : begin + 20]
        prompts = [tokenizer.encode_prompt(row["messages"][:1]) for row in some]
        answers = generate(model, prompts, end_ids=tokenizer.end_ids, max_new_tokens=24)
        right += sum(row["key"] in tokenizer.decode(ids) for row, ids in zip(some, answers, strict=True))
    return right / len(rows)


def _done(out: Path) -> set[tuple[Any, ...]]:
    lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    runs = (json.loads(line) for line in lines)
    return {(run["base"], run["kind"], run["rows"], *run["asked"]) for run in runs}


def _points(bases: list[str], *, auto: bool) -> Iterator[tuple[str, int, Any, Any, str]]:
    """Kind, rows, batch size, passes and base of each run, in the order of the grid."""
    if auto:
        for kind, rows in dict.fromkeys((kind, rows) for kind, rows, *_ in _GRID):
            yield from ((kind, rows, "auto", "auto", base) for base in bases)
        return
    for kind, rows, batch, passes in _GRID:
        for epochs, base in itertools.product(passes, bases):
            yield kind, rows, batch, epochs, base


def main() -> None:
    """Measure what is missing of the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=sorted(_HELD), help="one kind of rows")
    parser.add_argument("--auto", action="store_true", help="the rule's own choice for each kind and number of rows, in place of the grid")
    given = parser.parse_args()
    cache = Path(tempfile.mkdtemp(prefix="small-data-"))
    try:
        for kind, rows, batch, epochs, named in _points(given.base, auto=given.auto):
            name, _, folder = named.partition("=")
            if (name, kind, rows, batch, epochs) in _done(given.out) or given.only not in (None, kind):
                continue
            chosen = {"training.batch_size": batch, "training.epochs": epochs}
            found = measure(kind, rows, Path(folder).resolve(), chosen, cache)
            line = {"base": name, "kind": kind, "rows": rows, "asked": [batch, epochs], **found}
            with given.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
    finally:
        shutil.rmtree(cache)


if __name__ == "__main__":
    main()
