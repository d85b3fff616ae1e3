"""Run the decoder on the documents of a pass: packed into one forward with attention inside documents, or one document at a time.

One at a time is for models whose code cannot separate packed documents: own attention code, alibi, recurrent states. Values and gradients
are the same, but each document is a forward of its own and nothing is fused. load.py tests a model (probe.py) and stores the result on it.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llamahome.model.backends.backend import Attend, Documents
from llamahome.model.rotary import DocumentRotary

_ATTRIBUTE = "llamahome_packing"


@dataclass
class Packing:
    """How one model runs packed documents."""

    why_alone: str | None = None
    """Why documents run one at a time; None if they are packed."""
    rotaries: list[DocumentRotary] = field(default_factory=list)
    """Rotary modules whose tables depend on the length of a document."""

    @property
    def shares_prefixes(self) -> bool:
        """Whether equal prefixes of documents have equal hidden states, whatever follows them."""
        return self.why_alone is None and not self.rotaries

    def begin(self, lengths: tuple[int, ...] | None) -> None:
        """Prepare the rotary tables for documents of these lengths, or, for None, for a forward of transformers."""
        for rotary in self.rotaries:
            if lengths is None:
                rotary.reset()
            else:
                rotary.lengths = lengths

    def remarks(self, *, documents: float | None = None, passes: float | None = None) -> list[str]:
        """Lines for the user; `documents` and `passes` of an epoch, if both are given, add what one document at a time costs."""
        lines = []
        if self.rotaries:
            lines.append("the rotary tables of this model depend on the length of the input, so they are made for each document alone")
        if self.why_alone is not None:
            cost = ""
            if documents is not None and passes is not None:
                cost = f"; about {documents:,.0f} small passes instead of {max(1.0, passes):,.0f} full ones"
            lines.append(f"documents run one at a time, because {self.why_alone}{cost}")
        return lines


def store_packing(model: PreTrainedModel, packing: Packing) -> None:
    """Store `packing` on `model`."""
    setattr(model, _ATTRIBUTE, packing)


def packing_of(model: PreTrainedModel) -> Packing:
    """The packing stored on `model`; the default for a model that load_model did not load."""
    packing: Packing = getattr(model, _ATTRIBUTE, None) or Packing()
    return packing


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The decoder of a model with or without adapters; `model` is not PEFT's wrapper but the model inside it.

    transformers' get_decoder() returns any module named `decoder`, which in ModernBERT is the output head, and returns the whole model if
    the prefix of the family names no submodule (Llama 4). In these cases the decoder is the child that owns the embedding.
    """
    decoder = model.get_decoder()
    if decoder is not model and decoder is not model.get_output_embeddings():
        return decoder
    embedding = model.get_input_embeddings()
    children = (child for child in model.children() if isinstance(child, PreTrainedModel))
    return next((child for child in children if any(module is embedding for module in child.modules())), decoder)


def last_hidden(model: PreTrainedModel, tokens_T: Tensor, positions_T: Tensor, documents: Documents, *, attend: Attend) -> Tensor:
    """The decoder's last hidden states [T, D] of documents that lie end to end."""
    packing, decoder = packing_of(model), decoder_of(model)
    if packing.why_alone is None:
        packing.begin(documents.lengths)
        inputs = {"input_ids": tokens_T[None], "position_ids": positions_T[None]}
        hidden_TD: Tensor = decoder(**inputs, use_cache=False, documents=documents, attend=attend).last_hidden_state[0]
        return hidden_TD
    if documents.shared:
        raise ValueError("documents that run one at a time cannot share a prefix")
    parts = []
    for tokens in torch.split(tokens_T, list(documents.lengths)):
        packing.begin((len(tokens),))
        parts.append(decoder(input_ids=tokens[None], use_cache=False).last_hidden_state[0])
    return torch.cat(parts)
