"""The worker processes of test_shard_load.py: what a rank of a sharded run holds of a model, and how much memory it takes."""

import gc
import os
from functools import partial
from pathlib import Path

import torch
from tests.support.memory import taken, watched
from tests.support.models import CPU, FP32, our_model

from llamahome.config.schema import LoraConfig
from llamahome.distributed.world import World
from llamahome.errors import LlamaHomeError
from llamahome.model.generate import generate
from llamahome.model.load import load_model
from llamahome.model.lora import add_lora
from llamahome.model.lora_init import start_adapters
from llamahome.model.packing import packing_of
from llamahome.model.precision import Precision
from llamahome.model.shard import sharded
from llamahome.model.shard_load import local_of, make_mesh, row_range, whole_of


def everything(world: World, payload):
    found = {"families": families(world, payload), "refused": refused(world, payload), "begun": initial_factors(world, payload)}
    return found | {"answers": answers(world, payload)}


def families(world: World, payload):
    """What differs between a model loaded by rows and the same model loaded whole, for each of the folders."""
    return {folder: differences(world, Path(folder), getattr(torch, dtype)) for folder, dtype in payload["families"]}


def differences(world: World, folder: Path, dtype: torch.dtype) -> list[str]:
    mesh = make_mesh(world, "shard")
    whole, rows = our_model(folder, dtype=dtype), load_model(folder, dtype=dtype, device=CPU, mesh=mesh)
    found = [] if type(rows) is type(whole) else ["class"]
    if packing_of(rows).why_alone != packing_of(whole).why_alone or len(packing_of(rows).rotaries) != len(packing_of(whole).rotaries):
        found.append("packing")
    if rows.config._attn_implementation != whole.config._attn_implementation:
        found.append("attention")
    expected, names = dict(whole.named_parameters()), dict(rows.named_parameters())
    if list(expected) != list(names):
        return [*found, "names"]
    for name, weight in names.items():
        first, count = row_range(weight.shape[0], mesh)
        if not torch.equal(local_of(weight), expected[name].narrow(0, first, count)):
            found.append(f"rows of {name}")
        if not torch.equal(whole_of(weight), expected[name]) or weight.dtype != expected[name].dtype:
            found.append(name)
    buffers = dict(rows.named_buffers())
    found += [name for name, buffer in whole.named_buffers() if not torch.equal(buffers[name], buffer)]
    ties = [model.get_input_embeddings().weight is model.get_output_embeddings().weight for model in (rows, whole)]
    return found if ties[0] == ties[1] else [*found, "tie"]


def refused(world: World, payload):
    """The error with which each folder is refused."""
    found = []
    for folder in payload["refused"]:
        try:
            load_model(Path(folder), dtype=torch.float32, device=CPU, mesh=make_mesh(world, "shard"))
            found.append("loaded")
        except LlamaHomeError as error:
            found.append(str(error))
    return found


def initial_factors(world: World, payload):
    """The largest difference between the adapters that begin with parts, or lengths, of whole weights and of rows."""
    return max(
        _begun(world, Path(payload["begun"]), config) for config in (LoraConfig(rank=4, init="pissa"), LoraConfig(rank=4, use_dora=True))
    )


def _begun(world: World, base: Path, config: LoraConfig) -> float:
    adapted = []
    for mesh in (None, make_mesh(world, "shard")):
        model = load_model(base, dtype=torch.float32, device=CPU, mesh=mesh)
        adapted.append(add_lora(model, config, base="tiny", seed=0, lean=True))
        start_adapters(adapted[-1], config, base, seed=0, world=world)
    factors = [{name: each for name, each in model.named_parameters() if "lora_" in name} for model in adapted]
    assert factors[0].keys() == factors[1].keys() and all(each.isfinite().all() for each in factors[1].values())
    assert config.use_dora or all(float(each.detach().abs().max()) > 0 for each in factors[0].values())
    return max(float((each - factors[1][name]).detach().abs().max()) for name, each in factors[0].items())


def answers(world: World, payload):
    """What a model answers whose weights are all trained in float32 and multiplied in bfloat16, whole and sharded."""
    found = []
    for mesh in (None, make_mesh(world, "shard")):
        model = load_model(Path(payload["begun"]), dtype=torch.float32, device=CPU, mesh=mesh).eval()
        placement = (
            None if mesh is None else sharded(model, world, strategy="shard", precision=Precision(torch.float32, torch.bfloat16, ""))
        )
        answer = partial(generate, model, [[5, 6, 7]], end_ids=[2], max_new_tokens=4)
        found.append(answer() if placement is None else placement.within(answer))
    return found


def peak(world: World, payload):
    """Private memory that this rank takes at most while it loads and shards the model, and afterwards, in bytes."""
    our_model(Path(payload["small"]))  # whatever is there once
    load_model(Path(payload["small"]), dtype=torch.float32, device=CPU, mesh=make_mesh(world, "shard"))
    gc.collect()
    with watched("load", 1):
        model = load_model(Path(payload["base"]), dtype=torch.float32, device=CPU, mesh=make_mesh(world, "shard"))
        placement = sharded(model, world, strategy="shard", precision=FP32)
    return {"peak": taken["load"], "share": sum(part.nbytes for part in placement.parameters.values()), "process": os.getpid()}
