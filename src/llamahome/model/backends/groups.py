"""Groups of documents that begin with the same tokens, such as two answers to one prompt: these tokens are computed once.

In a causal decoder the state of a token depends only on the tokens up to it, so equal prefixes have equal states, and their gradient is
the sum over the documents. The loss and its gradients stay the same but for rounding. Not used with dropout, where the copies of a token
differ. In a pass, a group is its shared tokens and then the own tokens of each document, whose positions go on after the shared ones.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llamahome.model.backends.backend import Batch, Documents, Group, Pass, Scoring

Attention = Callable[[Tensor, Tensor, Tensor, Documents, Scoring], Tensor]


def share_groups(batch: Batch) -> Pass:
    """The pass of a batch whose documents are in groups, on the processor."""
    keep, source = torch.ones(len(batch.tokens_T), dtype=torch.bool), torch.arange(len(batch.tokens_T))
    groups, start, lengths = [], 0, batch.lengths
    for together in batch.groups:
        members, lengths, shared = lengths[: together.documents], lengths[together.documents :], together.shared
        groups.append(Group(members, shared))
        first, start = start, start + members[0]
        for length in members[1:]:
            keep[start : start + shared] = False
            source[start : start + shared] = source[first : first + shared]
            start += length
    kept, new_index_T = keep.nonzero().squeeze(1), (keep.cumsum(0) - 1)[source]
    documents = Documents(batch.lengths, groups=tuple(groups))
    return Pass(batch.tokens_T[kept], batch.positions_T[kept], new_index_T[batch.rows_N], documents)


def attend_groups(attend: Attention, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, groups: Sequence[Group], scoring: Scoring) -> Tensor:
    """Attention group by group, [T, H, E of v], by an attention that knows documents with shared first tokens."""
    sizes = [group.tokens for group in groups]
    parts = zip(groups, *(torch.split(each, sizes) for each in (q_THE, k_TKE, v_TKE)), strict=True)
    return torch.cat([attend(q, k, v, Documents(group.lengths, group.shared), scoring) for group, q, k, v in parts])


def visible_in_groups(groups: Sequence[Group], window: int | None, device: torch.device) -> Tensor:
    """bool [T, T], True for keys that a query may see: those before it in its own document."""
    number, member, position = [], [], []
    for at, group in enumerate(groups):
        number += [at] * group.tokens
        member += [-1] * group.shared
        position += list(range(group.shared))
        for document, length in enumerate(group.lengths):
            member += [document] * (length - group.shared)
            position += list(range(group.shared, length))
    numbers, members, positions = (torch.tensor(values, device=device) for values in (number, member, position))
    own = (members[None, :] == members[:, None]) | (members[None, :] == -1)
    visible = (numbers[None, :] == numbers[:, None]) & own & (positions[None, :] <= positions[:, None])
    return visible if window is None else visible & (positions[None, :] > positions[:, None] - window)


def uses_dropout(model: PreTrainedModel) -> bool:
    """Whether the model is in training mode and a layer or its config has a dropout probability above 0."""
    if not model.training:
        return False
    in_config = (value for name, value in vars(model.config).items() if "drop" in name and isinstance(value, float))
    in_layers = (module.p for module in model.modules() if isinstance(module, nn.Dropout))
    return any(probability > 0 for probability in (*in_config, *in_layers))
