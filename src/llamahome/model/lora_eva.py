"""EVA: adapters begin with the principal directions of what their layers get from the rows, and ranks go where directions explain most.

Each layer that may get an adapter keeps an incremental PCA of its inputs at the positions that predict targets. Layers with one input, as
q, k and v, share one. Of all directions of all layers, as many as the ranks of all layers together are kept, by the share of variance that
they explain; the rows of A are a layer's kept directions, B is zero, and a layer without any gets no adapter.
Cost: forward passes over 64 rows, and about as much again for the PCA; in memory as many numbers as A has, EVA_WIDER times.
Source: EVA, arXiv 2410.07170; PEFT's IncrementalPCA.

Legend: T tokens, N positions that predict targets, I inputs, R rank.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.utils.incremental_pca import IncrementalPCA
from torch import Tensor, nn
from transformers import PreTrainedModel

from llamahome.config.schema import LoraConfig
from llamahome.distributed.world import World
from llamahome.errors import ConfigError, Problem
from llamahome.model.backends.backend import Backend, Batch
from llamahome.model.lora import chosen_targets
from llamahome.model.lora_layers import ADAPTER
from llamahome.model.objective import hidden_states

EVA_WIDER = 2
"""A layer may get this many times lora.rank: rho of the paper."""
_SEED = 42
"""Of the randomised decomposition, as in PEFT."""
Directions = Mapping[str, Tensor]
"""Path of a layer -> the rows of its A, float32 [R, I]; R is 0 where a layer gets no adapter."""


class _Inputs:
    """The principal directions of what layers get, collected by hooks; layers that get the same tensor share them."""

    def __init__(self, most: int) -> None:
        self.most, self.rows_N, self.leader = most, torch.empty(0), dict[str, str]()
        self.found: dict[str, IncrementalPCA] = {}
        self._last: tuple[str, Tensor | None] = ("", None)

    def watch(self, path: str, layer: nn.Module) -> Any:
        """Collect what `layer` gets until the returned handle is removed."""

        def see(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs[0] is not self._last[1]:
                self._last = path, inputs[0]
                self._fit(path, inputs[0])
            self.leader[path] = self._last[0]

        return layer.register_forward_pre_hook(see)

    def _fit(self, path: str, x: Tensor) -> None:
        x_NI = x.detach().reshape(-1, x.shape[-1]).index_select(0, self.rows_N).float()
        if len(x_NI) >= self.most <= x_NI.shape[1]:
            pca = self.found.setdefault(path, IncrementalPCA(n_components=self.most, copy=True, lowrank=True, lowrank_seed=_SEED))
            pca.partial_fit(x_NI)


@torch.no_grad()
def find_directions(model: PreTrainedModel, config: LoraConfig, backend: Backend, passes: Sequence[Batch]) -> Directions:
    """The directions of every layer that `config` selects in a base without adapters. Raises ConfigError lora.no-initial-values if a pass
    with enough targets is missing.
    """
    paths = _plain(model, config)
    inputs, was_training = _Inputs(EVA_WIDER * config.rank), model.training
    handles = [inputs.watch(path, model.get_submodule(path)) for path in paths]
    try:
        model.eval()
        for batch in passes:
            laid = backend.make_pass(batch, model)
            inputs.rows_N = laid.rows_N
            hidden_states(model, laid, backend)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    if missing := [path for path in paths if inputs.leader.get(path) not in inputs.found]:
        targets = max((len(batch.rows_N) for batch in passes), default=0)
        message = f"lora.init eva needs passes of {inputs.most} targets and as many inputs, and the fullest of {len(passes)} has {targets}"
        hint = "--set lora.init=default, or a smaller lora.rank"
        raise ConfigError(Problem(code="lora.no-initial-values", message=f"{message} ({missing[0]})", where="lora.init", hint=hint))
    fitted = {path: inputs.found[inputs.leader[path]] for path in paths}
    ranks = share_ranks({path: pca.explained_variance_ratio_ for path, pca in fitted.items()}, budget=config.rank * len(paths))
    return {path: pca.components_[: ranks[path]].float().cpu().contiguous() for path, pca in fitted.items()}


def _plain(model: PreTrainedModel, config: LoraConfig) -> list[str]:
    chosen = chosen_targets(model, config)
    if chosen.parameters:
        message = f"lora.init eva watches the inputs of layers, and {chosen.parameters[0]} is a parameter of stacked experts"
        raise ConfigError(Problem(code="lora.no-initial-values", message=message, where="lora.init", hint="--set lora.init=default"))
    return chosen.modules


def share_ranks(explained: Mapping[str, Tensor], *, budget: int) -> dict[str, int]:
    """The number of directions of each layer among the `budget` directions of all layers that explain the largest share of variance."""
    every = [(-float(share), place, path) for path, shares in explained.items() for place, share in enumerate(shares)]
    kept = [path for _, _, path in sorted(every)[:budget]]
    return {path: kept.count(path) for path in explained}


def with_ranks(config: LoraConfig, directions: Directions) -> LoraConfig:
    """`config` with the layers and ranks of `directions`, and with alphas that leave the scale of every layer as it was."""
    ranks = {path: len(rows) for path, rows in directions.items() if len(rows)}
    other = {re.escape(path): rank for path, rank in ranks.items() if rank != config.rank}
    root = math.sqrt if config.use_rslora else float
    alphas = {path: config.alpha * root(rank / config.rank) for path, rank in other.items()}
    return config.model_copy(update={"target_modules": list(ranks), "layers": [], "rank_pattern": other, "alpha_pattern": alphas})


def begin_with(model: PreTrainedModel, directions: Directions, world: World) -> None:
    """Make `directions` the rows of A of each layer of an adapted `model`; those of process 0 count. All ranks call it."""
    for path, rows_RI in directions.items():
        if len(rows_RI):
            layer: Any = model.get_submodule(path)
            a_RI = layer.lora_A[ADAPTER].weight.data
            a_RI.copy_(rows_RI) if world.is_main else a_RI.zero_()
            world.sum_(a_RI)
