"""How transformers calls a back end's attention: the boundaries of documents travel beside the tokens, and no mask is built."""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from llamahome.model.backends.backend import Scoring

ATTENTION_NAME = "llamahome_documents"
"""What a model's config names while it trains; generation uses torch's own."""


def register_attention(*, outside_graphs: bool = False) -> None:
    """Make `ATTENTION_NAME` known to transformers; may be called again. With `outside_graphs` torch.compile does not look into it.

    It has no entry among the mask functions, so transformers builds no mask: the boundaries travel as numbers.
    """
    disable: Any = torch.compiler.disable
    if outside_graphs:
        AttentionInterface.register(ATTENTION_NAME, disable(_documents_forward))
    elif ATTENTION_NAME not in AttentionInterface().valid_keys():
        AttentionInterface.register(ATTENTION_NAME, _documents_forward)


def _documents_forward(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """The form transformers calls: query [1, H, T, E] -> [1, T, H, E]; `options` are its own and our `documents` and `attend`."""
    if attention_mask is not None or options.get("s_aux") is not None:
        raise ValueError("its attention has a mask or sinks of its own")
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    scoring = Scoring(
        scale=options.get("scaling") or q.shape[-1] ** -0.5,
        window=options.get("sliding_window"),
        softcap=options.get("softcap"),
        dropout=options.get("dropout", 0.0) if module.training else 0.0,
    )
    attended_THE: Tensor = options["attend"](q, k, v, options["documents"], scoring)
    return attended_THE.unsqueeze(0).contiguous(), None  # some models flatten heads by a view
