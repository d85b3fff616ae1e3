"""Make rotary tables for each document of a pass alone, for models whose tables depend on the length (longrope, dynamic NTK).

transformers makes such tables from the largest position of a whole pass and keeps state for the next pass, so documents would change each
other. Here a copy of the module as it was loaded makes the table of each document on the CPU, so nothing is read back from a device.
Cost: T cosines and sines of half a head on the CPU and one copy per pass, a few milliseconds for 16,384 tokens.
"""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Rope types of transformers whose table depends on the length."""
_FIRST = 3
"""Number of first positions whose angles are compared with and without a long position behind them."""
_POWERS = range(3, 25)
"""Exponents of the powers of two that are tested as lengths; no model is longer than 2^24 tokens."""


class DocumentRotary(nn.Module):
    """Replaces the rotary module `own`: makes one table per document if `lengths` fit the pass, else calls `own`."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own
        self._loaded = [copy.deepcopy(own).cpu()]  # in a list, so that torch does not register it as a submodule
        self.lengths: tuple[int, ...] | None = None
        """Tokens of each document of the pass; kept for layers that the backward pass recomputes."""

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **options: Any) -> Any:
        """The concatenated tables of all documents, in the form that `own` returns; only dtype and device of x matter."""
        if self.lengths is None or sum(self.lengths) != position_ids.shape[-1]:
            return self.own(x, position_ids, *args, **options)
        tables = [self._table(x, position_ids, length, args, options) for length in self.lengths]
        if isinstance(tables[0], Tensor):
            return torch.cat(tables, -2).to(x.device, non_blocking=True)
        return tuple(torch.cat(parts, -2).to(x.device, non_blocking=True) for parts in zip(*tables, strict=True))

    def _table(self, x: Tensor, position_ids: Tensor, length: int, args: Any, options: Any) -> Any:
        """The table of a document of `length` tokens, on the CPU."""
        positions = torch.arange(length).expand(*position_ids.shape[:-1], length)
        like = torch.empty((*x.shape[:-2], length, x.shape[-1]), dtype=x.dtype, device="cpu")
        return fresh_copy(self._loaded[0])(like, positions, *args, **options)

    def reset(self) -> None:
        """Restore the state after loading, for a forward of transformers (generation)."""
        device = next((buffer.device for buffer in self.own.buffers()), torch.device("cpu"))
        self.own, self.lengths = fresh_copy(self._loaded[0]).to(device), None

    def __getattr__(self, name: str) -> Any:
        """Other attributes come from `own`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("own"), name)


def fresh_copy(module: nn.Module) -> nn.Module:
    """A deep copy of `module` that shares only the config."""
    config = getattr(module, "config", None)
    duplicate: nn.Module = copy.deepcopy(module, {id(config): config})
    return duplicate


def wrap_rotaries(decoder: nn.Module, lengths: Sequence[int]) -> list[DocumentRotary]:
    """Replace each module whose tables depend on the pass by a DocumentRotary; tests `lengths` and powers of two."""
    wrapped = []
    for parent in list(decoder.modules()):
        for name, child in list(parent.named_children()):
            if _makes_tables(child) and depends_on_pass(child, lengths):
                wrapped.append(DocumentRotary(child))
                setattr(parent, name, wrapped[-1])
    return wrapped


def _makes_tables(module: nn.Module) -> bool:
    """Whether the module computes something from positions, without weights and children."""
    parameters = inspect.signature(type(module).forward).parameters
    return "position_ids" in parameters and next(module.parameters(), None) is None and not list(module.children())


def depends_on_pass(module: nn.Module, lengths: Sequence[int]) -> bool:
    """Whether the first angles change with a long position in the same call or in an earlier call: by the rope type, or by a test."""
    rope_type = getattr(module, "rope_type", None)
    types = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    if any(name in each for each in types if isinstance(each, str) for name in _LENGTH_DEPENDENT):
        return True
    limits = (getattr(module, name, None) for name in ("max_seq_len_cached", "original_max_seq_len"))
    tested = sorted({*lengths, *(limit for limit in limits if isinstance(limit, int)), *(1 << power for power in _POWERS)})
    return any(_changes(module, options, tested) for options in _call_options(module))


def _call_options(module: nn.Module) -> list[dict[str, Any]]:
    """The keyword arguments with which a model may call this module: one set per layer type if it has several."""
    if "layer_type" not in inspect.signature(type(module).forward).parameters:
        return [{}]
    layer_types = getattr(module, "layer_types", None) or getattr(getattr(module, "config", None), "layer_types", None) or ()
    return [{"layer_type": each} for each in sorted(set(layer_types))]


@torch.no_grad()
def _changes(module: nn.Module, options: dict[str, Any], lengths: Sequence[int]) -> bool:
    """Whether the angles of the first positions change because of a position near one of `lengths`."""

    def angles(rotary: nn.Module, positions_T: Tensor) -> Tensor:
        return _angles(rotary(torch.empty(1, len(positions_T), 8, dtype=torch.float32), positions_T[None], **options))

    loaded = fresh_copy(module).cpu()
    first = torch.arange(_FIRST)
    try:
        expected = angles(fresh_copy(loaded), first)
        for length in lengths:
            rotary = fresh_copy(loaded)
            longer = torch.cat([first, torch.tensor([max(_FIRST, length - 1), max(_FIRST, length)])])
            together, afterwards = angles(rotary, longer), angles(rotary, first)
            if not (torch.equal(together[..., :_FIRST, :], expected) and torch.equal(afterwards, expected)):
                return True
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError):
        return False  # it is called in another way; probe.py tests the whole model
    return False


def _angles(tables: Any) -> Tensor:
    """Tables as one real tensor: a tensor or a tuple of tensors, which may be complex."""
    parts = [tables] if isinstance(tables, Tensor) else list(tables)
    return torch.cat([torch.view_as_real(part).flatten(-2) if part.is_complex() else part for part in parts], -1)
