"""Compares training steps with and without compilation, alternately in one process: prints one JSON object.

    python benchmarks/step_speed.py --model DIR [--method lora] [--rounds 6] [--threads 2]

A step has nine documents of log-normal length, about 200 tokens each; a quarter of the tokens are targets; both variants get the same
documents. For each variant: tokens per second in wall time and in CPU time (which does not depend on other work on the machine), the shares
of forward, backward and update, and the share of the machine's bfloat16 product rate, measured in the same process, that the step reaches
with the products it needs: frozen matrices forward and for the gradient of the input, trained ones once more, attention below the diagonal.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from llamahome.config.schema import LoraConfig
from llamahome.data.records import Microbatch
from llamahome.model.backends.cpu.backend import CpuBackend
from llamahome.model.load import load_model
from llamahome.model.lora import add_lora
from llamahome.model.objective import Objective
from llamahome.model.place import trained_parameters
from llamahome.model.precision import Precision

_TOKENS_PER_TARGET = 4
_DOCUMENTS = 9


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--method", choices=["lora", "full"], default="lora")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if reason := CpuBackend(Precision(torch.float32, torch.float32, "a benchmark")).cannot_compile():
        raise SystemExit(reason)
    variants = {name: _learner(options.model, options.method, each) for name, each in (("plain", False), ("compiled", True))}
    random = torch.Generator().manual_seed(0)
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    peaks = []
    for number in range(options.rounds + 1):
        batch = _batch(random)
        for name, variant in variants.items():
            figure = _step(*variant, batch)
            if number > 0:  # the first warms up
                figures[name].append(figure)
        peaks.append(_product_rate())
    peak = statistics.median(peaks)
    print(
        json.dumps({"method": options.method, "peak_gflops": round(peak), **{name: _sum_up(each, peak) for name, each in figures.items()}})
    )


def _learner(folder: Path, method: str, compiled: bool) -> tuple[Objective, torch.optim.Optimizer]:
    precision = Precision(torch.bfloat16 if method == "lora" else torch.float32, torch.bfloat16, "a benchmark")
    model = load_model(folder, dtype=precision.storage, device=torch.device("cpu"))
    if method == "lora":
        add_lora(model, LoraConfig(), base="benchmark", seed=0, lean=True)
    model.train()
    backend = CpuBackend(precision)
    if compiled:
        backend.compile(model)
    optimizer = torch.optim.AdamW(trained_parameters(model).values(), lr=1e-4, fused=True)
    return Objective(model, backend), optimizer


def _batch(random: torch.Generator) -> Microbatch:
    sizes = (torch.randn(_DOCUMENTS, generator=random) * 0.75 + 5).exp().clamp(20, 1500).int()
    lengths = tuple(sorted(sizes.tolist(), reverse=True))
    tokens = sum(lengths)
    return Microbatch(
        index=0,
        tokens_T=torch.randint(0, 49_000, (tokens,), generator=random),
        positions_T=torch.cat([torch.arange(length) for length in lengths]),
        lengths=lengths,
        rows_N=torch.randperm(tokens, generator=random)[: tokens // _TOKENS_PER_TARGET].sort().values,
        labels_N=torch.randint(0, 49_000, (tokens // _TOKENS_PER_TARGET,), generator=random),
        keys=tuple(range(len(lengths))),
    )


def _step(objective: Objective, optimizer: torch.optim.Optimizer, batch: Microbatch) -> dict[str, float]:
    marks = [(time.perf_counter(), time.process_time())]

    def mark() -> None:
        marks.append((time.perf_counter(), time.process_time()))

    loss = objective.loss_sum(batch) / len(batch.labels_N)
    mark()
    loss.backward()
    mark()
    optimizer.step()
    optimizer.zero_grad()
    mark()
    wall, cpu = (marks[-1][kind] - marks[0][kind] for kind in (0, 1))
    parts = {
        name: (after[1] - before[1]) / cpu for name, before, after in zip(("forward", "backward", "update"), marks, marks[1:], strict=False)
    }
    tokens = len(batch.tokens_T)
    return {"seconds": wall, "processor_seconds": cpu, "tokens": tokens, "gflop": _gflop(objective, batch), **parts}


def _gflop(objective: Objective, batch: Microbatch) -> float:
    """GFLOP of the products that this step needs."""
    model = objective.model
    config = model.config.get_text_config()
    head = model.get_output_embeddings().weight
    times = {False: 4, True: 6}
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and p is not head and "embed" not in name]
    layers = sum(times[p.requires_grad] * p.numel() for p in matrices) * len(batch.tokens_T)
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    attention = 6 * 2 * width * config.num_hidden_layers * sum(length**2 / 2 for length in batch.lengths)
    return (layers + times[head.requires_grad] * head.numel() * len(batch.labels_N) + attention) / 1e9


def _product_rate() -> float:
    """GFLOP per second, best of ten, of 2,048 x 576 by 576 x 1,536 in bfloat16."""
    a, b, best = torch.ones(2048, 576, dtype=torch.bfloat16), torch.ones(1536, 576, dtype=torch.bfloat16), float("inf")
    for _ in range(10):
        start = time.perf_counter()
        a @ b.t()
        best = min(best, time.perf_counter() - start)
    return 2 * 2048 * 576 * 1536 / best / 1e9


def _sum_up(figures: Sequence[dict[str, float]], peak: float) -> dict[str, float]:
    rates = {"tokens_per_second": "seconds", "tokens_per_processor_second": "processor_seconds"}
    speeds = {name: round(statistics.median(each["tokens"] / each[key] for each in figures), 1) for name, key in rates.items()}
    share = statistics.median(each["gflop"] / each["seconds"] for each in figures) / peak
    parts = {part: round(statistics.median(each[part] for each in figures), 3) for part in ("forward", "backward", "update")}
    return {**speeds, "share_of_peak": round(share, 3), **parts}


if __name__ == "__main__":
    main()
