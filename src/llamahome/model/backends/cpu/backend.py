"""The back end for processors: passes compiled for the machine where they are proved and faster, plain torch elsewhere.

Without a compiler, or where compiling would not win its time back, attention works in blocks of plain torch and everything else is as in
the reference back end.
"""

import logging

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llamahome.config.schema import Config
from llamahome.model.backends.backend import Batch, Pass, Scoring
from llamahome.model.backends.cpu import native
from llamahome.model.backends.cpu.beginnings import draws_lots, lay_once
from llamahome.model.backends.cpu.blocks import QUERY_BLOCK, block_attention
from llamahome.model.backends.cpu.fuse import fuse, keeps_little
from llamahome.model.backends.cpu.head import CompiledTiles
from llamahome.model.backends.cpu.linears import fan_shape
from llamahome.model.backends.cpu.native import Kernels
from llamahome.model.backends.cpu.race import Shape, Speeds, race, summary, told
from llamahome.model.backends.cpu.tiled import can_tile, tiled_attention, will_tile
from llamahome.model.backends.documents import Documents
from llamahome.model.backends.loss import Head, PlainTiles
from llamahome.model.backends.reference import Reference, plain_bytes, reference_attention
from llamahome.model.packing import packing_of
from llamahome.model.precision import Precision


class CpuBackend(Reference):
    """`kernels` are the compiled passes; None until `compile`."""

    name = "cpu"
    micro_batch_tokens = 1536
    """measured (docs/log.md): 1,536 take 1 % more time than 2,048 and 200 MB less (starter); 1,024 take 4 % more."""
    compiles = True

    def __init__(self, precision: Precision, *, kernels: Kernels | None = None) -> None:
        super().__init__(torch.device("cpu"), precision)
        self.kernels = kernels
        self._head_speeds: Speeds | None = None

    def attend(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, documents: Documents, scoring: Scoring, /) -> Tensor:
        """In compiled tiles, in blocks, or as the reference where scores are capped or dropped."""
        if scoring.softcap is not None or scoring.dropout:
            return reference_attention(q_THE, k_TKE, v_TKE, documents, scoring)
        q_THE, k_TKE = q_THE.to(v_TKE.dtype), k_TKE.to(v_TKE.dtype)  # under autocast rotation leaves them in float32
        scale, window = scoring.scale, scoring.window
        if self.kernels is not None and can_tile(q_THE, k_TKE, v_TKE, self.kernels):
            return tiled_attention(q_THE, k_TKE, v_TKE, documents, scale=scale, window=window, kernels=self.kernels)
        return block_attention(q_THE, k_TKE, v_TKE, documents, scale=scale, window=window, kernels=self.kernels)

    def lay(self, batch: Batch, model: PreTrainedModel, /) -> Pass:
        """Tokens with which all documents begin once, where copies of a token come out the same."""
        if (
            not packing_of(model).shares_beginnings
            or draws_lots(model)
            or getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
        ):
            return super().lay(batch, model)
        laid = lay_once(batch.tokens_T, batch.positions_T, batch.rows_N, batch.lengths)
        return Pass(laid.tokens_C, laid.positions_C, laid.rows_N, Documents(batch.lengths, laid.shared))

    def _tiles(self, matrix_VD: Tensor, head: Head) -> PlainTiles:
        return PlainTiles(matrix_VD, head) if self.kernels is None else CompiledTiles(matrix_VD, head, self.kernels, self._head_speeds)

    def wins_back(self, tokens: float, *, weights: int, processes: int) -> bool:
        """Whether the run is long enough for compiling, or the library is there already."""
        return not native.must_compile() or native.wins_back(tokens, weights=weights, processes=processes)

    def cannot_compile(self) -> str | None:
        """Compiles the library, once per machine; why it could not."""
        found = native.load_kernels()
        return found if isinstance(found, str) else None

    def compile(self, model: PreTrainedModel) -> int:
        """Replace the parts of `model` that are proved equal."""
        kernels = native.load_kernels()
        if isinstance(kernels, str):
            raise RuntimeError(kernels)
        self.kernels = kernels
        speeds: dict[Shape, Speeds] = {}
        parts = fuse(model, self, kernels=kernels, speeds=speeds)
        head = model.get_output_embeddings()
        if isinstance(head, nn.Linear):
            shape = fan_shape([head], tokens=self.micro_batch_tokens, compute=self.precision.compute)
            speeds |= race([shape], kernels)
            self._head_speeds = speeds.get(shape)
        if speeds:
            logging.getLogger(__name__).info("products: %s", told(speeds))
            self.compile_costs = summary(speeds)
        return parts

    def kept_bytes(self, config: Config, model: PreTrainedModel, tokens: int, *, longest: int, compiled: bool) -> int:
        """Tiles make the probabilities again, blocks keep those below the diagonal; compiled norms and gates are made again as well."""
        text, compute = model.config.get_text_config(), self.precision.compute
        if packing_of(model).why_alone is not None:
            return plain_bytes(text, tokens, precision=self.precision, keys=longest)
        compiled = compiled and native.has_compiler()
        capped = getattr(text, "attn_logit_softcapping", None) or getattr(text, "attention_dropout", 0.0)
        keys = tokens if capped else 0 if compiled and will_tile(text, compute) else longest / 2 + QUERY_BLOCK / 2
        if not (compiled and _makes_again(config, self.precision) and keeps_little(model)):
            return plain_bytes(text, tokens, precision=self.precision, keys=keys)
        heads, inner = text.num_attention_heads, getattr(text, "intermediate_size", None) or 4 * text.hidden_size
        size = getattr(text, "head_dim", None) or text.hidden_size // heads
        attention = 2 * size * (heads + text.num_key_value_heads) + heads * keys
        layer = 2 * text.hidden_size * self.precision.storage.itemsize + (attention + 2 * inner) * compute.itemsize
        # one layer more stands for gradients on their way
        return int(tokens * (text.num_hidden_layers * layer + layer - heads * keys * compute.itemsize))


def _makes_again(config: Config, precision: Precision) -> bool:
    """Whether norms and gates are made again in the backward pass, where fuse.py finds layers of its form."""
    settled = config.training.method == "full" or not (config.lora.dropout or config.lora.use_dora)
    return settled and precision.autocast == (config.training.method == "full")
