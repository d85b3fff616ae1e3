"""An export of a model that is much larger than its largest tensor needs little memory, also while it is compared."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.random_weights import write_random_weights
from peft import LoraConfig
from safetensors.torch import save_file
from tests.support.tokenizers import save_tokenizer
from transformers import LlamaConfig

VOCABULARY = 49_152
LIBRARIES = 450_000_000
"""Bytes that Python, torch and transformers take."""
MEASURED = """
import os, sys
from llamahome.cli import app
leave = app._exit
def tell(status):
    print([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0].split()[1], file=sys.stderr, flush=True)
    leave(status)
app._exit = tell
sys.argv = ["llamahome", *sys.argv[1:]]
app.main()
"""


def save_base(folder: Path, *, layers: int) -> None:
    """A Llama with random weights, whose embedding is its largest tensor."""
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": layers, "vocab_size": VOCABULARY}
    config = LlamaConfig(**sizes, num_attention_heads=16, num_key_value_heads=4, tie_word_embeddings=True, dtype="bfloat16")
    write_random_weights(folder, config)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    save_tokenizer(folder)


def save_adapter(folder: Path, base: Path, *, layers: int) -> None:
    settings = LoraConfig(r=4, target_modules=["down_proj"], task_type="CAUSAL_LM", base_model_name_or_path=str(base))
    settings.save_pretrained(folder)
    matrices = {"lora_A": (4, 8192), "lora_B": (2048, 4)}
    names = {
        f"base_model.model.model.layers.{number}.mlp.down_proj.{name}.weight": torch.randn(shape) * 0.01
        for number in range(layers)
        for name, shape in matrices.items()
    }
    save_file(names, folder / "adapter_model.safetensors")
    save_tokenizer(folder)


def peak(*words: str, cwd: Path) -> int:
    """Bytes that the command had at most in memory."""
    done = subprocess.run([sys.executable, "-c", MEASURED, *words], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stderr.splitlines()[-1]) * 1024


@pytest.mark.slow
def test_a_merge_needs_the_memory_of_three_of_its_largest_tensor(tmp_path: Path) -> None:
    save_base(tmp_path / "base", layers=12)  # 1.7 GB, in float32 more than what is compared at once
    save_adapter(tmp_path / "adapter", tmp_path / "base", layers=12)
    embedding = 4 * VOCABULARY * 2048
    most = peak("export", "adapter", "--to", "merged", "--output", "out", cwd=tmp_path)
    assert most < LIBRARIES + 3 * embedding, most
