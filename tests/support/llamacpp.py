"""A real llama.cpp, prebuilt for Node: reads GGUF files for the slow tests of exports. Installed once into .bench/llama.cpp."""

import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / ".bench/llama.cpp"
_PACKAGE = "node-llama-cpp@3.22.1"


@dataclass(frozen=True)
class LlamaCpp:
    """Answers of llama.cpp about one file after the other."""

    folder: Path

    def ask(
        self, gguf: Path, *, texts: Sequence[str] = (), prompts: Sequence[Sequence[int]] = (), tokens: int = 8, adapter: Path | None = None
    ) -> dict[str, Any]:
        """Token ids of `texts`, greedy answers to `prompts`, ids that end an answer, chat template. AssertionError with its output."""
        asked = {"texts": list(texts), "prompts": [list(ids) for ids in prompts], "tokens": tokens, "adapter": adapter and str(adapter)}
        command = ["node", str(self.folder / "llamacpp.mjs"), str(gguf)]
        done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, cwd=self.folder, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)


def install() -> LlamaCpp:
    """llama.cpp, installed if need be; the test is skipped where there is no Node or its registry cannot be reached."""
    if shutil.which("npm") is None:
        pytest.skip("Node is not installed")
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not (FOLDER / "node_modules/node-llama-cpp").is_dir():
        (FOLDER / "package.json").write_text('{"private": true, "type": "module"}\n', encoding="utf-8")
        command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", _PACKAGE]
        done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode != 0:
            pytest.skip(f"llama.cpp cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
    shutil.copyfile(Path(__file__).with_suffix(".mjs"), FOLDER / "llamacpp.mjs")
    return LlamaCpp(FOLDER)
