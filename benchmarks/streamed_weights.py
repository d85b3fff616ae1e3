"""LoRA beside a frozen base that is larger than memory, compared with the same run that holds it.

    python -m benchmarks.streamed_weights FOLDER --limit "3 GB" [--hidden 3072 --inner 8192 --layers 28 --heads 24 --keys 8]
        [--rows 4] [--words 20] [--steps 3] [--rounds 1] [--set KEY=VALUE ...]

Writes a random bfloat16 base of that shape (by default that of Llama 3.2 3B with a vocabulary of 49,152: 5.9 GB) into FOLDER, tensor by
tensor, once. Then it trains as `llamahome train` does, in turn under a limit of a control group and without one, and prints the tokens a
second of every step but the first. The cache of the base is emptied before each run under the limit, which else would be charged to others.
Needs the right to make control groups (root); the base is not deleted.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.support.memory_limits import memory_limit
from tests.support.tokenizers import save_tokenizer
from transformers import LlamaConfig

from benchmarks.random_weights import write_random_weights
from llamahome.units import parse_bytes

VOCABULARY = 49_152
WORDS = ("the", "model", "reads", "one", "row", "after", "another", "and", "learns", "what", "it", "answers")


def write_base(folder: Path, config: LlamaConfig) -> None:
    """A random base with the tokenizer of the tests."""
    write_random_weights(folder, config)
    config.save_pretrained(folder)
    save_tokenizer(folder)


def write_rows(path: Path, *, words: int) -> None:
    """64 rows, each with an answer of so many words."""
    source = random.Random(0)
    rows = [{"prompt": "Go on.", "completion": " ".join(source.choices(WORDS, k=words))} for _ in range(64)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def empty_cache(folder: Path) -> None:
    """Let the system forget what it has read of the base."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def train(work: Path, base: Path, settings: list[str], *, enter: Callable[[], None] | None) -> list[float]:
    """Tokens a second of every step but the first, whose matrices are allocated and code is read."""
    command = [sys.executable, "-m", "llamahome", "train", str(work / "rows.jsonl"), "--model", str(base), *settings]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, preexec_fn=enter, check=False)
    if done.returncode:
        raise SystemExit(f"{done.stderr[-2000:]}\nexit status {done.returncode}")
    print("\n".join(line for line in done.stderr.splitlines() if "the base takes" in line or line.startswith("a step is")))
    newest = max((work / "data/metrics/logs").iterdir(), key=lambda each: each.stat().st_mtime)
    rows = [json.loads(line) for line in (newest / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["speed/tokens_per_s"] for row in rows if row.get("step", 0) > 1 and "speed/tokens_per_s" in row]


def main() -> None:
    """Read the command line, train in turn with and without the limit, and print the rates."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=parse_bytes, default=3 * 10**9)
    for name, value in {"hidden": 3072, "inner": 8192, "layers": 28, "heads": 24, "keys": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in {"rows": 4, "words": 20, "steps": 3, "rounds": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--set", action="append", default=[], dest="more")
    asked = parser.parse_args()
    work, base = asked.folder.resolve(), asked.folder.resolve() / "base"
    if not base.is_dir():
        shape = {"hidden_size": asked.hidden, "intermediate_size": asked.inner, "num_hidden_layers": asked.layers}
        heads = {"num_attention_heads": asked.heads, "num_key_value_heads": asked.keys, "tie_word_embeddings": True}
        ids = {"bos_token_id": 0, "eos_token_id": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 4096}
        write_base(base, LlamaConfig(**shape, **heads, **ids, dtype="bfloat16", architectures=["LlamaForCausalLM"]))
    write_rows(work / "rows.jsonl", words=asked.words)
    fixed = [f"training.batch_size={asked.rows}", "data.eval_split=0", "evaluation.sample_prompts=0", "checkpoint.every=24 h"]
    settings = ["--max-steps", str(asked.steps), *(word for each in (*fixed, *asked.more) for word in ("--set", each))]
    rates: dict[str, list[float]] = {"under the limit": [], "in memory": []}
    for _ in range(asked.rounds):
        empty_cache(base)
        with memory_limit(asked.limit) as enter:
            if enter is None:
                raise SystemExit("no control group can be made here")
            rates["under the limit"] += train(work, base, settings, enter=enter)
        rates["in memory"] += train(work, base, settings, enter=None)
    for name, found in rates.items():
        print(f"{name:<16} {statistics.median(found):8.1f} tokens/s, of {len(found)} steps: {', '.join(f'{rate:.1f}' for rate in found)}")
    print(f"ratio            {statistics.median(rates['under the limit']) / statistics.median(rates['in memory']):8.2f}")


if __name__ == "__main__":
    main()
