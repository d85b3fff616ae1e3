"""How a model computes the documents of a pass: all at once, with attention inside documents, or one at a time, as transformers does.

The second is for models whose code cannot keep documents apart: attention code of their own, alibi, states that run along the pass.
Values and gradients are the same in both; one at a time, a pass is as many small ones as it has documents, and nothing is fused.
load.py finds what a model needs by trying it (probe.py) and keeps it on the model.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llamahome.model.backends.backend import Attend
from llamahome.model.backends.documents import Documents
from llamahome.model.decoder import decoder_of
from llamahome.model.rotary import DocumentRotary

_KEPT_AS = "llamahome_packing"


@dataclass
class Packing:
    """What is known of one model."""

    why_alone: str | None = None
    """Why documents run one at a time; None where they run together."""
    rotaries: list[DocumentRotary] = field(default_factory=list)
    """Modules whose tables depend on the length of a document."""

    @property
    def shares_beginnings(self) -> bool:
        """Whether equal tokens at the beginning of documents come out the same, whatever follows them."""
        return self.why_alone is None and not self.rotaries

    def begin(self, lengths: tuple[int, ...] | None) -> None:
        """Let tables be made for documents of these lengths; None: for a forward that is not ours."""
        for rotary in self.rotaries:
            if lengths is None:
                rotary.reset()
            else:
                rotary.lengths = lengths

    def remarks(self, *, documents: float | None = None, passes: float | None = None) -> list[str]:
        """What is said of it; with what one at a time costs where `documents` would take so many `passes` together."""
        told = []
        if self.rotaries:
            told.append("rotary tables of this model depend on the length of what they are made for: they are made for each document alone")
        if self.why_alone is not None:
            cost = ""
            if documents is not None and passes is not None:
                cost = f"; about {documents:,.0f} small passes instead of {max(1.0, passes):,.0f} full ones"
            told.append(f"documents run one at a time, because {self.why_alone}{cost}")
        return told


def keep_packing(model: PreTrainedModel, packing: Packing) -> None:
    """From now on `model` computes documents so."""
    setattr(model, _KEPT_AS, packing)


def packing_of(model: PreTrainedModel) -> Packing:
    """Of a model of load_model; together and without anything special for any other."""
    packing: Packing = getattr(model, _KEPT_AS, None) or Packing()
    return packing


def last_hidden(model: PreTrainedModel, tokens_T: Tensor, positions_T: Tensor, documents: Documents, *, attend: Attend) -> Tensor:
    """The decoder's last hidden states [T, D] of documents that lie end to end."""
    packing, decoder = packing_of(model), decoder_of(model)
    if packing.why_alone is None:
        packing.begin(documents.lengths)
        inputs = {"input_ids": tokens_T[None], "position_ids": positions_T[None]}
        hidden_TD: Tensor = decoder(**inputs, use_cache=False, documents=documents, attend=attend).last_hidden_state[0]
        return hidden_TD
    if documents.shared:
        raise ValueError("documents that run one at a time share no beginning")
    parts = []
    for tokens in torch.split(tokens_T, list(documents.lengths)):
        packing.begin((len(tokens),))
        parts.append(decoder(input_ids=tokens[None], use_cache=False).last_hidden_state[0])
    return torch.cat(parts)
