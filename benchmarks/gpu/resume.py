"""The program itself on the device, as users type it: train, stop, resume to the same bits, answer; and two processes."""

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
    """Six steps at once beside three and three; then an answer."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = _project(Path(scratch), TOY if toy else _MIDDLE)
        processor = [] if device.type == "cuda" else ["--set", "model.backend=cpu"]
        started = time.perf_counter()
        _llamahome(folder, *_train(folder, "whole", _STEPS), *processor)
        whole_s = time.perf_counter() - started
        _llamahome(folder, *_train(folder, "half", _STEPS), "--set", f"checkpoint.every={_STEPS // 2} steps", *processor)
        checkpoint = folder / "half" / f"checkpoint-{_STEPS // 2}"
        _llamahome(folder, "train-resume", str(checkpoint), "--output", str(folder / "resumed"))
        adapters = [safetensors.torch.load_file(folder / run / "final/adapter_model.safetensors") for run in ("whole", "resumed")]
        same = all(torch.equal(each, adapters[1][name]) for name, each in adapters[0].items())
        yield {"check": "resumed run has the same bits", "ok": same, "train_s": round(whole_s, 1)}
        told = _llamahome(folder, "chat", str(folder / "resumed"), "--prompt", "Hello", "--max-new-tokens", "8")
        yield {"check": "an answer", "ok": told.returncode == 0}


def two_processes(device: torch.device, toy: bool) -> Iterator[dict[str, Any]]:
    """The same steps on two processes, where there are two GPUs (or none)."""
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
        apart = max(abs(one / two - 1) for one, two in zip(losses[1], losses[2], strict=True))
        yield {"check": "two processes train like one", "loss": apart, "ok": apart < 1e-2}


def _project(folder: Path, shape: Shape) -> Path:
    """A model of random weights and a file of rows."""
    model = folder / "model"
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape.values), dtype=torch.bfloat16).save_pretrained(model)
    save_tokenizer(model, vocabulary=shape.vocabulary)
    rows = [{"prompt": f"How many are {n} and {n + 1}?", "completion": f"They are {2 * n + 1}. " * (1 + n % 7)} for n in range(_ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def _train(folder: Path, name: str, steps: int) -> list[str]:
    settings = {"training.batch_size": 8, "data.eval_split": 0, "evaluation.sample_prompts": 0, "training.warmup": 0}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    return ["train", "rows.jsonl", "--model", "model", "--output", name, "--max-steps", str(steps), *words]


def _llamahome(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llamahome", *words]
    kept = {name: value for name, value in environment().items() if name not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    done = subprocess.run(command, cwd=folder, env=kept, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words[:2])} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return done
