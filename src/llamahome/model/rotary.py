"""Rotary tables that depend on the length of what they are made for (longrope, dynamic NTK), made for each document of a pass alone.

transformers makes such tables from the largest position of a whole pass and keeps what it computed for the next one, so that rows change
each other. Here a module in the state it was loaded in makes the table of each document, on the processor: nothing is read back from a
device. Cost: T cosines and sines of half a head on the processor and one copy per pass, a few milliseconds for 16,384 tokens.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_GROWS = ("dynamic", "longrope")
"""Types of transformers whose table is made for a length."""
_FIRST = 3
"""Positions whose angles are compared with and without a long one behind them."""
_POWERS = range(3, 25)
"""Lengths of powers of two that are tried beside those that the config names; no model is longer than 2^24 tokens."""


class DocumentRotary(nn.Module):
    """Stands in the place of `own`, which makes the tables of one document at a time while `lengths` fit the pass."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own
        self._loaded = [copy.deepcopy(own).cpu()]  # in a list, so that it is no part of the model and never moves
        self.lengths: tuple[int, ...] | None = None
        """Tokens of each document of the pass; stays for layers that are computed again in the backward pass."""

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **options: Any) -> Any:
        """The tables of all documents end to end, as `own` gives them; x is read for its type and device alone."""
        if self.lengths is None or sum(self.lengths) != position_ids.shape[-1]:
            return self.own(x, position_ids, *args, **options)
        whole = [self._table(x, position_ids, length, args, options) for length in self.lengths]
        if isinstance(whole[0], Tensor):
            return torch.cat(whole, -2).to(x.device, non_blocking=True)
        return tuple(torch.cat(parts, -2).to(x.device, non_blocking=True) for parts in zip(*whole, strict=True))

    def _table(self, x: Tensor, position_ids: Tensor, length: int, args: Any, options: Any) -> Any:
        """Of a document of `length` tokens, on the processor."""
        positions = torch.arange(length).expand(*position_ids.shape[:-1], length)
        like = torch.empty((*x.shape[:-2], length, x.shape[-1]), dtype=x.dtype, device="cpu")
        return as_loaded(self._loaded[0])(like, positions, *args, **options)

    def reset(self) -> None:
        """Back to the state of loading, for a forward that is not ours (generation)."""
        device = next((buffer.device for buffer in self.own.buffers()), torch.device("cpu"))
        self.own, self.lengths = as_loaded(self._loaded[0]).to(device), None

    def __getattr__(self, name: str) -> Any:
        """What a model asks its rotary module for beside tables."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("own"), name)


def as_loaded(module: nn.Module) -> nn.Module:
    """A copy whose state nobody shares, but for the config."""
    config = getattr(module, "config", None)
    twin: nn.Module = copy.deepcopy(module, {id(config): config})
    return twin


def wrap_rotaries(decoder: nn.Module, lengths: Sequence[int]) -> list[DocumentRotary]:
    """Put a DocumentRotary in the place of each module whose tables depend on the pass; `lengths` are tried beside powers of two."""
    made = []
    for parent in list(decoder.modules()):
        for name, child in list(parent.named_children()):
            if _makes_tables(child) and depends_on_pass(child, lengths):
                made.append(DocumentRotary(child))
                setattr(parent, name, made[-1])
    return made


def _makes_tables(module: nn.Module) -> bool:
    """Whether it turns positions into something without weights."""
    takes = inspect.signature(type(module).forward).parameters
    return "position_ids" in takes and next(module.parameters(), None) is None and not list(module.children())


def depends_on_pass(module: nn.Module, lengths: Sequence[int]) -> bool:
    """Whether the first angles change with a long position behind them, or after one: by its type, and by trying."""
    kinds = getattr(module, "rope_type", None) or ()
    if any(grows in kind for kind in _texts(kinds) for grows in _GROWS):
        return True
    limits = (getattr(module, name, None) for name in ("max_seq_len_cached", "original_max_seq_len"))
    tried = sorted({*lengths, *(limit for limit in limits if isinstance(limit, int)), *(1 << power for power in _POWERS)})
    return any(_changes(module, call, tried) for call in _calls(module))


def _texts(kinds: Any) -> list[str]:
    values = kinds.values() if isinstance(kinds, dict) else [kinds]
    return [kind for kind in values if isinstance(kind, str)]


def _calls(module: Any) -> list[Callable[[nn.Module, Tensor], Any]]:
    """The ways in which a model may ask this module for tables: for each kind of layer, where it knows several."""
    dtype = torch.float32
    takes = inspect.signature(type(module).forward).parameters
    kinds: list[Any] = [None]
    if "layer_type" in takes:
        kinds = sorted(set(getattr(module, "layer_types", None) or getattr(getattr(module, "config", None), "layer_types", None) or ()))

    def call(kind: Any) -> Callable[[nn.Module, Tensor], Any]:
        options = {} if kind is None else {"layer_type": kind}

        def ask(asked: nn.Module, positions_T: Tensor) -> Any:
            return asked(torch.empty(1, len(positions_T), 8, dtype=dtype), positions_T[None], **options)

        return ask

    return [call(kind) for kind in kinds]


@torch.no_grad()
def _changes(module: nn.Module, call: Callable[[nn.Module, Tensor], Any], lengths: Sequence[int]) -> bool:
    own = as_loaded(module).cpu()
    first = torch.arange(_FIRST)
    try:
        wanted = _angles(call(as_loaded(own), first))
        for length in lengths:
            used = as_loaded(own)
            longer = torch.cat([first, torch.tensor([max(_FIRST, length - 1)]), torch.tensor([max(_FIRST, length)])])
            beside, after = _angles(call(used, longer)), _angles(call(used, first))
            if not (torch.equal(beside[..., :_FIRST, :], wanted) and torch.equal(after, wanted)):
                return True
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError):
        return False  # it is asked in another way; the probe of the whole model judges
    return False


def _angles(tables: Any) -> Tensor:
    parts = [tables] if isinstance(tables, Tensor) else list(tables)
    return torch.cat([torch.view_as_real(part).flatten(-2) if part.is_complex() else part for part in parts], -1)
