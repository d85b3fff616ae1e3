"""How soon training starts on data that is streamed, and what memory the data takes: prints one JSON object.

    python benchmarks/streaming_start.py --model DIR [--gb 5] [--folder DIR]

Writes so many GB of JSONL chats to a temporary folder (below --folder when it is given) and removes them at the end. Then, each in a fresh
process: cold (no index, the file not in memory), warm (index there), and again warm. A process opens the data the way that `train` does,
waits for the micro-batches of the first step, then begins anew at 90 % of an epoch. Memory: private memory beyond what the process had when
torch and the tokenizer were loaded, and all of the worker's; pages of mapped files, which the system takes back when it needs them, aside.
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

_TEXT = "the model reads every row of the file in an order that is computed and answers with a sentence about it"
_STEP = {"batch_size": 32, "micro_batch_tokens": 2048, "seed": 0}
_LOOK_S = 0.01


def write(path: Path, size: int) -> int:
    """Rows of about 900 bytes, each its own, until the file has `size` bytes; returns how many."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(_TEXT.split(), k=rng.randint(20, 140))) for _ in range(4000)]
    count = 0
    with path.open("w", encoding="utf-8", buffering=1 << 22) as file:
        while file.tell() < size:
            lines = []
            for asked in texts:
                count += 1
                told = texts[rng.randrange(len(texts))]
                row = {"messages": [{"role": "user", "content": f"{count} {asked}"}, {"role": "assistant", "content": told}]}
                lines.append(json.dumps(row) + "\n")
            file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    return count


def forget(path: Path) -> None:
    """Take the file out of the system's memory."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def memory_of(pid: int, name: str) -> float:
    """MB that /proc tells of a process; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:")), 0.0)


class Peak:
    """Watches the private memory of this process and of the workers."""

    def __init__(self) -> None:
        self.before = memory_of(os.getpid(), "RssAnon")
        self.most, self.workers = self.before, 0.0
        self.pids: list[int] = []
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.most = max(self.most, memory_of(os.getpid(), "RssAnon"))
            self.workers = max(self.workers, sum(memory_of(pid, "RssAnon") for pid in self.pids))
            time.sleep(_LOOK_S)

    def told(self) -> dict[str, float]:
        """The peaks in MB: beyond the beginning, in all, and of the workers."""
        return {"in_all_mb": round(self.most, 1), "process_mb": round(self.most - self.before, 1), "workers_mb": round(self.workers, 1)}


def start(model: str, path: str) -> dict[str, object]:
    """One start of streaming in this process."""
    from llamahome.config.schema import DataConfig
    from llamahome.data.files.sources import open_source
    from llamahome.data.prepare import prepare
    from llamahome.data.steps.loader import Loader
    from llamahome.data.store.streaming import Streamed
    from llamahome.data.text.tokens import load_tokenizer

    tokenizer = load_tokenizer(model)
    peak, begin = Peak(), time.perf_counter()
    rows = len(open_source(path))
    opened = time.perf_counter() - begin
    begin = time.perf_counter()
    found = prepare(DataConfig(), path, tokenizer, say=lambda text: None)
    assert isinstance(found.examples, Streamed), "the data is so small that it is prepared; take more"
    peak.pids = found.examples.pids()
    prepared = time.perf_counter() - begin
    firsts = []
    for position in (0, int(0.9 * found.order.epoch_rows), 0, int(0.9 * found.order.epoch_rows)):
        begin = time.perf_counter()
        with Loader(found.examples, found.order, total_positions=position + 3200, start_position=position, **_STEP) as loader:
            next(loader)
            firsts.append(time.perf_counter() - begin)
            for _ in zip(range(20), loader, strict=False):
                continue
    begin = time.perf_counter()
    found.order.row_at(10**9, seed=1)
    far = time.perf_counter() - begin
    found.close()
    total = opened + prepared + firsts[0]
    return {
        "rows": rows,
        "index_s": round(opened, 2),
        "prepare_s": round(prepared, 2),
        "first_step_s": round(total, 2),
        "begin_at_0_s": [round(firsts[0], 3), round(firsts[2], 3)],
        "begin_at_90_percent_s": [round(firsts[1], 3), round(firsts[3], 3)],
        "position_1e9_ms": round(1000 * far, 3),
        **peak.told(),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="a folder with a tokenizer and a chat template")
    parser.add_argument("--gb", type=float, default=5.0)
    parser.add_argument("--folder", type=Path, help="where the file is written")
    parser.add_argument("--start", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.start:
        print(json.dumps(start(given.model, given.start)))
        return
    size, model = int(given.gb * 1e9), str(Path(given.model).resolve())
    if shutil.disk_usage(given.folder or tempfile.gettempdir()).free < 1.5 * size:
        sys.exit("there is not enough room for the file")
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        path = Path(folder, "rows.jsonl")
        write(path, size)
        forget(path)
        results: dict[str, object] = {"gb": round(path.stat().st_size / 1e9, 2)}
        for name in ("cold", "warm", "again"):
            words = [sys.executable, str(Path(__file__).resolve()), "--model", model, "--start", "rows.jsonl"]
            done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            results[name] = json.loads(done.stdout)
    results["load"] = os.getloadavg()[0]
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
