"""Update rules in plain torch beside torch's fused AdamW: Adafactor, AdamW with 8-bit moments, and Muon.

A rule computes new values of a weight and its state; `RefusableOptimizer` writes them, unless the update is refused. That is decided on the
device, so nothing waits for it. Whole weights only: Adafactor and Muon look at all of a matrix, and a block of 8-bit moments must not be
cut. All ranks have the same gradients, so all compute the same values. Nothing here is random.
Sources: Adafactor, arXiv 1804.04235; 8-bit moments, arXiv 2110.02861; Muon, kellerjordan.github.io/posts/muon, its scale arXiv 2502.16982.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

Group = dict[str, Any]
State = dict[str, Tensor]

_BETAS, _EPS = (0.9, 0.999), 1e-8
BLOCK = 256
"""Values that share a scale."""
SMALLEST = 4096
"""Weights with fewer values keep moments in float32, as norms and biases do."""
_NEWTON = (3.4445, -4.7750, 2.0315)
"""Coefficients of Muon's iteration, which maps all singular values to about 1."""
_CHUNK = 1 << 22
"""Values that are quantised at a time, so that copies of a whole embedding are not made."""


class RefusableOptimizer(torch.optim.Optimizer, ABC):
    """An optimizer whose update changes neither weights nor state if `found_inf` is above 0."""

    found_inf: Tensor | None = None

    @abstractmethod
    def fresh(self, weight: Tensor, group: Group) -> State:
        """The state of a weight before its first update, with `step`, a float32 scalar."""

    @abstractmethod
    def updated(self, weight: Tensor, grad: Tensor, group: Group, state: State) -> tuple[Tensor, State]:
        """The weight and the state after an update; `state` has the new `step`. Neither `weight` nor `state` may change."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state.update(self.fresh(weight, group))
                step = state["step"] + 1
                new, values = self.updated(weight, weight.grad, group, {**state, "step": step})
                for name, value in {**values, "step": step}.items():
                    state[name].copy_(self._unless_refused(state[name], value))
                weight.copy_(self._unless_refused(weight, new))

    def _unless_refused(self, old: Tensor, new: Tensor) -> Tensor:
        return new if self.found_inf is None else torch.where(self.found_inf.to(old.device) > 0, old, new)


def count(weight: Tensor) -> Tensor:
    """The number of updates of a weight, before the first one."""
    return torch.zeros((), dtype=torch.float32, device=weight.device)


def _decayed(weight: Tensor, group: Group) -> Tensor:
    kept: float = 1 - group["lr"] * group["weight_decay"]
    return weight * kept


def _adam(weight: Tensor, group: Group, moments: tuple[Tensor, Tensor], step: Tensor) -> Tensor:
    """The weight after a step of AdamW with these new moments."""
    first, second = moments
    shares = [-torch.expm1(step * math.log(beta)) for beta in _BETAS]  # 1 - beta^step, of which float32 would lose digits
    mean, root = first / shares[0], (second / shares[1]).sqrt_().add_(_EPS)
    return _decayed(weight, group).addcdiv_(mean, root, value=-group["lr"])


class Adafactor(RefusableOptimizer):
    """Adafactor without momentum and without scaling by the weight, so that the learning rate means what it means for AdamW.

    The second moment of a matrix is a row and a column. The update has a root mean square of at most 1 before the learning rate.
    """

    def fresh(self, weight: Tensor, group: Group) -> State:
        """Means of squared gradients over the last two dimensions, or all of them for a vector."""
        if weight.ndim < 2:
            return {"step": count(weight), "variance": torch.zeros_like(weight)}
        rows, columns = weight.sum(-1, keepdim=True), weight.sum(-2, keepdim=True)
        return {"step": count(weight), "row": torch.zeros_like(rows), "column": torch.zeros_like(columns)}

    def updated(self, weight: Tensor, grad: Tensor, group: Group, state: State) -> tuple[Tensor, State]:
        """The decay of the means is 1 - step^-0.8."""
        share, least = state["step"] ** -0.8, torch.finfo(torch.float32).eps
        square = grad.square()
        if weight.ndim < 2:
            values = {"variance": state["variance"].lerp(square, share)}
            variance = values["variance"].clone()
        else:
            means = {"row": square.mean(-1, keepdim=True), "column": square.mean(-2, keepdim=True)}
            values = {name: state[name].lerp(mean, share) for name, mean in means.items()}
            variance = values["row"] @ values["column"] / values["row"].mean(-2, keepdim=True).clamp_(min=least)
        update = variance.clamp_(min=least * least).rsqrt_().mul_(grad)
        update /= update.square().mean().sqrt().clamp_(min=1.0)
        return _decayed(weight, group).sub_(update, alpha=group["lr"]), values


class AdamW8bit(RefusableOptimizer):
    """AdamW whose moments take a byte per value, in blocks of 256 with a scale of their own; large weights only."""

    def fresh(self, weight: Tensor, group: Group) -> State:
        """Bytes and scales of both moments."""
        if weight.numel() < SMALLEST:
            return {"step": count(weight), "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
        blocks = -(-weight.numel() // BLOCK)
        kinds = {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8}
        state = {name: torch.zeros(blocks, BLOCK, dtype=kind, device=weight.device) for name, kind in kinds.items()}
        scales = {f"{name}_scale": torch.zeros(blocks, 1, dtype=torch.float32, device=weight.device) for name in kinds}
        return {"step": count(weight), **state, **scales}

    def updated(self, weight: Tensor, grad: Tensor, group: Group, state: State) -> tuple[Tensor, State]:
        """The update itself uses the moments before they are rounded."""
        step = state["step"]
        if weight.numel() < SMALLEST:
            first, second = state["exp_avg"].lerp(grad, 1 - _BETAS[0]), state["exp_avg_sq"].lerp(grad.square(), 1 - _BETAS[1])
            return _adam(weight, group, (first, second), step), {"exp_avg": first, "exp_avg_sq": second}
        values = {name: torch.empty_like(state[name]) for name in state if name != "step"}
        new, old, flat = torch.empty_like(weight), weight.reshape(-1), grad.reshape(-1)
        for start in range(0, weight.numel(), _CHUNK):
            stop = min(start + _CHUNK, weight.numel())
            rows = slice(start // BLOCK, -(-stop // BLOCK))
            part = torch.nn.functional.pad(flat[start:stop], (0, -(stop - start) % BLOCK)).view(-1, BLOCK)
            first = read_signed(state["exp_avg"][rows], state["exp_avg_scale"][rows]).lerp_(part, 1 - _BETAS[0])
            second = read_positive(state["exp_avg_sq"][rows], state["exp_avg_sq_scale"][rows]).lerp_(part.square(), 1 - _BETAS[1])
            moments = first.view(-1)[: stop - start], second.view(-1)[: stop - start]
            new.view(-1)[start:stop] = _adam(old[start:stop], group, moments, step)
            chance = _chances(start, first, step)
            values["exp_avg"][rows], values["exp_avg_scale"][rows] = write_signed(first, chance)
            values["exp_avg_sq"][rows], values["exp_avg_sq_scale"][rows] = write_positive(second, chance)
        return new, values


def _chances(start: int, values: Tensor, step: Tensor) -> Tensor:
    """A number in [0, 1) for each value, spread evenly over values and, for each value, over steps.

    Rounding up with these chances keeps moments right on average; rounding to the nearest would never let a slow moment move.
    """
    place = torch.arange(start, start + values.numel(), dtype=torch.int64, device=values.device)
    mixed = (place * 2_654_435_769 + step.to(torch.int64) * 1_640_531_527) & 0xFFFF_FFFF  # multiples of 2^32 over the golden ratio
    return (mixed.to(torch.float32) / 2.0**32).view_as(values)


def write_signed(values: Tensor, chance: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks as int8 and their scales: a level is 127 times the square root of the share of the greatest value."""
    levels, scale = _levels(values.abs(), chance, power=2, top=127)
    return (levels * values.sign()).to(torch.int8), scale


def read_signed(levels: Tensor, scale: Tensor) -> Tensor:
    """What `write_signed` wrote."""
    shares = levels.float() / 127
    return shares * shares.abs() * scale


def write_positive(values: Tensor, chance: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks as uint8 and their scales, by the fourth root; a value above 0 stays above 0, because the update divides by its root."""
    levels, scale = _levels(values, chance, power=4, top=255)
    return torch.where(values > 0, levels.clamp_min(1), levels).to(torch.uint8), scale


def read_positive(levels: Tensor, scale: Tensor) -> Tensor:
    """What `write_positive` wrote."""
    return (levels.float() / 255).pow_(4).mul_(scale)


def _levels(values: Tensor, chance: Tensor, *, power: int, top: int) -> tuple[Tensor, Tensor]:
    """The level below or above each value, taken so that the mean over all chances is the value."""
    scale = values.amax(1, keepdim=True)
    shares = values / scale.clamp_min(torch.finfo(torch.float32).tiny)
    below = shares.pow(1 / power).mul_(top).floor_().clamp_(max=top - 1)
    low, high = (below / top).pow_(power), ((below + 1) / top).pow_(power)
    return below + (chance < (shares - low) / (high - low)), scale


class Muon(RefusableOptimizer):
    """Muon for the groups with rule "muon", which hold matrices; AdamW for the others: embeddings, head, norms, biases.

    The update of a matrix has singular values of about 1 and the scale of AdamW's, so that one learning rate fits both.
    """

    def fresh(self, weight: Tensor, group: Group) -> State:
        """One momentum for a matrix, two moments for other weights."""
        names = ("momentum",) if group["rule"] == "muon" else ("exp_avg", "exp_avg_sq")
        return {"step": count(weight), **{name: torch.zeros_like(weight) for name in names}}

    def updated(self, weight: Tensor, grad: Tensor, group: Group, state: State) -> tuple[Tensor, State]:
        """With Nesterov's momentum of 0.95."""
        if group["rule"] != "muon":
            first, second = state["exp_avg"].lerp(grad, 1 - _BETAS[0]), state["exp_avg_sq"].lerp(grad.square(), 1 - _BETAS[1])
            return _adam(weight, group, (first, second), state["step"]), {"exp_avg": first, "exp_avg_sq": second}
        momentum = state["momentum"].lerp(grad, 0.05)
        update = orthogonal(grad.lerp(momentum, 0.95)).mul_(0.2 * max(weight.shape) ** 0.5)
        return _decayed(weight, group).sub_(update, alpha=group["lr"]), {"momentum": momentum}


def orthogonal(matrix: Tensor) -> Tensor:
    """A matrix with the singular vectors of `matrix` and singular values of about 1, by five Newton-Schulz steps in float32."""
    a, b, c = _NEWTON
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T.contiguous() if tall else x
