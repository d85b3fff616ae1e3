"""A small complete results file for the tests of tables, pages and charts."""

from typing import Any

from benchmarks.figures import compare

STEP = {"rows": 8, "tokens": 1600, "targets": 400, "squares": 400_000, "loss": 2.5}


def measured(title: str, *seconds: float, tuned: bool = True) -> dict[str, Any]:
    rounds = [{"seconds": each, "steps": [STEP], "hash": "00ff", "peak": int(1e9 * seconds[0])} for each in seconds]
    return {"title": title, "tuned": tuned, "rounds": rounds}


def scenario(title: str, factor: float = 1.0) -> dict[str, Any]:
    systems = {
        "ours": measured("llamahome", 2.0 * factor, 2.2 * factor) | {"peak_flops": 6e11},
        "plain": measured("plain PyTorch loop", 4.0, 4.4),
        "trl": measured("TRL, micro-batch 1", 8.0, 8.8),
        "litgpt": {"title": "litgpt", "tuned": True, "rounds": [], "error": "cannot be installed: no network"},
        "trl-default": measured("TRL, default", 20.0, 22.0, tuned=False),
    }
    return {"title": title, "words": "8 rows a step", **compare(systems)}


def results() -> dict[str, Any]:
    rounds = [{"first": 4.0, "twentieth": 9.0, "peak": 2 * 10**9}]
    parts = {"data": 0.01, "forward": 0.8, "backward": 1.1, "exchange": 0.0, "update": 0.05}
    checkpoint = {"seconds": 0.02, "saves": 3, "step": 2.0, "of_a_step": 0.01, "of_training": 0.02 / 600, "beside": 0.1, "parts": parts}
    start = {
        "systems": {
            "ours": {"title": "llamahome", "cold": {"first": 30.0}, "rounds": rounds},
            "trl": {"title": "TRL", "cold": None, "rounds": [], "error": "ended: no memory"},
        },
        "steps": 20,
        "batch": 2,
        "resume": {"median": 5.0, "low": 4.9, "high": 5.1},
        "checkpoint": checkpoint,
        "preparation": {"rows": 10, "rows_per_s": {"trl": 1200, "ours": 5600}, "times_as_fast_as": {"trl": 4.67}, "processors": 2},
    }
    quality = {
        "method": "lora",
        "rows": 96,
        "steps": 12,
        "held_out": 40,
        "before": 3.0,
        "ours": 2.502,
        "trl-fp32": 2.5,
        "difference": 0.0008,
    }
    machine = {"processor": "a processor", "cores": 2, "memory_gb": 24.0, "torch": "2.13.0", "python": "3.11.7", "load": 0.1}
    lengths = {f"rows-{length}-lora": scenario(f"LoRA, all rows {length} tokens", length / 256) for length in (64, 1024)}
    return {
        "date": "2026-11-22",
        "commands": ["make bench"],
        "machine": machine,
        "speed": {"docstrings-lora": scenario("LoRA, docstrings"), "rows-256-lora": scenario("LoRA, all rows 256 tokens")},
        "length": lengths,
        "start": start,
        "quality": {"lora": quality},
        "raw": {},
    }
