"""Teaches the starter a format by rewards alone (training.objective grpo), and draws the curve of the reward.

    python -m benchmarks.learn_format --out build/format [--steps 80] [--picture docs/pictures/grpo-format.png]

The prompts ask for three things of a kind as a JSON list of strings. No row shows such an answer: the reference that every row must have is
empty of them, and the reward only reads what the model wrote. The reward is 1 for a list of exactly three different strings and nothing
behind it; parts of the form earn parts of it, because a format that never occurs by chance cannot be learned from rewards. Prompts of kinds
that training never saw are answered greedily before and after. On two cores it takes about a quarter of an hour.
"""

import argparse
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

from llamahome import pipeline
from llamahome.config.load import load_config

SEEN = """
animals birds fish insects trees flowers fruits vegetables spices drinks desserts colours shapes metals gems tools vehicles sports games
instruments dances clothes shoes toys machines planets rivers mountains oceans islands countries cities languages currencies jobs buildings
rooms books poets painters composers inventors kings scientists feelings virtues seasons months weekdays numbers
"""
UNSEEN = "mammals reptiles cheeses sauces hats boats lakes deserts novels heroes holidays elements"
QUESTION = "Name three {kind}. Answer with a JSON list of three strings and nothing else."
REWARD = '''"""The reward of benchmarks/learn_format.py."""

import json


def score(answer, reference):
    """1 for a JSON list of three different strings; parts of the form earn parts."""
    try:
        found = json.loads(answer)
    except ValueError:
        return 0.15 * answer.startswith("[") + 0.1 * ("]" in answer) + 0.1 * answer.endswith("]") + 0.05 * ('"' in answer)
    if not isinstance(found, list) or not found or not all(isinstance(each, str) for each in found):
        return 0.2
    return 0.5 + 0.5 / (1 + abs(len(set(found)) - 3))
'''


def write_project(folder: Path) -> tuple[Path, Path, Path]:
    """The files of rows for training and for measuring, and of the reward."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, kinds in (("rows.jsonl", SEEN), ("unseen.jsonl", UNSEEN)):
        rows = [{"prompt": QUESTION.format(kind=kind), "completion": "-"} for kind in kinds.split()]
        paths.append(folder / name)
        paths[-1].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    return paths[0], paths[1], folder / "reward.py"


def run(folder: Path, *, steps: int, assignments: list[str]) -> dict[str, Any]:
    """Train; returns the seconds, and from each step what was recorded."""
    rows, unseen, reward = write_project(folder)
    settings = [
        "training.objective=grpo",
        f"grpo.reward={reward}:score",
        f"training.max_steps={steps}",
        "training.batch_size=4",
        "training.schedule=constant",
        "grpo.max_new_tokens=32",
        f"data.eval_path={unseen}",
        f"evaluation.metric={reward}:score",
        "evaluation.every=1000 steps",
        "checkpoint.every=1000 steps",
        f"output.dir={folder / 'run'}",
    ]
    begun = time.monotonic()
    result = pipeline.train([str(rows)], load_config([], flags={}, assignments=[*settings, *assignments]))
    seconds = time.monotonic() - begun
    lines = [json.loads(line) for line in (result.paths.metrics_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps_found = [line for line in lines if "train/reward" in line]
    evaluated = [value for line in lines for name, value in line.items() if name.startswith("eval/") and name.endswith("score")]
    return {"seconds": seconds, "steps": steps_found, "unseen": evaluated}


def draw(found: dict[str, Any], picture: Path) -> None:
    """The mean reward of every step, by minutes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes, steps = figure.subplots(), found["steps"]
    begun, scale = steps[0]["t"], found["seconds"] / max(1.0, steps[-1]["t"] - steps[0]["t"]) / 60
    minutes = [(line["t"] - begun) * scale for line in steps]
    rewards = [line["train/reward"] for line in steps]
    axes.plot(minutes, rewards, color="#b5482a")
    axes.set(
        xlabel="minutes on two cores", ylabel="mean reward of a step", ylim=(0, 1.02), title="The starter learns a format from rewards"
    )
    axes.grid(alpha=0.3)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=130)


def main() -> None:
    """Run, print one JSON object, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="Folder for rows, reward and run; must not hold a run.")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    asked = parser.parse_args()
    if asked.picture is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--picture needs matplotlib: pip install matplotlib")
    found = run(asked.out, steps=asked.steps, assignments=asked.set)
    (asked.out / "result.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    first, last = ([line["train/reward"] for line in part] for part in (found["steps"][:5], found["steps"][-5:]))
    means = {"first": sum(first) / len(first), "last": sum(last) / len(last)}
    print(json.dumps({"minutes": round(found["seconds"] / 60, 1), "reward": means, "unseen": found["unseen"]}))
    if asked.picture is not None:
        draw(found, asked.picture)


if __name__ == "__main__":
    main()
