"""The back end for CUDA devices: attention over all documents at once, compiled layers, and passes that are copied ahead of the step.

It runs on any device of torch, without streams, pinned memory and events. The tests use that: on "meta" they prove that nothing is read
back from the device, and on a processor that the results equal the reference.
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llamahome.config.schema import Config
from llamahome.model.backends.backend import TILE_TOKENS, B, Batch, Documents, OffloadStore, Pass, Scoring
from llamahome.model.backends.cuda.attention import attend_documents, why_masked
from llamahome.model.backends.cuda.head import TILE_ROWS, CompiledDeviceTiles, PlainDeviceTiles, loss_and_gradient_, pad_targets
from llamahome.model.backends.cuda.layers import Compiled, Switch, compile_layers, why_not_compiled
from llamahome.model.backends.cuda.memory import keeps_probabilities, pass_bytes, tile_bytes
from llamahome.model.backends.cuda.passes import PackedDocuments, PassCopier, packed, padded_size
from llamahome.model.backends.cuda.pinned_store import PinnedStore
from llamahome.model.backends.cuda.snapshot import snapshot_at_first_failure
from llamahome.model.backends.logprobs import target_logprobs
from llamahome.model.backends.loss import Head, HeadStats, PlainTiles, head_stats, summed_cross_entropy
from llamahome.model.backends.reference import Reference, plain_bytes
from llamahome.model.backends.token_losses import TokenLoss, summed_token_loss
from llamahome.model.packing import packing_of
from llamahome.model.precision import Precision

_SAVED_SECONDS = 1.3e-14
"""Time that compiling saves per token and weight. measured on an H100, 1B shape (docs/log.md): 75,103 tokens/s, 38,245 uncompiled."""
_COMPILE_SECONDS = 60.0
"""A first step with compiling took 12 to 19 s there; a run has two to four sizes of passes, and each is compiled."""
_ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


class CudaBackend(Reference):
    """torch's kernels. `compile` compiles the decoder layers and the loss head's tiles."""

    name = "cuda"
    micro_batch_tokens = 16_384
    min_micro_batch_tokens = 4096
    """measured on an H100 (docs/log.md): the 1B shape with 16,384 tokens, the 8B shape with 8,192; fewer were not tried."""
    compiles = True
    compile_note = "a step that meets a new size of pass compiles it first; on an H100 such a step takes 12 to 19 s"
    memory_gbps = 1000.0
    pass_tokens_per_answer_token = 1000.0
    """An estimate: launching the kernels of a pass of one token takes about 25 ms."""

    def __init__(self, device: torch.device, precision: Precision) -> None:
        super().__init__(device, precision)
        self._copier = PassCopier(device)
        self._loss_and_gradient: Compiled | None = None
        self._switch = Switch()
        if device.type == "cuda":
            _configure_torch()

    def attend(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, documents: Documents, scoring: Scoring, /) -> Tensor:
        """Attention over all documents at once, in the dtype of v; rotary embeddings may leave q and k in another one."""
        q_THE, k_TKE = q_THE.to(v_TKE.dtype), k_TKE.to(v_TKE.dtype)
        return attend_documents(q_THE, k_TKE, v_TKE, packed(documents, q_THE.device), scoring)

    def to_device(self, batch: B, /) -> B:
        """`batch` on the device, padded, by one asynchronous copy."""
        return self._copier.to_device(batch)

    def make_pass(self, batch: Batch, model: PreTrainedModel, /) -> Pass:
        """All tokens including padding; the current stream waits for their copy. Without padding if documents run one at a time."""
        copied = batch if isinstance(batch.documents, PackedDocuments) else self.to_device(batch)
        documents = copied.documents
        if not isinstance(documents, PackedDocuments):
            raise TypeError("a batch on the device has packed documents")
        self._copier.wait_for_copy(documents)
        if packing_of(model).why_alone is not None:
            count = sum(copied.lengths)
            return Pass(copied.tokens_T[:count], copied.positions_T[:count], copied.rows_N, Documents(copied.lengths))
        return Pass(copied.tokens_T, copied.positions_T, copied.rows_N, documents)

    def shares_prefixes(self, model: PreTrainedModel, /) -> bool:
        """Never: the kernels read documents in full."""
        return False

    def logprobs(self, hidden_ND: Tensor, labels_N: Tensor, head: Head) -> Tensor:
        """[N] float32: log p(label) of each target, in large tiles of plain torch."""
        return target_logprobs(hidden_ND, labels_N, head, dtype=self.precision.compute, tiles=PlainDeviceTiles)

    def loss_sum(self, hidden_ND: Tensor, labels_N: Tensor, head: Head) -> Tensor:
        """() float32: sum over targets of -log p(label)."""
        if self._loss_and_gradient is not None and self._switch.on:
            hidden_ND, labels_N = pad_targets(hidden_ND, labels_N)
        return summed_cross_entropy(hidden_ND, labels_N, head, dtype=self.precision.compute, tiles=self._tiles)

    def token_loss_sum(self, hidden_ND: Tensor, head: Head, loss: TokenLoss) -> Tensor:
        """() float32: sum over targets of another loss, in large tiles of plain torch."""
        logits = TILE_ROWS * head.weight_VD.shape[0]
        return summed_token_loss(hidden_ND, head, loss, dtype=self.precision.compute, tiles=PlainDeviceTiles, logits=logits)

    def _tiles(self, matrix_VD: Tensor, head: Head) -> PlainTiles:
        if self._loss_and_gradient is None:
            return PlainDeviceTiles(matrix_VD, head)
        return CompiledDeviceTiles(matrix_VD, head, self._loss_and_gradient)

    def stats(self, hidden_ND: Tensor, labels_N: Tensor, head: Head) -> HeadStats:
        """Summed loss and number of targets ranked first, without gradients."""
        return head_stats(hidden_ND, labels_N, head, dtype=self.precision.compute, logits=TILE_ROWS * head.weight_VD.shape[0])

    def compile_pays_off(self, tokens: float, *, weights: int, processes: int) -> bool:
        """Whether compiling saves more time than it takes, if all processes together train on `tokens`."""
        return tokens / processes * weights * _SAVED_SECONDS > _COMPILE_SECONDS

    def cannot_compile(self) -> str | None:
        """The reason why a small function cannot be compiled, or None."""
        return why_not_compiled(self.device)

    def compile(self, model: PreTrainedModel) -> int:
        """Let decoder layers and the loss head's tiles be compiled at their first use."""
        layers = compile_layers(model, self._switch)
        self._loss_and_gradient = Compiled(loss_and_gradient_, self._switch, fullgraph=True)
        return layers + 1

    def kept_bytes(self, config: Config, model: PreTrainedModel, tokens: int, *, longest: int, compiled: bool) -> int:
        """Estimated memory that a forward pass keeps; torch's attention kernels recompute the probabilities."""
        text: Any = model.config.get_text_config()
        if packing_of(model).why_alone is not None:
            return plain_bytes(text, tokens, precision=self.precision, keys=longest)
        compiled = compiled and not (config.training.method == "lora" and (config.lora.dropout or config.lora.use_dora))
        return pass_bytes(text, padded_size(tokens), precision=self.precision, compiled=compiled)

    def recomputed_bytes(self, config: Config, model: PreTrainedModel, tokens: int, *, longest: int, compiled: bool) -> int:
        """The input of each layer and everything of one layer."""
        text: Any = model.config.get_text_config()
        kept = self.kept_bytes(config, model, tokens, longest=longest, compiled=compiled)
        inputs: int = padded_size(tokens) * text.hidden_size * text.num_hidden_layers * self.precision.storage.itemsize
        return inputs + kept // int(text.num_hidden_layers)

    def tile_tokens(self, compiled: bool) -> int | None:
        """None for compiled layers, whose blocks are in a graph."""
        return None if compiled else TILE_TOKENS

    def tile_bytes(self, vocabulary: int) -> int:
        """The loss head's tile of logits."""
        return tile_bytes(vocabulary, TILE_ROWS, self.precision.compute)

    def performance_notes(self, model: PreTrainedModel) -> list[str]:
        """A message if attention of `model` runs as a masked product, with the reason."""
        text: Any = model.config.get_text_config()
        if packing_of(model).why_alone is not None:  # such a model has its own attention
            return []
        if keeps_probabilities(text):
            return ["attention: its scores are capped or dropped, so all tokens of a pass are compared with all others, which is slower"]
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        reason = why_masked(size, getattr(text, "v_head_dim", None) or size, self.precision.compute)
        if reason is None:
            return []
        return [f"attention: {reason}, which torch's varlen_attn does not support; a masked product is used, which is slower"]

    def timestamp(self) -> object:
        """An event in the queue of the device."""
        if self.device.type != "cuda":
            return super().timestamp()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds_between(self, earlier: Any, later: Any) -> float:
        """Seconds by the clock of the device."""
        if self.device.type != "cuda":
            return super().seconds_between(earlier, later)
        later.synchronize()
        return float(earlier.elapsed_time(later)) / 1000

    def snapshot_out_of_memory(self, path: Path) -> bool:
        """Record the allocations from now on, and write them when one fails."""
        snapshot_at_first_failure(path)
        return True

    def free_bytes(self, local_size: int) -> int | None:
        """Free memory of this process's device; processes of one machine do not share devices."""
        return int(torch.cuda.mem_get_info(self.device)[0])

    def offload_store(self) -> OffloadStore | str:
        """Pinned memory of the machine."""
        return PinnedStore(self.device)


def _configure_torch() -> None:
    """TF32 for float32 products, expandable memory segments, and no cuDNN attention, which plans again for each length."""
    settings: Any = torch._C
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # type: ignore[attr-defined]
    if not any(name in os.environ for name in _ALLOCATOR_SETTINGS):
        settings._accelerator_setAllocatorSettings("expandable_segments:True")
    torch.backends.cuda.enable_cudnn_sdp(False)
