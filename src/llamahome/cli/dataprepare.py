"""`data prepare`: tokenize rows once, before training, and tell what became of them. Nothing heavy is imported at the top."""

import json
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from llamahome.cli import datacheck
from llamahome.cli.modelfit import tokenizer_of


def prepare(
    paths: datacheck.Paths,
    eval_data: Annotated[str | None, typer.Option("--eval-data", help="Rows to evaluate on [data.eval_path].")] = None,
    model: datacheck.Model = None,
    config: datacheck.ConfigFiles = None,
    assignments: datacheck.Assignments = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Tokenize every row into data/training/processed/, where training finds it; one that was interrupted goes on."""
    from llamahome.config.load import load_config

    flags = {"model.name": ("--model", model), "data.eval_path": ("--eval-data", eval_data)}
    settings = load_config(config or (), assignments=assignments or (), flags=flags).config

    from llamahome.data.prepare import prepare as make
    from llamahome.data.text.tokens import open_tokenizer
    from llamahome.units import show_bytes, show_seconds

    tokenizer = open_tokenizer(tokenizer_of(settings.model))
    started = time.monotonic()
    data = settings.data.model_copy(update={"streaming": False})
    found = make(data, paths, tokenizer, say=lambda text: print(text, file=sys.stderr, flush=True))
    found.close()
    seconds, place = time.monotonic() - started, found.folder or Path()
    size = sum(path.stat().st_size for path in place.iterdir())
    if as_json:
        told = {"folder": str(place), "bytes": size, "seconds": round(seconds, 3), "fingerprint": found.fingerprint}
        print(json.dumps({**told, **asdict(found.report)}))
        return
    print("\n".join(found.report.lines()))
    print(f"{show_bytes(size)} in {place}, {show_seconds(seconds)}; it may be removed at any time and is then made again")
    print(f"next: llamahome train {shlex.join(paths)}")
