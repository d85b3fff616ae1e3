"""The back end for CUDA devices: attention over all documents at once, compiled layers, passes that travel ahead of the step.

It computes on any device of torch: on "meta" the tests prove that nothing is read back, on a processor that it computes what the
reference does. Only streams, pinned memory and events are left out there.
"""

import os
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llamahome.config.schema import Config
from llamahome.model.backends.backend import B, Batch, Pass, Scoring
from llamahome.model.backends.cuda.attention import attend_documents, why_masked
from llamahome.model.backends.cuda.head import TILE_ROWS, CompiledDeviceTiles, PlainDeviceTiles, filled_up, turn_into_gradient
from llamahome.model.backends.cuda.layers import Compiled, Switch, compile_layers, why_not_compiled
from llamahome.model.backends.cuda.memory import keeps_probabilities, pass_bytes, tile_bytes
from llamahome.model.backends.cuda.passes import Courier, Packed, packed, padded_size
from llamahome.model.backends.documents import Documents
from llamahome.model.backends.loss import Head, HeadStats, PlainTiles, head_stats, summed_cross_entropy
from llamahome.model.backends.reference import Reference, plain_bytes
from llamahome.model.packing import packing_of
from llamahome.model.precision import Precision

_SAVED_PER_TOKEN = 1.3e-14
"""Seconds that compiling saves per token and weight. measured on an H100, 1B shape (docs/log.md): 75,103 tokens/s, 38,245 without."""
_COMPILE_SECONDS = 60.0
"""A first step with compiling took 12 to 19 s there; a run meets two to four sizes of passes, and each is compiled."""
_ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


class CudaBackend(Reference):
    """torch's kernels; layers and the loss head's tiles are compiled once `compile` was called."""

    name = "cuda"
    micro_batch_tokens = 16_384
    fewest_tokens = 4096
    """measured on an H100 (docs/log.md): the 1B shape with the first, the 8B shape with a half of it; fewer were not tried."""
    compiles = True
    compile_costs = "a step that meets a new size of pass compiles it first; on an H100 such a step takes 12 to 19 s"
    memory_gbps = 1000.0
    pass_tokens_per_answer_token = 1000.0
    """An estimate: a pass of one token takes as long as its kernels take to launch, about 25 ms."""

    def __init__(self, device: torch.device, precision: Precision) -> None:
        super().__init__(device, precision)
        self._courier = Courier(device)
        self._turn: Compiled | None = None
        self._switch = Switch()
        if device.type == "cuda":
            _set_up()

    def attend(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, documents: Documents, scoring: Scoring, /) -> Tensor:
        """Over all documents at once; rotation may leave q and k in another type than v."""
        q_THE, k_TKE = q_THE.to(v_TKE.dtype), k_TKE.to(v_TKE.dtype)
        return attend_documents(q_THE, k_TKE, v_TKE, packed(documents, q_THE.device), scoring)

    def deliver(self, batch: B, /) -> B:
        """`batch` on the device, padded, by one copy that nobody waits for."""
        return self._courier.deliver(batch)

    def lay(self, batch: Batch, model: PreTrainedModel, /) -> Pass:
        """All tokens and those that fill up; what is queued afterwards waits for the copy."""
        there = batch if isinstance(batch.documents, Packed) else self.deliver(batch)
        documents = there.documents
        if not isinstance(documents, Packed):
            raise TypeError("a delivered pass knows its documents")
        self._courier.receive(documents)
        if packing_of(model).why_alone is not None:  # what fills the pass up would be computed too
            real = sum(there.lengths)
            return Pass(there.tokens_T[:real], there.positions_T[:real], there.rows_N, Documents(there.lengths))
        return Pass(there.tokens_T, there.positions_T, there.rows_N, documents)

    def loss_sum(self, hidden_ND: Tensor, labels_N: Tensor, head: Head) -> Tensor:
        """() float32: sum over targets of -log p(label)."""
        if self._turn is not None and self._switch.on:
            hidden_ND, labels_N = filled_up(hidden_ND, labels_N)
        return summed_cross_entropy(hidden_ND, labels_N, head, dtype=self.precision.compute, tiles=self._tiles)

    def _tiles(self, matrix_VD: Tensor, head: Head) -> PlainTiles:
        if self._turn is None:
            return PlainDeviceTiles(matrix_VD, head)
        return CompiledDeviceTiles(matrix_VD, head, self._turn)

    def stats(self, hidden_ND: Tensor, labels_N: Tensor, head: Head) -> HeadStats:
        """Summed loss and number of targets ranked first, without gradients."""
        return head_stats(hidden_ND, labels_N, head, dtype=self.precision.compute, logits=TILE_ROWS * head.weight_VD.shape[0])

    def wins_back(self, tokens: float, *, weights: int, processes: int) -> bool:
        """Whether passes over `tokens` by all processes win back the time of compiling."""
        return tokens / processes * weights * _SAVED_PER_TOKEN > _COMPILE_SECONDS

    def cannot_compile(self) -> str | None:
        """Compiles a small function to see."""
        return why_not_compiled(self.device)

    def compile(self, model: PreTrainedModel) -> int:
        """Decoder layers and the loss head's tiles, when they are first used."""
        layers = compile_layers(model, self._switch)
        self._turn = Compiled(turn_into_gradient, self._switch, whole=True)
        return layers + 1

    def kept_bytes(self, config: Config, model: PreTrainedModel, tokens: int, *, longest: int, compiled: bool) -> int:
        """From the shapes of a layer where it is compiled; torch's kernels make the probabilities again."""
        text: Any = model.config.get_text_config()
        if packing_of(model).why_alone is not None:
            return plain_bytes(text, tokens, precision=self.precision, keys=longest)
        lean = compiled and not (config.training.method == "lora" and (config.lora.dropout or config.lora.use_dora))
        return pass_bytes(text, padded_size(tokens), precision=self.precision, compiled=lean)

    def tile_bytes(self, vocabulary: int) -> int:
        """Of the loss head's tile of logits."""
        return tile_bytes(vocabulary, TILE_ROWS, self.precision.compute)

    def remarks(self, model: PreTrainedModel) -> list[str]:
        """Which attention of `model` is computed in a slower way, and why."""
        text: Any = model.config.get_text_config()
        if packing_of(model).why_alone is not None:  # its attention is its own
            return []
        if keeps_probabilities(text):
            return ["attention: its scores are capped or dropped, so all tokens of a pass are compared with all others, which is slower"]
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        why = why_masked(size, getattr(text, "v_head_dim", None) or size, self.precision.compute)
        if why is None:
            return []
        return [f"attention: {why}, which torch's varlen_attn does not take; a masked product is used, which is slower"]

    def mark(self) -> object:
        """An event in the queue of the device."""
        if self.device.type != "cuda":
            return super().mark()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds_between(self, earlier: Any, later: Any) -> float:
        """By the clock of the device."""
        if self.device.type != "cuda":
            return super().seconds_between(earlier, later)
        later.synchronize()
        return float(earlier.elapsed_time(later)) / 1000

    def free_bytes(self, local_size: int) -> int | None:
        """Of this process's own device; processes of one machine have one each."""
        return int(torch.cuda.mem_get_info(self.device)[0])


def _set_up() -> None:
    """TF32 for what is float32 by choice, memory in segments that grow, never cuDNN's attention, which plans for each length anew."""
    settings: Any = torch._C
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # type: ignore[attr-defined]
    if not any(name in os.environ for name in _ALLOCATOR_SETTINGS):
        settings._accelerator_setAllocatorSettings("expandable_segments:True")
    torch.backends.cuda.enable_cudnn_sdp(False)
