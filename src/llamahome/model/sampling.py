"""How the next token is chosen from the logits: greedy, or drawn by temperature, top-k, top-p and min-p with a random source of its own.

A draw uses a generator that is made from the seed and the number of the prompt. So it is repeatable, does not depend on the other prompts
of a batch, and neither reads nor changes torch's global generator. Filters come in the order of transformers: repetition penalty,
temperature, top-k, top-p, min-p. Draws are computed in float64 on the CPU, so that they do not depend on the device.

Legend: V vocabulary.
"""

import hashlib
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llamahome.errors import ConfigError, Problem

_RANGES: dict[str, tuple[float, float, str]] = {
    "temperature": (0.0, math.inf, "a number of at least 0"),
    "top_p": (0.0, 1.0, "a number from 0 to 1"),
    "min_p": (0.0, 1.0, "a number from 0 to 1"),
    "top_k": (0, 2**31, "a whole number of at least 0; 0 is all tokens"),
    "repetition_penalty": (1e-6, 1e6, "a number above 0; 1 is none"),
    "max_new_tokens": (1, 2**31, "a whole number of at least 1"),
    "seed": (-(2**63), 2**63 - 1, "a whole number of 64 bits"),
}
_WHOLE = ("top_k", "max_new_tokens", "seed")


def _fits(name: str, value: object) -> bool:
    low, high, _ = _RANGES[name]
    if isinstance(value, bool) or not isinstance(value, int if name in _WHOLE else int | float):
        return False
    return low <= value <= high and (isinstance(value, int) or math.isfinite(value))


def _refusal(name: str, value: object) -> Problem:
    shown = repr(value) if len(repr(value)) <= 40 else f"{repr(value)[:40]}..."
    return Problem(code="model.bad-sampling", message=f"{shown} is not {_RANGES[name][2]}", where=name)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an answer is generated. Raises ConfigError with every value that is out of range."""

    temperature: float = 0.0
    """Logits are divided by it; 0 always takes the likeliest token."""
    top_p: float = 1.0
    """Draw from the fewest tokens that have this probability together."""
    top_k: int = 0
    """Draw from this many of the likeliest tokens; 0 is all."""
    min_p: float = 0.0
    """Draw from tokens with at least this share of the probability of the likeliest."""
    repetition_penalty: float = 1.0
    """Positive logits of tokens that are in the prompt or the answer are divided by it, negative ones multiplied (arXiv 1909.05858)."""
    seed: int | None = None
    """The same seed gives the same answer; None draws a new one each time."""
    max_new_tokens: int = 512
    """Length of the longest answer."""
    numbers: tuple[int, ...] = ()
    """The number of each prompt, which with the seed decides its draws; 0, 1, 2 and so on if it is empty."""

    def __post_init__(self) -> None:
        values = {name: getattr(self, name) for name in _RANGES if getattr(self, name) is not None}
        if problems := [_refusal(name, value) for name, value in values.items() if not _fits(name, value)]:
            raise ConfigError(problems)

    @property
    def draws(self) -> bool:
        """Whether chance decides; otherwise the likeliest token is taken."""
        return self.temperature > 0 and self.top_k != 1

    def seeded(self) -> "Sampling":
        """The same with a seed: its own, or a new one."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(62))

    def for_prompt(self, place: int) -> "Sampling":
        """The same for the prompt at this place alone: its draws are those that it has among the others."""
        return replace(self, numbers=(self.numbers[place] if self.numbers else place,))

    def at_most(self, tokens: int) -> "Sampling":
        """The same for an answer of at most so many tokens."""
        return self if self.max_new_tokens <= tokens else replace(self, max_new_tokens=tokens)


GREEDY = Sampling()


def generator_for(seed: int, number: int) -> torch.Generator:
    """The random source for the prompt with this number."""
    digest = hashlib.sha256(f"sampling {seed} {number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def penalized(logits_V: Tensor, seen: Sequence[int] | Tensor, penalty: float) -> Tensor:
    """The logits with the repetition penalty on the token ids in `seen`."""
    if penalty == 1.0:
        return logits_V
    ids = torch.unique(torch.as_tensor(seen, device=logits_V.device, dtype=torch.long))
    chosen = logits_V[ids]
    return logits_V.index_put((ids,), torch.where(chosen < 0, chosen * penalty, chosen / penalty))


def probabilities(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """The probability of each token, float64 [V], from logits that are penalized already; temperature must be above 0."""
    logits = torch.nan_to_num(logits_V.detach().to("cpu", torch.float64), nan=-math.inf, neginf=-math.inf)
    scaled = (logits - logits.max()) / sampling.temperature
    if 0 < sampling.top_k < len(scaled):
        scaled = scaled.masked_fill(scaled < torch.topk(scaled, sampling.top_k).values[-1], -math.inf)
    shares = torch.softmax(scaled, dim=-1)
    if sampling.top_p < 1:
        ordered, order = torch.sort(shares, descending=True, stable=True)
        before = ordered.cumsum(0) - ordered
        surplus = before >= sampling.top_p
        surplus[0] = False
        shares = shares.index_fill(0, order[surplus], 0.0)
        shares = shares / shares.sum()
    if sampling.min_p > 0:
        shares = torch.where(shares >= sampling.min_p * shares.max(), shares, 0.0)
    return shares / shares.sum()


def choose_token(logits_V: Tensor, seen: Sequence[int] | Tensor, sampling: Sampling, source: torch.Generator) -> int:
    """The id of the next token after the ids in `seen`."""
    logits = penalized(logits_V, seen, sampling.repetition_penalty)
    if not sampling.draws or not bool(torch.isfinite(logits).any()):
        return int(torch.argmax(logits))
    kept = probabilities(logits, sampling)
    reached = kept.cumsum(0)
    drawn = torch.rand((), generator=source, dtype=torch.float64) * reached[-1]
    number = int(torch.searchsorted(reached, drawn, right=True))
    return min(number, int(torch.nonzero(kept)[-1]))
