"""Compares the tokenization of rows with TRL on the same rows: prints one JSON object.

    python benchmarks/tokenize_speed.py --model DIR [--rows 20000] [--rounds 3] [--venv DIR]

`trl` is the preparation of prompts and completions by SFTTrainer's code in one process: ids and labels. `text_only` is the shortest recipe,
without labels: map(apply_chat_template), map(tokenize). Both read with datasets.load_dataset in a virtual environment that this script
creates, in a process that has imported everything, and write what datasets writes. `ours` reads, tokenizes, marks the targets, writes the
store, and starts its processes within the measured time. They run alternately; results are medians. `by_processor_time` estimates the ratio
on an idle machine: the CPU time of the other divided by that of ours on all CPUs.
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
    """Repeat the sample data up to `count` rows, made distinct by a number."""
    write_sample(path, rows=None)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            question, answer = rows[number % len(rows)]["messages"]
            file.write(json.dumps({"prompt": [{**question, "content": f"{number}. {question['content']}"}], "completion": [answer]}) + "\n")


def peer_python(folder: Path) -> str:
    """Return the interpreter of TRL's environment; create the environment if it is missing."""
    python = folder / "bin/python"
    if not (folder / "ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        versions = [
            f"{name}=={importlib.metadata.version(name).partition('+')[0]}"
            for name in ("torch", "transformers", "tokenizers", "jinja2", "numpy")
        ]
        subprocess.run([python, "-m", "pip", "install", "-q", _TRL, *versions], check=True, stdout=sys.stderr)
        (folder / "ready").touch()
    return str(python)


def cpu_seconds() -> float:
    """CPU time of this process and of its ended children."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def ours(rows: Path, model: str) -> tuple[float, float, int, int]:
    """Wall time, CPU time, tokens and targets of one preparation into an empty folder."""
    tokenizer = load_tokenizer(model)
    with tempfile.TemporaryDirectory() as folder:
        begin, cpu = time.perf_counter(), cpu_seconds()
        result = read_all(DataConfig(max_length=1 << 20), str(rows), tokenizer, say=lambda text: None, processed=Path(folder))
        return time.perf_counter() - begin, cpu_seconds() - cpu, result.counts.tokens, result.counts.targets


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="a folder with a tokenizer and a chat template")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--venv", type=Path, default=Path(tempfile.gettempdir()) / "llamahome-recipe-venv")
    options = parser.parse_args()
    model, python = str(Path(options.model).resolve()), peer_python(options.venv.resolve())
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        rows = Path("rows.jsonl")
        write_rows(rows, options.rows)
        command = [python, "-c", _PEER, model, str(rows)]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_HOME": folder}
        times: dict[str, list[float]] = {"trl": [], "text_only": [], "ours": []}
        busy: dict[str, list[float]] = {name: [] for name in times}
        tokens, targets = {}, {}
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as peer:
            assert peer.stdin is not None and peer.stdout is not None
            while peer.stdout.readline() != "ready\n":
                assert peer.poll() is None, "TRL's process ended"
            for _ in range(options.rounds):
                for name in times:
                    if name == "ours":
                        measured = ours(rows, model)
                    else:
                        print(name, file=peer.stdin, flush=True)
                        measured = json.loads(peer.stdout.readline())
                    seconds, used, tokens[name], targets[name] = measured
                    times[name].append(seconds)
                    busy[name].append(used)
            peer.stdin.close()
        size = rows.stat().st_size
    medians = {name: statistics.median(each) for name, each in times.items()}
    cpu = {name: statistics.median(each) for name, each in busy.items()}
    processors = usable_cpus()
    result = {
        "rows": options.rows,
        "mb": round(size / 1e6, 1),
        "tokens": tokens,
        "targets": targets,
        "seconds": {name: [round(each, 2) for each in some] for name, some in times.items()},
        "rows_per_s": {name: round(options.rows / each) for name, each in medians.items()},
        "times_as_fast_as": {name: round(medians[name] / medians["ours"], 2) for name in ("trl", "text_only")},
        "processor_seconds": {name: round(each, 2) for name, each in cpu.items()},
        "by_processor_time": {name: round(cpu[name] / (cpu["ours"] / processors), 2) for name in ("trl", "text_only")},
        "processors": processors,
        "load": os.getloadavg()[0],
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
