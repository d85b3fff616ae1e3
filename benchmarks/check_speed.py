"""Measures the speed of `data check`: prints one JSON object.

    python benchmarks/check_speed.py [--mb 40] [--model DIR] [--processes N]

Writes a file of chats of about 770 bytes each to a temporary folder, reads it once so that it is in the page cache, and measures the
structure check in one process, in CPU time so that other programs do not count. With a model: also tokenization, and the whole check.
"""

import argparse
import json
import os
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from llamahome.config.schema import DataConfig
from llamahome.data.checks.check import Request, check
from llamahome.data.files.sources import open_source
from llamahome.data.records import Conversation
from llamahome.data.rows.formats import understand
from llamahome.data.text.targets import tokenize
from llamahome.data.text.tokens import load_tokenizer

_TEXT = "def return self value if not the of a and in is for this name path number None list text error raise"
_SAMPLE = 4096


def write(path: Path, size: int) -> None:
    """Write chats like the sample data: a function and its docstring, no two rows alike."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        number = 0
        while file.tell() < size:
            question, answer = (" ".join(rng.choices(_TEXT.split(), k=rng.randint(low, high))) for low, high in ((60, 160), (10, 60)))
            messages = [{"role": "user", "content": f"{number} {question}"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
            number += 1


def timed(work: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of one run of `work`."""
    begin = clock()
    work()
    return clock() - begin


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mb", type=int, default=40)
    parser.add_argument("--model", help="a folder with a tokenizer; without one only the structure check is measured")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = str(Path(options.model).resolve()) if options.model else None
        os.chdir(folder)
        path = Path("rows.jsonl")
        write(path, options.mb * 10**6)
        size = path.stat().st_size / 1e6
        rows = len(open_source(str(path)))
        plain = Request((str(path),), DataConfig(), processes=1)
        structure = min(timed(lambda: check(plain, lambda problem: None), time.process_time) for _ in range(3))
        figures = {"rows": rows, "mb": round(size, 1), "structure_mb_per_s_per_core": round(size / structure, 1)}
        if model is not None:
            source, tokenizer = open_source(str(path)), load_tokenizer(model)
            understood = [understand(source.row(number), "messages") for number in range(min(_SAMPLE, rows))]
            chats = [row for row in understood if isinstance(row, Conversation)]
            parts = [chats[begin : begin + 1024] for begin in range(0, len(chats), 1024)]
            tokenizing = timed(lambda: [tokenize(part, tokenizer, train_on="assistant") for part in parts], time.perf_counter)
            request = Request((str(path),), DataConfig(), (model, None), processes=options.processes)
            seconds = timed(lambda: check(request, lambda problem: None), time.perf_counter)
            figures |= {"tokenizing_rows_per_s": round(len(chats) / tokenizing), "check_rows_per_s": round(rows / seconds)}
            figures["processes"] = options.processes
        figures["peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
