"""Runs the commands on the device: train, resume to identical weights, answer a prompt; and two processes."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from tests.support.tokenizers import save_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.client import environment
from benchmarks.gpu.shapes import TOY, Shape

_MIDDLE = Shape("middle", 1024, 2816, 8, 16, 8, 512, True)
_ROWS, _STEPS = 64, 6


def run(device: torch.device, toy: bool) -> Iterator[dict[str, Any]]:
    """Compare six steps with three steps and a resume; then answer a prompt."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = _project(Path(scratch), TOY if toy else _MIDDLE)
        cpu_options = [] if device.type == "cuda" else ["--set", "model.backend=cpu"]
        started = time.perf_counter()
        _llamahome(folder, *_train(folder, "whole", _STEPS), *cpu_options)
        train_s = time.perf_counter() - started
        _llamahome(folder, *_train(folder, "half", _STEPS), "--set", f"checkpoint.every={_STEPS // 2} steps", *cpu_options)
        checkpoint = folder / "half" / f"checkpoint-{_STEPS // 2}"
        _llamahome(folder, "train-resume", str(checkpoint), "--output", str(folder / "resumed"))
        adapters = [safetensors.torch.load_file(folder / run / "final/adapter_model.safetensors") for run in ("whole", "resumed")]
        same = all(torch.equal(each, adapters[1][name]) for name, each in adapters[0].items())
        yield {"check": "resumed run has the same bits", "ok": same, "train_s": round(train_s, 1)}
        answer = _llamahome(folder, "chat", str(folder / "resumed"), "--prompt", "Hello", "--max-new-tokens", "8")
        yield {"check": "an answer", "ok": answer.returncode == 0}


def two_processes(device: torch.device, toy: bool) -> Iterator[dict[str, Any]]:
    """Compare the losses of one and two processes; needs two GPUs, or the CPU."""
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        yield {"skipped": "there is one GPU"}
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = _project(Path(scratch), TOY if toy else _MIDDLE)
        losses = {}
        for ranks in (1, 2):
            _llamahome(folder, *_train(folder, f"ranks-{ranks}", _STEPS), "--world-size", str(ranks))
            (metrics,) = (folder / "data/metrics/logs").glob(f"*ranks-{ranks}*/metrics.jsonl")
            losses[ranks] = [record["train/loss"] for record in map(json.loads, metrics.read_text().splitlines()) if "train/loss" in record]
        difference = max(abs(one / two - 1) for one, two in zip(losses[1], losses[2], strict=True))
        yield {"check": "two processes train like one", "loss": difference, "ok": difference < 1e-2}


def _project(folder: Path, shape: Shape) -> Path:
    """Write a model with random weights and a file of rows."""
    model = folder / "model"
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape.values), dtype=torch.bfloat16).save_pretrained(model)
    save_tokenizer(model, vocabulary=shape.vocabulary)
    rows = [{"prompt": f"How many are {n} and {n + 1}?", "completion": f"They are {2 * n + 1}. " * (1 + n % 7)} for n in range(_ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def _train(folder: Path, name: str, steps: int) -> list[str]:
    settings = {"training.batch_size": 8, "data.eval_split": 0, "evaluation.sample_prompts": 0, "training.warmup": 0}
    options = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    return ["train", "rows.jsonl", "--model", "model", "--output", name, "--max-steps", str(steps), *options]


def _llamahome(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llamahome", *words]
    variables = {name: value for name, value in environment().items() if name not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    result = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(words[:2])} failed with {result.returncode}: {result.stderr.strip()[-300:]}")
    return result
