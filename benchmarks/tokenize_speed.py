"""How fast rows become examples, beside the usual recipe on the same rows: prints one JSON object.

    python benchmarks/tokenize_speed.py --model DIR [--rows 20000] [--rounds 3] [--venv DIR]

The recipe is the single-process one that trainers use: datasets.load_dataset, map(apply_chat_template), map(tokenize). It runs in a virtual
environment of its own that this script makes (pip install datasets and this transformers), in a process that has imported everything and
writes no cache files. Ours reads, tokenizes, marks what is learned and writes the store, and starts its processes within the time. The two
take turns; the medians count. `by_processor_time` is what the clock would say on a machine where nothing else runs: the processor time of
the recipe over that of ours on all processors.
"""

import argparse
import importlib.metadata
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

from llamahome.config.schema import DataConfig
from llamahome.data.prepare import read_all
from llamahome.data.sample import write_sample
from llamahome.data.tokens import load_tokenizer
from llamahome.distributed.processors import usable_cpus

_PEER = """
import json, sys, tempfile, time
import datasets
from transformers import AutoTokenizer

datasets.disable_caching()
datasets.disable_progress_bars()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])

def render(row):
    return {"text": tokenizer.apply_chat_template(row["messages"], tokenize=False)}

def tokenize(row):
    return tokenizer(text=row["text"], add_special_tokens=False)

print("ready", flush=True)
for line in sys.stdin:
    begin, busy = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as cache:
        rows = datasets.load_dataset("json", data_files=sys.argv[2], split="train", cache_dir=cache)
        rows = rows.map(render, remove_columns=["messages"]).map(tokenize, remove_columns=["text"])
        seconds, busy = time.perf_counter() - begin, time.process_time() - busy
        print(json.dumps([seconds, busy, sum(map(len, rows["input_ids"]))]), flush=True)
"""


def write_rows(path: Path, count: int) -> None:
    """The sample data until there are `count` rows, each its own by a number."""
    write_sample(path, rows=None)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            asked, told = rows[number % len(rows)]["messages"]
            file.write(json.dumps({"messages": [{**asked, "content": f"{number}. {asked['content']}"}, told]}) + "\n")


def peer_python(folder: Path) -> str:
    """The interpreter of the recipe's environment, made now unless it is there."""
    python = folder / "bin/python"
    if not (folder / "ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        same = [f"{name}=={importlib.metadata.version(name)}" for name in ("transformers", "tokenizers", "jinja2", "numpy")]
        subprocess.run([python, "-m", "pip", "install", "-q", "datasets", *same], check=True, stdout=sys.stderr)
        (folder / "ready").touch()
    return str(python)


def busy_seconds() -> float:
    """Processor time of this process and of those that it waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def ours(rows: Path, model: str) -> tuple[float, float, int]:
    """Seconds, processor seconds and tokens of one preparation from nothing."""
    tokenizer = load_tokenizer(model)
    with tempfile.TemporaryDirectory() as folder:
        begin, busy = time.perf_counter(), busy_seconds()
        found = read_all(DataConfig(max_length=1 << 20), str(rows), tokenizer, say=lambda text: None, processed=Path(folder))
        return time.perf_counter() - begin, busy_seconds() - busy, found.counts.tokens


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="a folder with a tokenizer and a chat template")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--venv", type=Path, default=Path(tempfile.gettempdir()) / "llamahome-recipe-venv")
    given = parser.parse_args()
    model, python = str(Path(given.model).resolve()), peer_python(given.venv.resolve())
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        rows = Path("rows.jsonl")
        write_rows(rows, given.rows)
        words = [python, "-c", _PEER, model, str(rows)]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_HOME": folder}
        times: dict[str, list[float]] = {"recipe": [], "ours": []}
        busy: dict[str, list[float]] = {"recipe": [], "ours": []}
        tokens = {}
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as peer:
            assert peer.stdin is not None and peer.stdout is not None
            peer.stdout.readline()
            for _ in range(given.rounds):
                print("go", file=peer.stdin, flush=True)
                for name in times:
                    seconds, used, tokens[name] = json.loads(peer.stdout.readline()) if name == "recipe" else ours(rows, model)
                    times[name].append(seconds)
                    busy[name].append(used)
            peer.stdin.close()
        middle = {name: statistics.median(each) for name, each in times.items()}
        size = rows.stat().st_size
    processors, used = usable_cpus(), {name: statistics.median(each) for name, each in busy.items()}
    result = {
        "rows": given.rows,
        "mb": round(size / 1e6, 1),
        "tokens": tokens,
        "seconds": {name: [round(each, 2) for each in some] for name, some in times.items()},
        "rows_per_s": {name: round(given.rows / each) for name, each in middle.items()},
        "tokens_per_s": {name: round(tokens[name] / each) for name, each in middle.items()},
        "times_the_recipe": round(middle["recipe"] / middle["ours"], 2),
        "processor_seconds": {name: round(each, 2) for name, each in used.items()},
        "by_processor_time": round(used["recipe"] / (used["ours"] / processors), 2),
        "processors": processors,
        "load": os.getloadavg()[0],
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
