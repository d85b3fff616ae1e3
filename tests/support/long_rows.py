"""What test_long_rows.py starts: python -m tests.support.long_rows FOLDER TOKENS ...

Prints, for each number of tokens, what the pass of a row of so many tokens took of private memory at its peak, and what is planned for it.
"""

import gc
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

from llamahome.config.schema import Config, LoraConfig
from llamahome.data.records import Example
from llamahome.data.steps.loader import make_microbatch
from llamahome.distributed.processors import return_freed_memory
from llamahome.distributed.world import World
from llamahome.model.backends.backend import Backend
from llamahome.model.backends.choose import backend_of
from llamahome.model.load import load_model
from llamahome.model.lora import add_lora
from llamahome.model.objective import Objective
from llamahome.model.place import place
from llamahome.model.precision import Precision
from llamahome.model.recompute import tile_blocks

CPU = torch.device("cpu")
SHAPE = {"vocab_size": 320, "hidden_size": 256, "intermediate_size": 4096, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16_384}


def main(folder: Path, lengths: list[int]) -> None:
    return_freed_memory({})
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, **HEADS)).save_pretrained(folder)
    backend = backend_of("cpu", CPU, Precision(torch.float32, torch.float32, "a test"))
    model = load_model(folder, dtype=torch.float32, device=CPU)
    add_lora(model, LoraConfig(rank=4), base="wide", seed=0, lean=True)
    place(model, world=World(0, 1, 0, CPU, 1), checkpointing=True, sync_batch_norm=False)
    compiled = backend.cannot_compile() is None
    if compiled:
        backend.compile(model)
    tile_blocks(model, tokens=backend.tile_tokens(compiled) or max(lengths))
    objective = Objective(model, backend)
    peak(objective, 64)  # whatever is there once
    gc.collect()
    before = memory("RssAnon")
    taken = [peak(objective, tokens) - before for tokens in lengths]
    print(json.dumps({"taken": taken, "planned": [planned(backend, model, tokens, compiled) for tokens in lengths]}), flush=True)
    os._exit(0)  # nothing to tidy up


def planned(backend: Backend, model: transformers.PreTrainedModel, tokens: int, compiled: bool) -> int:
    layers = backend.recomputed_bytes(Config(), model, tokens, longest=tokens, compiled=compiled)
    return layers + tokens * SHAPE["hidden_size"] * 4


def peak(objective: Objective, tokens: int) -> int:
    """The most private memory during a pass: the kernel's own mark of the resident memory, less the files in it."""
    ids = np.random.default_rng(0).integers(4, 300, tokens).astype(np.int32)
    batch = make_microbatch([Example("rows", 0, 1, ids, np.arange(tokens) > 0)], keys=[0], index=0)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # starts the mark again
    objective.loss_sum(batch).backward()
    return memory("VmHWM") - memory("RssFile")


def memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(word) for word in sys.argv[2:]])
