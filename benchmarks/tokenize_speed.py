"""How fast rows become examples, beside TRL on the same rows: prints one JSON object.

    python benchmarks/tokenize_speed.py --model DIR [--rows 20000] [--rounds 3] [--venv DIR]

`trl` is what SFTTrainer does to prompts and completions before it trains, by its own code in one process: ids and labels. `text_only` is
the leanest recipe of its kind, without labels: map(apply_chat_template), map(tokenize). Both read with datasets.load_dataset, in a
virtual environment that this script makes, in a process that has imported everything, and write what datasets writes. Ours reads,
tokenizes, marks what is learned and writes the store, and starts its processes within the time. They take turns; the medians count.
`by_processor_time` is what the clock would say on a machine where nothing else runs: the processor time of the other over that of ours on
all processors.
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
from llamahome.data.text.tokens import load_tokenizer
from llamahome.distributed.processors import usable_cpus

_TRL = "trl==1.16.0"

_PEER = """
import json, os, sys, tempfile, time
import datasets
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

datasets.disable_caching()
datasets.disable_progress_bars()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
model = LlamaForCausalLM(config)
first = datasets.Dataset.from_list([json.loads(open(sys.argv[2]).readline())])
with tempfile.TemporaryDirectory() as out:
    settings = SFTConfig(out, use_cpu=True, bf16=False, max_length=1 << 20, completion_only_loss=True, report_to="none", disable_tqdm=True)
    trainer = SFTTrainer(model=model, args=settings, train_dataset=first, processing_class=tokenizer)

def render(row):
    return {"text": tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)}

def tokenize(row):
    return tokenizer(text=row["text"], add_special_tokens=False)

def text_only(rows):
    return rows.map(render, remove_columns=["prompt", "completion"]).map(tokenize, remove_columns=["text"])

def trl(rows):
    return trainer._prepare_dataset(rows, tokenizer, settings, False, None, "train")

print("ready", flush=True)
for line in sys.stdin:
    begin, busy = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as cache:
        rows = {"trl": trl, "text_only": text_only}[line.strip()](
            datasets.load_dataset("json", data_files=sys.argv[2], split="train", cache_dir=cache)
        )
        seconds, busy = time.perf_counter() - begin, time.process_time() - busy
        tokens = sum(map(len, rows["input_ids"]))
        targets = sum(sum(label != -100 for label in row) for row in rows["labels"]) if "labels" in rows.column_names else None
        print(json.dumps([seconds, busy, tokens, targets]), flush=True)
"""


def write_rows(path: Path, count: int) -> None:
    """The sample data until there are `count` rows, each its own by a number."""
    write_sample(path, rows=None)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            asked, told = rows[number % len(rows)]["messages"]
            file.write(json.dumps({"prompt": [{**asked, "content": f"{number}. {asked['content']}"}], "completion": [told]}) + "\n")


def peer_python(folder: Path) -> str:
    """The interpreter of the recipe's environment, made now unless it is there."""
    python = folder / "bin/python"
    if not (folder / "ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        same = [
            f"{name}=={importlib.metadata.version(name).partition('+')[0]}"
            for name in ("torch", "transformers", "tokenizers", "jinja2", "numpy")
        ]
        subprocess.run([python, "-m", "pip", "install", "-q", _TRL, *same], check=True, stdout=sys.stderr)
        (folder / "ready").touch()
    return str(python)


def busy_seconds() -> float:
    """Processor time of this process and of those that it waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def ours(rows: Path, model: str) -> tuple[float, float, int, int]:
    """Seconds, processor seconds, tokens and targets of one preparation from nothing."""
    tokenizer = load_tokenizer(model)
    with tempfile.TemporaryDirectory() as folder:
        begin, busy = time.perf_counter(), busy_seconds()
        found = read_all(DataConfig(max_length=1 << 20), str(rows), tokenizer, say=lambda text: None, processed=Path(folder))
        return time.perf_counter() - begin, busy_seconds() - busy, found.counts.tokens, found.counts.targets


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
        times: dict[str, list[float]] = {"trl": [], "text_only": [], "ours": []}
        busy: dict[str, list[float]] = {name: [] for name in times}
        tokens, targets = {}, {}
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as peer:
            assert peer.stdin is not None and peer.stdout is not None
            while peer.stdout.readline() != "ready\n":
                assert peer.poll() is None, "the recipe's process ended"
            for _ in range(given.rounds):
                for name in times:
                    if name == "ours":
                        found = ours(rows, model)
                    else:
                        print(name, file=peer.stdin, flush=True)
                        found = json.loads(peer.stdout.readline())
                    seconds, used, tokens[name], targets[name] = found
                    times[name].append(seconds)
                    busy[name].append(used)
            peer.stdin.close()
        size = rows.stat().st_size
    middle = {name: statistics.median(each) for name, each in times.items()}
    used = {name: statistics.median(each) for name, each in busy.items()}
    processors = usable_cpus()
    result = {
        "rows": given.rows,
        "mb": round(size / 1e6, 1),
        "tokens": tokens,
        "targets": targets,
        "seconds": {name: [round(each, 2) for each in some] for name, some in times.items()},
        "rows_per_s": {name: round(given.rows / each) for name, each in middle.items()},
        "times_as_fast_as": {name: round(middle[name] / middle["ours"], 2) for name in ("trl", "text_only")},
        "processor_seconds": {name: round(each, 2) for name, each in used.items()},
        "by_processor_time": {name: round(used[name] / (used["ours"] / processors), 2) for name in ("trl", "text_only")},
        "processors": processors,
        "load": os.getloadavg()[0],
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
