"""Register the attention of a back end with transformers.

The boundaries of the documents are passed as numbers beside the tokens, so transformers builds no attention mask.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from llamahome.model.backends.backend import Scoring

ATTENTION_NAME = "llamahome_documents"
"""The attention implementation in the model's config during training; generation uses torch's attention."""


class OtherAttention(ValueError):
    """A model needs a kind of attention that no back end computes."""


def register_attention(*, outside_graphs: bool = False) -> None:
    """Register `ATTENTION_NAME` with transformers; calling it again is safe. `outside_graphs` hides the function from torch.compile.

    No mask function is registered for the name, so transformers builds no mask.
    """
    disable: Any = torch.compiler.disable
    if outside_graphs:
        AttentionInterface.register(ATTENTION_NAME, disable(_documents_forward))
    elif ATTENTION_NAME not in AttentionInterface().valid_keys():
        AttentionInterface.register(ATTENTION_NAME, _documents_forward)


def _documents_forward(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Compute attention as transformers calls it: query [1, H, T, E] -> [1, T, H, E].

    `options` holds the options of transformers and, passed through the decoder, our `documents` and `attend`.
    """
    if attention_mask is not None or options.get("s_aux") is not None:
        raise OtherAttention("its attention has a mask or sinks of its own")
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    scoring = Scoring(
        scale=options.get("scaling") or q.shape[-1] ** -0.5,
        window=options.get("sliding_window"),
        softcap=options.get("softcap"),
        dropout=options.get("dropout", 0.0) if module.training else 0.0,
    )
    attended_THE: Tensor = options["attend"](q, k, v, options["documents"], scoring)
    return attended_THE.unsqueeze(0).contiguous(), None  # some models flatten the heads with view()
