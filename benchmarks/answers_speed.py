"""Measures how much faster answers are generated in batches than one prompt at a time: prints one JSON object.

    python benchmarks/answers_speed.py --model data/models/base/smollm2-135m-instruct [--prompts 32] [--tokens 48] [--rounds 3]

Prompts are 20 to 60 tokens long, of one seed. No answer ends early, so both ways generate the same number of tokens. The ways take turns;
the ratio is the median over the rounds. Other work on the machine slows both, and not always equally.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from llamahome.model.adapter import open_trained
from llamahome.training.answering import generate_answers


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True, help="a model folder, or an adapter")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = open_trained(options.model, dtype=torch.float32, device=device, say=lambda _: None)
    source = random.Random(0)
    prompts = [[source.randrange(100, 1000) for _ in range(source.randint(20, 60))] for _ in range(options.prompts)]
    ways = {"one_at_a_time_s": 1, "batched_s": 16_384}

    def answer(budget: int) -> None:
        generate_answers(model, prompts, end_ids=[], max_new_tokens=options.tokens, batch_tokens=budget)

    generate_answers(model, prompts[:2], end_ids=[], max_new_tokens=2)
    rounds = [{name: seconds(lambda budget=budget: answer(budget)) for name, budget in ways.items()} for _ in range(options.rounds)]
    results: dict[str, float] = {name: round(statistics.median(each[name] for each in rounds), 2) for name in ways}
    results["times_faster"] = round(statistics.median(each["one_at_a_time_s"] / each["batched_s"] for each in rounds), 2)
    results["tokens_per_s_batched"] = round(options.prompts * options.tokens / results["batched_s"], 1)
    results["threads"] = torch.get_num_threads()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
