"""Checks whether the base model is on this machine, whole, and of a kind that can be trained; downloads nothing."""

import json
import os
import shlex
from pathlib import Path

from llamahome.config.schema import Config
from llamahome.doctor.checks import Check, failed, passed, warned
from llamahome.doctor.settings import of_problems
from llamahome.errors import LlamaHomeError
from llamahome.model.load import find_model
from llamahome.model.weightfiles import weight_files
from llamahome.rundir import BASE_MODELS, STARTER, as_typed
from llamahome.units import show_bytes


def find_local(config: Config) -> Path | None:
    """The folder of the base if it is on this machine; None if it would have to be downloaded. Raises ConfigError if it is damaged."""
    name = config.model.name
    if any(folder.is_dir() for folder in (Path(name).expanduser(), BASE_MODELS / name)):
        return find_model(name, say=lambda _: None)
    if name == STARTER:
        return None
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        return find_model(name, say=lambda _: None)  # raises: there is no such model
    return _from_cache(name, config.model.revision)


def _from_cache(name: str, revision: str | None) -> Path | None:
    """The folder of a hub id that was downloaded before."""
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        return None
    try:
        return Path(snapshot_download(repo_id=name, revision=revision, local_files_only=True))
    except (errors.LocalEntryNotFoundError, errors.HFValidationError, OSError, ValueError):
        return None


def base_check(config: Config) -> Check:
    """Whether a run finds its base."""
    name = config.model.name
    try:
        folder = find_local(config)
    except LlamaHomeError as error:
        check = of_problems("base-model", error.problems)
        return check if check.help else failed("base-model", check.detail, _fetch_again(name))
    if folder is None:
        text = f"{name} is not on this machine yet: train downloads it first"
        return warned("base-model", text, f"llamahome models fetch {shlex.quote(name)}")
    size = sum(path.stat().st_size for path in weight_files(folder))
    config_file = folder / "config.json"
    try:
        architecture = ", ".join(json.loads(config_file.read_text(encoding="utf-8")).get("architectures") or ["an unnamed architecture"])
    except (OSError, ValueError, AttributeError) as error:
        return failed("base-model", f"{config_file} cannot be read: {error}", _fetch_again(name))
    missing = [each for each in ("tokenizer_config.json",) if not (folder / each).is_file()]
    if missing:
        return failed("base-model", f"{folder} has no {missing[0]}, so its tokenizer cannot be opened", _fetch_again(name))
    return passed("base-model", f"{as_typed(folder)}: {architecture}, weights of {show_bytes(size)} are whole")


def _fetch_again(name: str) -> str | None:
    """A starter that is damaged is removed and downloaded once more; nobody knows where another folder came from."""
    folder = BASE_MODELS / name
    if name != STARTER or not os.path.lexists(folder):
        return None
    return f"rm -r {shlex.quote(str(folder))} && llamahome models fetch {STARTER}"
