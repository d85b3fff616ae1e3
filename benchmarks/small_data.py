"""Runs a grid of epochs and batch sizes on small data, one JSON line per run. The measurements for docs/decisions/0018.

    python -m benchmarks.small_data --base starter=data/models/base/smollm2-135m-instruct --out grid.jsonl [--only facts]

There are four kinds of rows. facts: a question about an invented fact and its short answer; the result is the share of facts that the
model recalls with greedy decoding on the training rows. style: answers in an unusual style with contents that cannot be guessed;
docstrings: short functions of the sample data; records: a sentence written as JSON. The result of these three is the loss on held-out
rows after each epoch. Runs that are in the file are skipped, so the script can be stopped at any time. If other programs use the CPU,
OMP_WAIT_POLICY=PASSIVE is several times as fast. Cost on one core: hours for everything, minutes for facts.
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

_HELD_OUT = {"facts": 0, "style": 40, "docstrings": 32, "records": 40}
_MAX_CHARACTERS = 550
"""Of question and answer: longer docstring rows are left out, because a run with them takes an hour on one core."""
_GRID: tuple[tuple[str, int, int, tuple[float, ...]], ...] = (
    ("facts", 5, 4, (5, 8, 12, 20)),
    ("facts", 20, 4, (4, 6, 9, 12)),
    ("facts", 100, 4, (12, 8)),
    ("docstrings", 100, 4, (2, 5, 1, 3)),
    ("style", 100, 4, (2, 4, 6, 3, 1)),
    ("records", 100, 4, (2, 3, 1)),
    ("docstrings", 400, 8, (1, 2)),
    ("style", 400, 8, (4, 2, 3, 6)),
    ("records", 400, 8, (2, 1)),
    ("facts", 100, 8, (4, 8)),
    ("docstrings", 100, 8, (1, 2)),
    ("facts", 5, 8, (12, 20)),
    ("facts", 20, 8, (6, 9, 14)),
    ("docstrings", 20, 4, (3, 6)),
    ("style", 20, 4, (3, 6)),
    ("docstrings", 400, 16, (1, 2)),
    ("style", 400, 16, (2, 4)),
    ("facts", 400, 8, (3,)),
    ("style", 5, 4, (6, 12)),
    ("docstrings", 5, 4, (6, 12)),
)
"""Kind, rows, batch size, epochs; the most informative runs come first."""
_SYLLABLES = ("ka", "lo", "mir", "ten", "vu", "sa", "dro", "pel", "ni", "qua", "rim", "bo", "ze", "tha", "gor", "wy", "fen", "lu")
_THING_WORDS = """
    pickle lantern marble anchor feather button walnut kettle saddle trumpet ladder pebble candle thimble violin
    mirror basket whistle turnip barrel compass ribbon hammer teapot carrot needle bucket acorn shovel mitten
    cactus zipper pillow magnet paddle radish drum spoon otter badger heron weasel lobster beetle magpie walrus
    lizard pigeon hornet ferret
"""
_THINGS = _THING_WORDS.split()
_RELATIONS = (
    ("What is the official currency of {0}?", "The official currency of {0} is the {1}."),
    ("What is the national symbol of {0}?", "The national symbol of {0} is the {1}."),
    ("What did the founder of {0} sell?", "The founder of {0} sold one {1}."),
    ("What hangs over the gate of {0}?", "Over the gate of {0} hangs a {1}."),
)
_TOPIC_WORDS = """
    bicycle garden kettle boat piano window letter oven map clock shoe roof lamp fence stove radio carpet river
    bridge cellar
"""
_TOPICS = _TOPIC_WORDS.split()
_TASKS = ["clean", "repair", "paint", "move", "sell", "store", "measure", "choose", "describe", "protect"]


def facts(count: int, seed: int) -> list[dict[str, Any]]:
    """Chats about one invented fact each, with the word to recall under `key`. There is one question per place."""
    source, chats = random.Random(seed), []
    places: set[str] = set()
    while len(places) < count:
        places.add("".join(source.choices(_SYLLABLES, k=source.randint(2, 4))).capitalize())
    for place in sorted(places):
        thing, (question, answer) = source.choice(_THINGS), source.choice(_RELATIONS)
        chats.append({**_chat(question.format(place), answer.format(place, thing)), "key": thing})
    source.shuffle(chats)
    return chats


def styled(count: int, seed: int) -> list[dict[str, Any]]:
    """Chats whose answers share a style; two words of each answer are random and cannot be predicted."""
    source, chats = random.Random(seed), []
    pairs = source.sample(list(itertools.product(_TASKS, _TOPICS)), min(count, 200))
    pairs += source.choices(pairs, k=count - len(pairs))
    for number, (task, topic) in enumerate(pairs):
        question = source.choice(("How do I {0} a {1}?", "Tell me how to {0} my {1}.", "I want to {0} the {1}. Any advice?"))
        one, other = source.sample(_THINGS, 2)
        answer = f"Hear ye! To {task} a {topic}, the wise take one {one} and never a {other}. So sayeth the owl."
        chats.append(_chat(question.format(task, topic) + (f" ({number})" if number >= 200 else ""), answer))
    return chats


def records(count: int, seed: int) -> list[dict[str, Any]]:
    """Chats that turn a sentence into JSON: the answer contains only its format and words of the question."""
    source, chats = random.Random(seed), []
    for _ in range(count):
        place, name = ("".join(source.choices(_SYLLABLES, k=3)).capitalize() for _ in range(2))
        one, number, price = source.choice(_THINGS), source.randint(2, 99), source.randint(100, 999)
        record = {
            "customer": {"name": name, "city": place},
            "items": [{"article": one, "count": number}],
            "price": price,
            "currency": "EUR",
        }
        question = source.choice(("{0} from {1} orders {2} of {3} for {4} euros.", "For {4} euros, {2} of {3} go to {0} in {1}."))
        chats.append(_chat(question.format(name, place, number, one, price), json.dumps(record)))
    return chats


def docstrings(count: int, folder: Path) -> list[dict[str, Any]]:
    """The first short rows of the sample data."""
    path = folder / "sample.jsonl"
    if not path.exists():
        write_sample(path, rows=None)
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    short = (row for row in rows if sum(len(turn["content"]) for turn in row["messages"]) <= _MAX_CHARACTERS)
    return list(itertools.islice(short, count))


def _chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _rows(kind: str, count: int, folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training rows, and held-out rows that do not depend on `count`."""
    held_out = _HELD_OUT[kind]
    if kind == "facts":
        return facts(count, seed=1), []
    if kind == "style":
        return styled(count, seed=2), styled(held_out, seed=3)
    if kind == "records":
        return records(count, seed=4), records(held_out, seed=5)
    rows = docstrings(held_out + count, folder)
    return rows[held_out:], rows[:held_out]


@contextlib.contextmanager
def _within(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def measure(kind: str, rows: int, base: Path, chosen: dict[str, Any], cache: Path) -> dict[str, Any]:
    """Train once with the settings `chosen` and measure the result."""
    train, held_out = _rows(kind, rows, cache)
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
        names = {"train.jsonl": train, "held.jsonl": held_out}
        for name, some in names.items():
            messages = [{"messages": row["messages"]} for row in some]
            Path(name).write_text("".join(json.dumps(row) + "\n" for row in messages), encoding="utf-8")
        if held_out:
            settings["data.eval_path"] = "held.jsonl"
        started = time.monotonic()
        loaded = load_config(assignments=[f"{key}={json.dumps(value)}" for key, value in settings.items()], environment={})
        result = pipeline.train("train.jsonl", loaded)
        measured: dict[str, Any] = {"steps": result.outcome.state.step, "tokens": result.outcome.state.tokens}
        measured |= {"targets": result.outcome.state.targets, "seconds": round(time.monotonic() - started, 1)}
        training = result.loaded.config.training
        measured |= {"batch_size": training.batch_size, "epochs": training.epochs}
        records = [json.loads(line) for line in (result.paths.metrics_dir / "metrics.jsonl").read_text().splitlines()]
        measured["held_losses"] = [round(record["eval/loss"], 4) for record in records if "eval/loss" in record]
        measured["train_loss"] = round([record["train/loss"] for record in records if "train/loss" in record][-1], 4)
        if kind == "facts":
            measured["recalled"] = recalled(result.paths.final, base, train)
    return measured


def recalled(final: Path, base: Path, rows: list[dict[str, Any]]) -> float:
    """Share of the questions whose greedy answer contains the word to recall."""
    tokenizer = load_tokenizer(base, chat_template=None)
    model = open_trained(final, dtype=torch.float32, device=torch.device("cpu"), say=lambda _: None)
    correct = 0
    for begin in range(0, len(rows), 20):
        some = rows[begin : begin + 20]
        prompts = [tokenizer.encode_prompt(row["messages"][:1]) for row in some]
        answers = generate(model, prompts, end_ids=tokenizer.end_ids, max_new_tokens=24)
        correct += sum(row["key"] in tokenizer.decode(ids) for row, ids in zip(some, answers, strict=True))
    return correct / len(rows)


def _done(out: Path) -> set[tuple[Any, ...]]:
    lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    runs = (json.loads(line) for line in lines)
    return {(run["base"], run["kind"], run["rows"], *run["asked"]) for run in runs}


def _points(bases: list[str], *, auto: bool) -> Iterator[tuple[str, int, Any, Any, str]]:
    """Yield kind, rows, batch size, epochs and base of each run, in the order of the grid."""
    if auto:
        for kind, rows in dict.fromkeys((kind, rows) for kind, rows, *_ in _GRID):
            yield from ((kind, rows, "auto", "auto", base) for base in bases)
        return
    for kind, rows, batch, epoch_counts in _GRID:
        for epochs, base in itertools.product(epoch_counts, bases):
            yield kind, rows, batch, epochs, base


def main() -> None:
    """Run the missing runs of the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=sorted(_HELD_OUT), help="only one kind of rows")
    parser.add_argument(
        "--auto", action="store_true", help="use the automatic settings for each kind and number of rows instead of the grid"
    )
    options = parser.parse_args()
    cache = Path(tempfile.mkdtemp(prefix="small-data-"))
    try:
        for kind, rows, batch, epochs, named in _points(options.base, auto=options.auto):
            name, _, folder = named.partition("=")
            if (name, kind, rows, batch, epochs) in _done(options.out) or options.only not in (None, kind):
                continue
            chosen = {"training.batch_size": batch, "training.epochs": epochs}
            measured = measure(kind, rows, Path(folder).resolve(), chosen, cache)
            line = {"base": name, "kind": kind, "rows": rows, "asked": [batch, epochs], **measured}
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
    finally:
        shutil.rmtree(cache)


if __name__ == "__main__":
    main()
