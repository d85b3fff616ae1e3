"""Measures how soon training starts on streamed data, and the memory that the data takes: prints one JSON object.

    python benchmarks/streaming_start.py --model DIR [--gb 5] [--folder DIR]

Writes GB gigabytes of JSONL chats to a temporary folder (below --folder) and removes them at the end. Then, each in a new process: cold (no
index, the file not in the page cache), warm (with an index), and warm again. A process opens the data as `train` does, waits for the
micro-batches of the first step, then starts again at 90 % of an epoch. Memory is the private memory of the process beyond that after
loading torch and the tokenizer, and that of the workers; pages of mapped files do not count, because the system can reclaim them.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

_TEXT = "the model reads every row of the file in an order that is computed and answers with a sentence about it"
_STEP = {"batch_size": 32, "micro_batch_tokens": 2048, "seed": 0}
_SAMPLE_S = 0.01


def write(path: Path, size: int) -> int:
    """Write distinct rows of about 900 bytes until the file has `size` bytes; return their number."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(_TEXT.split(), k=rng.randint(20, 140))) for _ in range(4000)]
    count = 0
    with path.open("w", encoding="utf-8", buffering=1 << 22) as file:
        while file.tell() < size:
            lines = []
            for question in texts:
                count += 1
                answer = texts[rng.randrange(len(texts))]
                row = {"messages": [{"role": "user", "content": f"{count} {question}"}, {"role": "assistant", "content": answer}]}
                lines.append(json.dumps(row) + "\n")
            file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    return count


def drop_from_cache(path: Path) -> None:
    """Drop the file from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def memory_of(pid: int, name: str) -> float:
    """The value `name` of /proc/PID/status in MB; 0 if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:")), 0.0)


class Peak:
    """Samples the peak private memory of this process and of the workers."""

    def __init__(self) -> None:
        self.before = memory_of(os.getpid(), "RssAnon")
        self.peak, self.workers = self.before, 0.0
        self.pids: list[int] = []
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, memory_of(os.getpid(), "RssAnon"))
            self.workers = max(self.workers, sum(memory_of(pid, "RssAnon") for pid in self.pids))
            time.sleep(_SAMPLE_S)

    def as_dict(self) -> dict[str, float]:
        """The peaks in MB: in total, beyond the start, and of the workers."""
        return {"in_all_mb": round(self.peak, 1), "process_mb": round(self.peak - self.before, 1), "workers_mb": round(self.workers, 1)}


def start(model: str, path: str) -> dict[str, object]:
    """Measure one start of streaming in this process."""
    from llamahome.config.schema import DataConfig
    from llamahome.data.files.sources import open_source
    from llamahome.data.prepare import prepare
    from llamahome.data.steps.loader import Loader
    from llamahome.data.store.streaming import StreamedExamples
    from llamahome.data.text.tokens import load_tokenizer

    tokenizer = load_tokenizer(model)
    peak, begin = Peak(), time.perf_counter()
    rows = len(open_source(path))
    opened = time.perf_counter() - begin
    begin = time.perf_counter()
    data = prepare(DataConfig(), path, tokenizer, say=lambda text: None)
    assert isinstance(data.examples, StreamedExamples), "the data is small enough to be prepared; use more"
    peak.pids = data.examples.pids()
    prepared = time.perf_counter() - begin
    firsts = []
    for position in (0, int(0.9 * data.order.epoch_rows), 0, int(0.9 * data.order.epoch_rows)):
        begin = time.perf_counter()
        with Loader(data.examples, data.order, total_positions=position + 3200, start_position=position, **_STEP) as loader:
            next(loader)
            firsts.append(time.perf_counter() - begin)
            for _ in zip(range(20), loader, strict=False):
                continue
    begin = time.perf_counter()
    data.order.rows_at(np.array([10**9]), seed=1)
    far_seconds = time.perf_counter() - begin
    data.close()
    total = opened + prepared + firsts[0]
    return {
        "rows": rows,
        "index_s": round(opened, 2),
        "prepare_s": round(prepared, 2),
        "first_step_s": round(total, 2),
        "begin_at_0_s": [round(firsts[0], 3), round(firsts[2], 3)],
        "begin_at_90_percent_s": [round(firsts[1], 3), round(firsts[3], 3)],
        "position_1e9_ms": round(1000 * far_seconds, 3),
        **peak.as_dict(),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="a folder with a tokenizer and a chat template")
    parser.add_argument("--gb", type=float, default=5.0)
    parser.add_argument("--folder", type=Path, help="folder for the file")
    parser.add_argument("--start", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        print(json.dumps(start(options.model, options.start)))
        return
    size, model = int(options.gb * 1e9), str(Path(options.model).resolve())
    if shutil.disk_usage(options.folder or tempfile.gettempdir()).free < 1.5 * size:
        sys.exit("not enough disk space for the file")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder, "rows.jsonl")
        write(path, size)
        drop_from_cache(path)
        results: dict[str, object] = {"gb": round(path.stat().st_size / 1e9, 2)}
        for name in ("cold", "warm", "again"):
            command = [sys.executable, str(Path(__file__).resolve()), "--model", model, "--start", "rows.jsonl"]
            result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            if result.returncode:
                sys.exit(result.stderr)
            results[name] = json.loads(result.stdout)
    results["load"] = os.getloadavg()[0]
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
