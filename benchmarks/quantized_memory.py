"""The peak memory of LoRA beside a base of 3 billion parameters in 4 bits, at rows of 512 tokens.

    python -m benchmarks.quantized_memory FOLDER [--kind nf4|int8] [--steps 2] [--set KEY=VALUE ...]

Writes a random base of the shape of Llama 3.2 3B (with the vocabulary of the starter, whose tokenizer it takes) into FOLDER, tensor by
tensor in bfloat16, once: 5.9 GB. Then it trains as `llamahome train` does and prints the peak of the process, which quantises the base
first if that has not been done. The peak is VmHWM of Linux, memory-mapped pages of files included; the anonymous part is beside it.
"""

import argparse
import json
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

from transformers import LlamaConfig

from benchmarks.random_weights import write_random_weights
from llamahome.model.auxiliary_files import copy_auxiliary_files
from llamahome.rundir import BASE_MODELS

STARTER = BASE_MODELS / "smollm2-135m-instruct"
SHAPE = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8}
ROWS, WORDS = 16, 700


def write_base(folder: Path) -> None:
    """A random base of SHAPE with the starter's tokenizer."""
    config = json.loads((STARTER / "config.json").read_text(encoding="utf-8")) | SHAPE | {"head_dim": 128}
    write_random_weights(folder, LlamaConfig(**config))
    copy_auxiliary_files(STARTER, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def write_rows(path: Path) -> None:
    """Rows of more than 512 tokens, which are cut to that."""
    source, words = random.Random(0), ("the", "model", "reads", "one", "row", "after", "another", "and", "learns", "what", "it", "answers")
    lines = [{"prompt": "Go on.", "completion": " ".join(source.choices(words, k=WORDS))} for _ in range(ROWS)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def memory_of(process: int) -> dict[str, int]:
    """Bytes by the names that Linux gives them; empty when the process has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    return {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmHWM", "RssAnon"))}


def train(folder: Path, kind: str, steps: int, more: list[str]) -> dict[str, float]:
    """Train in a process of its own and watch its memory."""
    words = [
        "train",
        str(folder / "rows.jsonl"),
        "--model",
        str(folder / "base"),
        "--output",
        str(folder / f"run-{kind}-{int(time.time())}"),
    ]
    settings = [f"model.quantization={kind}", "data.max_length=512", "data.max_lost_share=1", "data.eval_split=0", "training.batch_size=1"]
    settings += ["training.micro_batch_tokens=512", "evaluation.sample_prompts=0", *more]
    command = [sys.executable, "-m", "llamahome", *words, "--max-steps", str(steps)]
    process = subprocess.Popen([*command, *(word for each in settings for word in ("--set", each))], stderr=subprocess.PIPE, text=True)
    most: dict[str, int] = {}

    def watch() -> None:
        while process.poll() is None:
            for name, value in memory_of(process.pid).items():
                most[name] = max(most.get(name, 0), value)
            time.sleep(0.02)

    thread = threading.Thread(target=watch)
    thread.start()
    assert process.stderr is not None
    for line in process.stderr:
        print(f"  {line}", end="", flush=True)
    thread.join()
    if process.returncode:
        raise SystemExit(process.returncode)
    return {f"{name}_gb": round(value / 1e9, 2) for name, value in most.items()}


def main() -> None:
    """Read the command line, and print one JSON object at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", default="nf4", choices=("nf4", "int8"))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], dest="more")
    typed = parser.parse_args()
    if not (typed.folder / "base").is_dir():
        write_base(typed.folder / "base")
    write_rows(typed.folder / "rows.jsonl")
    print(json.dumps({"kind": typed.kind} | train(typed.folder, typed.kind, typed.steps, typed.more)))


if __name__ == "__main__":
    main()
