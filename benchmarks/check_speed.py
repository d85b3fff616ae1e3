"""How fast `data check` is: prints one JSON object.

    python benchmarks/check_speed.py [--mb 40] [--model DIR] [--processes N]

Writes a file of chats of about 770 bytes to a temporary folder, reads it once so that it is warm, and measures by the processor's clock
(other programs do not count): structure alone in one process; with a model, tokenizing alone and the whole check.
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
    """Chats like the sample data: a function and its docstring, each row its own."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        number = 0
        while file.tell() < size:
            asked, told = (" ".join(rng.choices(_TEXT.split(), k=rng.randint(low, high))) for low, high in ((60, 160), (10, 60)))
            messages = [{"role": "user", "content": f"{number} {asked}"}, {"role": "assistant", "content": told}]
            file.write(json.dumps({"messages": messages}) + "\n")
            number += 1


def timed(work: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of one run."""
    begin = clock()
    work()
    return clock() - begin


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mb", type=int, default=40)
    parser.add_argument("--model", help="a folder with a tokenizer; without it only the structure is measured")
    parser.add_argument("--processes", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = str(Path(given.model).resolve()) if given.model else None
        os.chdir(folder)
        path = Path("rows.jsonl")
        write(path, given.mb * 10**6)
        size = path.stat().st_size / 1e6
        rows = len(open_source(str(path)))
        plain = Request((str(path),), DataConfig(), processes=1)
        structure = min(timed(lambda: check(plain, lambda found: None), time.process_time) for _ in range(3))
        figures = {"rows": rows, "mb": round(size, 1), "structure_mb_per_s_per_core": round(size / structure, 1)}
        if model is not None:
            source, tokenizer = open_source(str(path)), load_tokenizer(model)
            understood = [understand(source.row(number), "messages") for number in range(min(_SAMPLE, rows))]
            chats = [found for found in understood if isinstance(found, Conversation)]
            parts = [chats[begin : begin + 1024] for begin in range(0, len(chats), 1024)]
            alone = timed(lambda: [tokenize(part, tokenizer, train_on="assistant") for part in parts], time.perf_counter)
            whole = Request((str(path),), DataConfig(), (model, None), processes=given.processes)
            seconds = timed(lambda: check(whole, lambda found: None), time.perf_counter)
            figures |= {"tokenizing_rows_per_s": round(len(chats) / alone), "check_rows_per_s": round(rows / seconds)}
            figures["processes"] = given.processes
        figures["peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
