"""What test_memory.py starts: python -m tests.support.memory FOLDER.

Prints what each step took of private memory, in units of the weights in float32.
"""

import gc
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from llamahome.config.schema import LoraConfig
from llamahome.data.records import Example
from llamahome.data.steps.loader import make_microbatch
from llamahome.model import quantize, quantized_sizes
from llamahome.model.adapter import restore_model, save_model
from llamahome.model.backends.choose import backend_of
from llamahome.model.load import load_model
from llamahome.model.lora import add_lora
from llamahome.model.objective import Objective
from llamahome.model.precision import Precision
from llamahome.training.optimizer import make_optimizer, optimizer_tensors, restore_optimizer

SHAPE = {"vocab_size": 2000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 8}
WEIGHTS = {"bfloat16": "low", "float32": "high"}
CPU = torch.device("cpu")
taken: dict[str, float] = {}


def private_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


@contextmanager
def watched(name: str, unit: int) -> Iterator[None]:
    gc.collect()
    before, most, done = private_bytes(), [0], threading.Event()

    def look() -> None:
        while not done.is_set():
            most[0] = max(most[0], private_bytes())
            time.sleep(0.002)

    thread = threading.Thread(target=look)
    thread.start()
    yield
    done.set()
    thread.join()
    taken[name] = round((max(most[0], private_bytes()) - before) / unit, 3)


def main(folder: Path) -> None:
    config = transformers.LlamaConfig(**SHAPE, num_key_value_heads=2, max_position_embeddings=512)
    made = transformers.LlamaForCausalLM(config)
    for dtype, name in WEIGHTS.items():
        made.to(getattr(torch, dtype)).save_pretrained(folder / name)
    unit = sum(parameter.numel() for parameter in made.parameters()) * 4
    del made
    load_model(folder / "low", dtype=torch.bfloat16, device=CPU)  # whatever is there once
    for dtype, name in WEIGHTS.items():
        with watched(f"load {dtype} as it is", unit):
            model = load_model(folder / name, dtype=getattr(torch, dtype), device=CPU)
        del model
    quantized_sizes.MOST_FITTED = 0  # fitting takes a layer in float32 and products of its inputs, much of a model of four layers
    with watched("quantise to nf4", unit):
        quantize.write_quantized(folder / "low", "nf4", folder / "nf4", say=lambda line: None)
    with watched("load nf4", unit):
        model = load_model(folder / "nf4", dtype=torch.bfloat16, device=CPU)
    with watched("a pass beside nf4", unit):
        adapted = add_lora(model, LoraConfig(rank=4), base="low", seed=0, lean=True)
        batch = make_microbatch([Example("rows", 0, 1, np.arange(16, dtype=np.int32), np.arange(16) > 0)], keys=[0], index=0)
        Objective(model, backend_of("cpu", CPU, Precision(torch.bfloat16, torch.bfloat16, "a test"))).loss_sum(batch).backward()
    del model, adapted
    with watched("load bfloat16 as float32", unit):
        model = load_model(folder / "low", dtype=torch.float32, device=CPU)
    with watched("save the model", unit):
        save_model(model, folder / "saved", base=folder / "low")
    with watched("resume the model", unit):
        restore_model(model, folder / "saved")
    parameters = dict(model.named_parameters())
    optimizer = make_optimizer("adamw", parameters, weight_decay=0.0)
    for parameter in parameters.values():
        moments = {name: torch.ones_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(1.0), **moments}
    with watched("save the optimizer", unit):
        save_file(optimizer_tensors(optimizer, parameters), folder / "optimizer.safetensors")
    del optimizer, moments
    fresh = make_optimizer("adamw", parameters, weight_decay=0.0)
    with watched("resume the optimizer", unit):
        restore_optimizer(fresh, parameters, load_file(folder / "optimizer.safetensors"))
    print(json.dumps(taken), flush=True)
    os._exit(0)  # nothing to tidy up, and nothing of it to wait for


if __name__ == "__main__":
    main(Path(sys.argv[1]))
