"""The memory that a run is planned to take, for those who watch it: computed from shapes when the run is ready, in well under a second.

`plan` says the same before a run; here every setting is known, so nothing is guessed: the tokens of a pass, gradient checkpointing, the
strategy. One rank is planned, because what is recorded is the memory of the main process.
"""

from dataclasses import asdict

import torch

from llamahome.assembly import Job
from llamahome.errors import ConfigError
from llamahome.model.skeleton import read_shape, require_layers
from llamahome.model.stream import stream_of
from llamahome.monitoring.resources import process_memory
from llamahome.planning.forecast import Cluster, layout_of
from llamahome.planning.hardware import DEVICES
from llamahome.planning.measure import measure
from llamahome.planning.memory import Pass, memory_of
from llamahome.planning.shapes import CONFIGS


class MemoryPlan:
    """Made when the libraries are loaded and nothing else is, because it counts them; called when the run is ready."""

    def __init__(self) -> None:
        self._libraries, _ = process_memory()

    def __call__(self, job: Job) -> dict[str, int] | None:
        """Bytes by purpose, and under `beside` those of Python and its libraries; None for a model that cannot be planned.

        On a GPU the plan is of the GPU's memory, and nothing is beside it.
        """
        config, backend, world, report = job.config, job.data.backend, job.session.world, job.data.prepared.report
        try:
            read = require_layers(read_shape(str(job.data.base), CONFIGS), config.model.name)
            text, most = read.get_text_config(), max(int(config.training.micro_batch_tokens), config.data.max_length)
            with torch.random.fork_rng(devices=[]):  # adapters that are made for their shapes draw numbers
                shape, activations = measure(config, backend, read, int(text.num_hidden_layers))
        except ConfigError:
            return None
        storage, computed = backend.precision.storage.itemsize, backend.precision.compute.itemsize
        ranks = Cluster(DEVICES["h100"], world.size, world.local_size)  # of which only the numbers of ranks matter
        strategy, apart = config.distributed.strategy, config.training.method == "lora"
        layout = layout_of("replicate" if strategy == "auto" else strategy, ranks, stored=storage, computed=computed, apart=apart)
        kept, recomputed = activations.of(most)
        work = Pass(
            tokens=most,
            targets=round(most * report.answer_share),
            kept_bytes=kept,
            recomputed_bytes=recomputed,
            recomputes=config.training.gradient_checkpointing is True,
            tile_bytes=backend.tile_bytes(int(text.vocab_size)),
            offloaded_bytes=activations.offloaded(most, recomputed),
            layer_bytes=activations.layer(most, recomputed),
            offloads=config.training.activation_offloading is True,
        )
        beside = self._libraries if world.device.type == "cpu" else 0
        planned = asdict(memory_of(shape, layout, work))
        if (stream := stream_of(job.learner.model)) is not None:
            planned["weights"] -= max(0, stream.base_bytes - stream.kept_bytes - stream.room_bytes)
        return {**planned, "beside": beside}
