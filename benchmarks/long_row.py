"""Memory and time of one training step on a single long row, beside what the plan says of it; prints one JSON object.

    python -m benchmarks.long_row --model DIR --tokens 32768 [--method full] [--offload] [--layers 4] [--set KEY=VALUE ...]

The row has random tokens, all of them targets. Memory is the anonymous part of the resident memory of the process (RssAnon of Linux),
sampled every 5 ms, less what the process holds between two steps: libraries, weights, the state of the optimizer, compiled parts and their
buffers, which a step on a short row has made. The plan's gradients, activations and head are what it is compared with. `--layers` cuts the
model, so that a machine can measure a part of a large one. `--offload` moves the inputs of layers to a file. With
`--set model.quantization=nf4` the base is rounded first. A model of the family mistral with a short `sliding_window` needs the same memory
as one that attends to the whole row, without the time that grows with the square of its length.
"""

import argparse
import json
import os
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from llamahome.distributed.processors import bound_caches, keep_freed_memory, return_freed_memory, share_processors

share_processors(os.environ)  # as llamahome train does, before torch is imported
bound_caches(os.environ)
keep_freed_memory(os.environ)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

from llamahome.config.load import LoadedConfig, load_config  # noqa: E402
from llamahome.config.schema import Config  # noqa: E402
from llamahome.data.records import Example  # noqa: E402
from llamahome.data.steps.loader import make_microbatch  # noqa: E402
from llamahome.distributed.world import World  # noqa: E402
from llamahome.model.backends.backend import TILE_TOKENS, Backend  # noqa: E402
from llamahome.model.backends.choose import choose_backend  # noqa: E402
from llamahome.model.load import load_model  # noqa: E402
from llamahome.model.lora import add_lora  # noqa: E402
from llamahome.model.objective import Objective  # noqa: E402
from llamahome.model.offload import offload_inputs  # noqa: E402
from llamahome.model.packing import decoder_of  # noqa: E402
from llamahome.model.place import place, trained_parameters  # noqa: E402
from llamahome.model.quantize import sizes_of  # noqa: E402
from llamahome.model.quantized_copy import quantized_base  # noqa: E402
from llamahome.model.recompute import tile_blocks  # noqa: E402
from llamahome.planning.forecast import Cluster, layout_of  # noqa: E402
from llamahome.planning.hardware import DEVICES  # noqa: E402
from llamahome.planning.measure import Activations  # noqa: E402
from llamahome.planning.measure import measure as measured_shape  # noqa: E402
from llamahome.planning.memory import Memory, Pass, memory_of  # noqa: E402
from llamahome.planning.shapes import ModelShape  # noqa: E402
from llamahome.training.optimizer import make_optimizer  # noqa: E402

CPU = torch.device("cpu")
WARM_UP = 64
"""Tokens of the step before."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--method", choices=["lora", "full"], default="lora")
    parser.add_argument("--backend", choices=["cpu", "reference"], default="cpu")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--plain", action="store_true", help="keep all activations, compute nothing twice")
    parser.add_argument("--offload", action="store_true", help="move the inputs of layers out of memory between the passes")
    parser.add_argument("--tile", type=int, default=TILE_TOKENS, help="tokens of a tile of a feed-forward block; 0 for none")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    flags = {"training.method": ("--method", options.method), "model.backend": ("--backend", options.backend)}
    sets = [f"data.max_length={options.tokens}", f"training.activation_offloading={str(options.offload).lower()}", *options.set]
    loaded = load_config(flags=flags, assignments=sets, environment={}, folder=Path())
    print(json.dumps(measure(loaded, options.model, options.tokens, layers=options.layers, recompute=not options.plain, tile=options.tile)))


def measure(loaded: LoadedConfig, folder: Path, tokens: int, *, layers: int | None, recompute: bool, tile: int) -> dict[str, Any]:
    """Planned and measured bytes of a step on one row of `tokens`, and its seconds."""
    config = loaded.config
    backend = choose_backend(config, CPU)
    packed = None
    if (kind := config.model.quantization) is not None:
        sizes, folder = sizes_of(folder, kind), quantized_base(folder, kind, say=print)
        packed = sizes.packed_bytes / sizes.packed_numbers
    model = load_model(folder, dtype=backend.precision.storage, device=CPU)
    if layers is not None:
        decoder_of(model).layers = decoder_of(model).layers[:layers]
        model.config.num_hidden_layers = layers
    shape, activations = measured_shape(config, backend, model.config, model.config.num_hidden_layers)
    prepare(config, backend, model, recompute=recompute, tile=tile)
    optimizer = make_optimizer(config.training.optimizer, trained_parameters(model), weight_decay=0.0)
    step(Objective(model, backend), optimizer, WARM_UP)
    optimizer.zero_grad()
    before = private_bytes()
    started = time.perf_counter()
    with sampled() as peaks:
        loss = step(Objective(model, backend), optimizer, tokens)
    seconds = time.perf_counter() - started
    planned = planned_memory(shape, activations, tokens, recompute=recompute, packed=packed)
    return {
        "tokens": tokens,
        "loss": loss,
        "step_mib": round((max(peaks) - before) / 2**20),
        "planned_step_mib": round((planned.gradients + planned.activations + planned.loss) / 2**20),
        "peak_resident_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10),
        "planned_mib": round(planned.total / 2**20),
        "parts_mib": {name: round(value / 2**20) for name, value in vars(planned).items()},
        "seconds": round(seconds, 1),
    }


def prepare(config: Config, backend: Backend, model: PreTrainedModel, *, recompute: bool, tile: int) -> None:
    """What a run does with a loaded model."""
    if config.training.method == "lora":
        add_lora(model, config.lora, base="base", seed=0, lean=not backend.precision.autocast)
    place(model, world=World(0, 1, 0, CPU, 1), checkpointing=recompute, sync_batch_norm=False)
    if backend.name == "cpu" and config.training.compile is not False:
        backend.compile(model)
    if recompute:
        return_freed_memory(os.environ)
    if recompute and tile:
        tile_blocks(model, tokens=tile)
    if config.training.activation_offloading is True:
        store = backend.offload_store()
        if isinstance(store, str):
            raise SystemExit(store)
        offload_inputs(model, store)


def step(objective: Objective, optimizer: torch.optim.Optimizer, tokens: int) -> float:
    """One update on a row of so many tokens; its mean loss."""
    random = np.random.default_rng(0)
    ids = random.integers(4, min(2000, objective.model.config.vocab_size), tokens).astype(np.int32)
    batch = make_microbatch([Example("rows", 0, 1, ids, np.arange(tokens) > 0)], keys=[0], index=0)
    loss = objective.loss_sum(batch) / tokens
    loss.backward()
    optimizer.step()
    return loss.item()


def planned_memory(shape: ModelShape, activations: Activations, tokens: int, *, recompute: bool, packed: float | None) -> Memory:
    """What `llamahome plan` says of a pass of one row, all of whose tokens are targets."""
    backend, training = activations.backend, activations.config.training
    storage, computed = backend.precision.storage.itemsize, backend.precision.compute.itemsize
    here = Cluster(DEVICES["h100"], 1, 1)
    layout = layout_of("replicate", here, stored=storage, computed=computed, apart=training.method == "lora")
    kept, recomputed = activations.of(tokens)
    work = Pass(
        tokens=tokens,
        targets=tokens,
        kept_bytes=kept,
        recomputed_bytes=recomputed,
        recomputes=recompute,
        tile_bytes=backend.tile_bytes(activations.whole.config.get_text_config().vocab_size),
        offloaded_bytes=activations.offloaded(tokens, recomputed),
        offloads=training.activation_offloading is True,
        layer_bytes=activations.layer(tokens, recomputed),
    )
    return memory_of(shape, replace(layout, packed=packed), work)


def private_bytes() -> int:
    """RssAnon of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


@contextmanager
def sampled() -> Iterator[list[int]]:
    """The private bytes of this process while the block runs."""
    found, done = [private_bytes()], threading.Event()

    def look() -> None:
        while not done.wait(0.005):
            found.append(private_bytes())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    main()
