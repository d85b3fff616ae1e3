"""Find by trying how a loaded model computes documents: together, one at a time, or not at all, and why.

The judge is transformers' own forward of each document alone: its logits, and the gradients of its embeddings. A pass of three documents,
short, long, short, must give the same; the short one begins as the long one does, so a token that sees what follows it is found as well.
Cost: 15 tokens forward and backward with us and 12 with transformers, without gradients of weights. Long documents need no pass: whether
rotary tables depend on them is asked of the rotary modules alone (rotary.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llamahome.model.attention import ATTENTION_NAME
from llamahome.model.backends.documents import Documents
from llamahome.model.backends.loss import Head
from llamahome.model.backends.reference import reference_attention
from llamahome.model.decoder import decoder_of
from llamahome.model.packing import Packing, keep_packing, last_hidden
from llamahome.model.rotary import wrap_rotaries

_TOO_FAR_APART = {torch.float32: 1e-3, torch.bfloat16: 0.3}
"""Relative distance that rounding does not explain: bfloat16 differs by up to a few percent after 30 layers."""
_SHORT, _LONG = 3, 9
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
_FAILURES = (TypeError, KeyError, AttributeError, ValueError, RuntimeError, IndexError)
_LENGTHS = ("original_max_position_embeddings", "max_position_embeddings")


class Unfit(Exception):
    """A model that cannot be trained; the message says why."""


@dataclass(frozen=True)
class _Found:
    """Of one document: logits [T, V] and the gradient [T, D] of a weighted sum of them, float32."""

    logits: Tensor
    gradient: Tensor


def settle(model: PreTrainedModel, head: Head) -> Packing:
    """Set `model` up so that its documents come out right, keep that on it, and return it. Raises Unfit."""
    config = model.config.get_text_config()
    short, long = _tokens(model)
    try:
        wanted = {tokens: _alone(model, tokens) for tokens in (short, long)}
    except _FAILURES as error:
        raise Unfit(f"{type(model).__name__} does not run on a row of text alone: {_first_line(error)}") from error
    for tokens, found in wanted.items():
        if not (found.logits.isfinite().all() and found.gradient.isfinite().all()):
            raise Unfit(f"{type(model).__name__} gives numbers that are not finite for {len(tokens)} tokens")
    if _apart(wanted[long].logits[:_SHORT], wanted[short].logits) > _TOO_FAR_APART[model.dtype]:
        raise Unfit(f"in {type(model).__name__} a token sees what follows it, so there is no next token to learn")
    rotaries = wrap_rotaries(decoder_of(model), _named_lengths(config))
    own = model.config._attn_implementation
    why = never_packed(type(model), config)
    if why is None:
        model.set_attn_implementation(ATTENTION_NAME)
        why = _differs(model, Packing(None, rotaries), head, wanted)
    packing = Packing(why, rotaries)
    if why is not None:
        model.set_attn_implementation(own)
        if (still := _differs(model, packing, head, wanted)) is not None:
            raise Unfit(still)
    keep_packing(model, packing)
    return packing


def never_packed(family: type[PreTrainedModel], config: Any) -> str | None:
    """Why documents of such a model run one at a time, as far as its class and its config tell; None where only a try can tell."""
    strange = sorted(set(getattr(config.get_text_config(), "layer_types", None) or ()) - _KNOWN_LAYERS)
    if not family._supports_attention_backend:
        return f"{family.__name__} has code of its own that cannot keep them apart"
    return f"its layers are not all plain or sliding attention ({', '.join(strange)})" if strange else None


def _differs(model: PreTrainedModel, packing: Packing, head: Head, wanted: dict[tuple[int, ...], _Found]) -> str | None:
    """What of short, long, short in one pass differs from transformers' forward of each alone; None when nothing does."""
    keep_packing(model, packing)
    short, long = wanted
    documents = (short, long, short)
    try:
        found = _together(model, documents, head)
    except _FAILURES as error:
        deaf = isinstance(error, KeyError) and error.args in (("attend",), ("documents",))
        why = "it does not tell its attention where they begin" if deaf else _first_line(error)
        return f"{type(model).__name__} cannot keep them apart: {why}"
    limit, name = _TOO_FAR_APART[model.dtype], type(model).__name__
    apart = [_apart(logits, wanted[tokens].logits) for tokens, (logits, _) in zip(documents, found, strict=True)]
    if not apart[0] <= limit:
        other = f"attention inside documents gives other values than {name}'s own"
        return other if packing.why_alone is None else f"the output head of {name} does more than a product with its matrix"
    if not max(apart) <= limit:
        return f"in {name} a document changes what follows it in the same pass"
    if not max(_apart(gradient, wanted[tokens].gradient) for tokens, (_, gradient) in zip(documents, found, strict=True)) <= 2 * limit:
        return f"in {name} a document changes the gradients of another in the same pass"
    return None


def _tokens(model: PreTrainedModel) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A short and a long document that begins with it; from the middle of the vocabulary, where no special tokens are."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    long = tuple((vocabulary // 2 + 7 * number) % vocabulary for number in range(_LONG))
    return long[:_SHORT], long


def _alone(model: PreTrainedModel, tokens: tuple[int, ...]) -> _Found:
    """transformers' own forward of one document; eager where scores are capped, which torch's own attention leaves out."""
    row = torch.tensor([tokens], device=model.device)
    own = model.config._attn_implementation
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")
    logits, gradient = _with_gradient(model, lambda: model(input_ids=row, use_cache=False).logits[0], [len(tokens)])
    model.set_attn_implementation(own)
    return _Found(logits, gradient)


def _together(model: PreTrainedModel, documents: tuple[tuple[int, ...], ...], head: Head) -> list[tuple[Tensor, Tensor]]:
    """Of each document of one pass, through the parts that training uses: logits and gradient."""
    lengths = tuple(len(each) for each in documents)
    tokens = torch.tensor([token for each in documents for token in each], device=model.device)
    positions = torch.cat([torch.arange(length, device=model.device) for length in lengths])

    def logits() -> Tensor:
        hidden = last_hidden(model, tokens, positions, Documents(lengths), attend=reference_attention)
        scores = torch.nn.functional.linear(hidden.to(head.weight_VD.dtype), head.weight_VD, head.bias_V).float() * head.scale
        return scores if head.softcap is None else torch.tanh(scores / head.softcap) * head.softcap

    found, gradient = _with_gradient(model, logits, list(lengths))
    return list(zip(torch.split(found, list(lengths)), torch.split(gradient, list(lengths)), strict=True))


def _with_gradient(model: PreTrainedModel, run: Callable[[], Tensor], lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Logits [T, V] of `run` and the gradient [T, D] of their sum, weighted by place in the document, for what was embedded."""
    embedded: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()  # some models change it in place

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logits = run().float()
            numbers = torch.Generator().manual_seed(0)
            weights = torch.randn(_LONG, logits.shape[1], generator=numbers).to(logits.device)  # the same for any length
            total = (logits * torch.cat([weights[:length] for length in lengths])).sum()
            gradients = torch.autograd.grad(total, embedded)
    finally:
        hook.remove()
    return logits.detach(), torch.cat([gradient.flatten(0, -2) for gradient in gradients]).float()


def _apart(found: Tensor, wanted: Tensor) -> float:
    """Relative distance."""
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-12))


def _named_lengths(config: Any) -> list[int]:
    """Lengths at which the config says that something may change."""
    ropes = getattr(config, "rope_parameters", None) or {}
    nested = [each for each in ropes.values() if isinstance(each, dict)] if isinstance(ropes, dict) else []
    places = [vars(config), *([ropes] if isinstance(ropes, dict) else []), *nested]
    return sorted({place[name] for place in places for name in _LENGTHS if isinstance(place.get(name), int)})


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
