"""Whether the rounding of its numbers alone takes an export further from the trained model than usual: then nothing is wrong with it.

No bound on the logits follows from rounding: where a router chooses experts, the smallest change may choose another one. So two things are
proved instead: each number of the export is the trained one, rounded to its type, and the numbers before rounding give the trained logits.
Cost: one more pass, layer by layer, and one reading of the weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from llamahome.model.adapter import wrap_plain
from llamahome.model.export.gguffile import GgufWeights, gguf_config
from llamahome.model.export.merge import TrainedWeights
from llamahome.model.export.merged import DTYPES
from llamahome.model.export.streaming import stream
from llamahome.model.export.verify import Difference, compare, load_plain, logits_of
from llamahome.model.export.weightstore import WeightStore


@dataclass(frozen=True)
class Written:
    """An export that was written, and the trained model that it was made of."""

    folder: Path
    to: str
    base: Path
    trained: Path
    weights: TrainedWeights | None
    """None if the adapter was merged in memory."""


def accept_rounding(
    difference: Difference, written: Written, logits: Sequence[Tensor], prompts: Sequence[Sequence[int]], *, say: Callable[[str], None]
) -> Difference:
    """The difference of an export to the trained `logits`, with a tolerance of its own size if rounding alone makes it.

    `say` gets a line about it then.
    """
    kind = DTYPES.get(difference.quant)
    if difference.holds or kind is None or kind == torch.float32 or not difference.greatest < float("inf"):
        return difference
    exact = _merged_in_memory(written, kind) if written.weights is None else _streamed(written, written.weights, kind, difference.quant)
    if exact is None or not compare(logits, logits_of(exact, prompts), quant="f32", least=difference.least).holds:
        return difference
    how = f"each number is the trained one rounded to {difference.quant}, and the numbers before rounding give the trained logits"
    say(f"its logits differ by up to {difference.greatest:.3g}, because of rounding alone: {how}; --quant f32 does not round")
    return replace(difference, tolerance=difference.greatest)


def _streamed(written: Written, weights: TrainedWeights, kind: torch.dtype, quant: str) -> nn.Module | None:
    """The model before rounding, layer by layer; None if a number of the export is not the rounded one."""
    folder, names = written.folder, weights.shapes
    read: Callable[[str], Tensor]
    if written.to == "merged":
        read = WeightStore(folder).read
    else:
        file = GgufWeights(next(folder.glob(f"*-{quant}.gguf")), gguf_config(written.base), names)
        read = file.read
        if not all(name in file for name in names):
            return None
    if not all(is_rounded(read(name), weights.read(name), kind) for name in names):
        return None
    return stream(folder if written.to == "merged" else written.base, weights.read, weights.shapes)


def _merged_in_memory(written: Written, kind: torch.dtype) -> nn.Module | None:
    """The model before rounding, in memory, as the one that was written is read; None if a number of it is not the rounded one."""
    exact = wrap_plain(load_plain(written.base), written.trained, merge=True)
    found = load_plain(written.folder).state_dict()
    values: dict[str, Tensor] = exact.state_dict()
    return exact if found.keys() == values.keys() and all(is_rounded(found[name], values[name], kind) for name in values) else None


def is_rounded(written: Tensor, exact: Tensor, kind: torch.dtype) -> bool:
    """Whether each number is within half a unit in the last place of `kind` of the exact one."""
    if written.shape != exact.shape:
        return False
    if not exact.is_floating_point():
        return bool((written == exact).all())
    facts, written, exact = torch.finfo(kind), written.double(), exact.double()
    half = exact.abs().clamp(min=facts.smallest_normal) * (facts.eps / 2)
    return bool(((written - exact).abs() <= half).all())
