"""Test how a loaded model can run documents: packed, one at a time, or not at all.

The reference is transformers' forward of each document alone: its logits and the gradients of its embeddings. A pass of three documents
(short, long, short) must give the same values. The short document is a prefix of the long one, which shows whether a token sees later ones.
Rounding makes this comparison coarse in bfloat16, so weak leaks are found in two other ways, which rounding does not reach: the gradient of
one document's logits is exactly zero at the others, and other neighbours leave the logits of the long document as they are, bit for bit.
A layer of experts computes other shapes for other neighbours, which rounds differently. There the neighbours change places instead, in
float32, whose rounding hides nothing: the first layers, at least two and one of each kind, each converted while it computes.
Cost: 30 tokens forward and 15 backward twice here and 12 in transformers, without gradients of weights. Long documents need no pass,
because only rotary tables depend on the length, and the rotary modules are tested alone (rotary.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llamahome.model.attention import ATTENTION_NAME, OtherAttention
from llamahome.model.backends.backend import Documents, Scoring
from llamahome.model.backends.loss import Head
from llamahome.model.backends.reference import reference_attention
from llamahome.model.few_layers import few_layers, in_float32
from llamahome.model.packing import Packing, decoder_of, last_hidden, store_packing
from llamahome.model.rotary import wrap_rotaries
from llamahome.model.targets import matrices
from llamahome.model.unsupported import first_line

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.1}
"""Largest relative distance by rounding; bfloat16 differs by up to a few percent after 30 layers."""
_ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Relative distance that rounding alone explains where a layer of experts computes other shapes; measured: 3e-7 and 8e-3."""
_LEAK = 1e-6
"""Largest gradient at other documents, relative to a document's own; measured: exactly 0 in all packed families, bfloat16 too."""
_SHORT, _LONG = 3, 9
"""Tokens of the documents."""
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
_FAILURES = (TypeError, KeyError, AttributeError, ValueError, RuntimeError, IndexError)
"""Errors that a model's forward may raise when it gets packed documents."""
_NOT_PASSED_ON = "it does not tell its attention where they begin"
_LENGTH_KEYS = ("original_max_position_embeddings", "max_position_embeddings")


class UnsupportedModel(Exception):
    """The model cannot be trained; the message says why."""


@dataclass(frozen=True)
class _Outputs:
    """Logits [T, V] of one document and the gradient [T, D] of a weighted sum of them, float32."""

    logits: Tensor
    gradient: Tensor
    at_others: Tensor
    """The gradient [T, D] of the logits of the documents beside it, at this document."""


def choose_packing(model: PreTrainedModel, head: Head) -> Packing:
    """Decide how `model` runs documents, store the result on the model and return it. Raises UnsupportedModel."""
    config = model.config.get_text_config()
    short, long = _tokens(model)
    try:
        expected = {tokens: _run_alone(model, tokens) for tokens in (short, long)}
    except _FAILURES as error:
        raise UnsupportedModel(f"{type(model).__name__} does not run on a row of text alone: {first_line(error)}") from error
    for tokens, outputs in expected.items():
        if not (outputs.logits.isfinite().all() and outputs.gradient.isfinite().all()):
            raise UnsupportedModel(f"{type(model).__name__} gives numbers that are not finite for {len(tokens)} tokens")
    if _distance(expected[long].logits[:_SHORT], expected[short].logits) > _TOLERANCE[model.dtype]:
        raise UnsupportedModel(f"in {type(model).__name__} a token sees what follows it, so there is no next token to learn")
    rotaries = wrap_rotaries(decoder_of(model), _named_lengths(config))
    attention = model.config._attn_implementation
    reason = no_packing_reason(type(model), config)
    if reason is None:
        model.set_attn_implementation(ATTENTION_NAME)
        reason = _difference(model, Packing(None, rotaries), head, expected)
    packing = Packing(reason, rotaries)
    if reason is not None:
        model.set_attn_implementation(attention)
        if (difference := _difference(model, packing, head, expected)) is not None:
            raise UnsupportedModel(difference)
    store_packing(model, packing)
    return packing


def no_packing_reason(family: type[PreTrainedModel], config: Any) -> str | None:
    """Why a model of this class and config cannot pack documents; None if only a test of the model can show it."""
    unknown = sorted(set(getattr(config.get_text_config(), "layer_types", None) or ()) - _KNOWN_LAYERS)
    if not family._supports_attention_backend:
        return f"{family.__name__} has code of its own that cannot keep them apart"
    return f"its layers are not all plain or sliding attention ({', '.join(unknown)})" if unknown else None


def try_packing_without_weights(model: PreTrainedModel) -> tuple[str | None, bool]:
    """Why a model on the meta device cannot pack documents, or None; and whether the test was conclusive.

    The test is conclusive if the forward reaches our attention or fails because of it. Only real weights show whether values agree.
    """
    calls: list[bool] = []

    def attend(q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, documents: Documents, scoring: Scoring) -> Tensor:
        calls.append(True)
        return q_THE.new_empty(*q_THE.shape[:-1], v_THE.shape[-1])

    lengths = (_SHORT, _LONG)
    device = model.get_input_embeddings().weight.device
    tokens, positions = (torch.zeros(sum(lengths), dtype=torch.int64, device=device) for _ in range(2))
    try:
        with torch.no_grad():
            last_hidden(model, tokens, positions, Documents(lengths), attend=attend)
    except _FAILURES as error:
        if _lacks_documents(error) or isinstance(error, OtherAttention):
            return _cannot_separate(model, error), True
    return None, bool(calls)


def _lacks_documents(error: Exception) -> bool:
    """Whether our attention failed because the model did not pass the documents on to it."""
    return isinstance(error, KeyError) and error.args in (("attend",), ("documents",))


def _cannot_separate(model: PreTrainedModel, error: Exception) -> str:
    return f"{type(model).__name__} cannot keep them apart: {_NOT_PASSED_ON if _lacks_documents(error) else first_line(error)}"


def _difference(model: PreTrainedModel, packing: Packing, head: Head, expected: dict[tuple[int, ...], _Outputs]) -> str | None:
    """How one pass of the documents short, long, short differs from transformers' forward of each alone; None if it does not."""
    store_packing(model, packing)
    short, long = expected
    documents = (short, long, short)
    try:
        outputs = _run_pass(model, documents, head)
    except _FAILURES as error:
        return _cannot_separate(model, error)
    tolerance, name = _TOLERANCE[model.dtype], type(model).__name__
    pairs = [(each, expected[tokens]) for tokens, each in zip(documents, outputs, strict=True)]
    distances = [_distance(ours.logits, theirs.logits) for ours, theirs in pairs]
    if not distances[0] <= tolerance:  # also true for NaN
        other_attention = f"attention inside documents gives other values than {name}'s own"
        return other_attention if packing.why_alone is None else f"the output head of {name} does more than a product with its matrix"
    if not max(distances) <= tolerance:
        return f"in {name} a document changes what follows it in the same pass"
    if not max(_distance(ours.gradient, theirs.gradient) for ours, theirs in pairs) <= 2 * tolerance:
        return f"in {name} a document changes the gradients of another in the same pass"
    if packing.why_alone is None and _leaks(model, head, outputs, expected[long].logits):
        return f"in {name} a document changes another in the same pass a little"
    return None


def _leaks(model: PreTrainedModel, head: Head, outputs: list[_Outputs], alone_TV: Tensor) -> bool:
    """Whether documents change each other by less than rounding does; `alone_TV` are transformers' logits of the long document."""
    if not all(each.at_others.norm() <= _LEAK * each.gradient.norm() for each in outputs):
        return True
    short, long = _tokens(model)
    later, other = long[_SHORT : 2 * _SHORT], long[-_SHORT:]

    def middle(first: tuple[int, ...], last: tuple[int, ...]) -> Tensor:
        return _pass_logits(model, (first, long, last), head)[_SHORT : _SHORT + _LONG]

    with torch.no_grad():
        replaced = middle(later, other)
        if torch.equal(replaced, outputs[1].logits):
            return False
        distance, noise = _distance(replaced, middle(short, short)), _distance(replaced, middle(later, other))
        if any(each.form in ("router", "stacked") for each in matrices(model)):
            if model.dtype != torch.float32 and (in_few_layers := _distance_in_float32(model)) is not None:
                return not in_few_layers <= 2 * _ROUNDING[torch.float32]
            distance = _distance(replaced, middle(other, later))
            noise = max(noise, _distance(_pass_logits(model, (long,), head), alone_TV), _ROUNDING[model.dtype])
    return not distance <= 2 * noise


def _distance_in_float32(model: PreTrainedModel) -> float | None:
    """How far the neighbours of the long document change it in the first layers, if they change places; None if float32 fails."""
    long = _tokens(model)[1]
    later, other = long[_SHORT : 2 * _SHORT], long[-_SHORT:]
    try:
        with few_layers(model, always=True), in_float32(model):
            first, second = (_pass_hidden(model, (left, long, right)) for left, right in ((later, other), (other, later)))
    except _FAILURES:
        return None
    return _distance(*(hidden[_SHORT : _SHORT + _LONG].float() for hidden in (first, second)))


def _tokens(model: PreTrainedModel) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The short and the long document, with tokens from the middle of the vocabulary, where there are no special tokens.

    The padding token is left out, because its embedding may be zero, where a norm has no gradient.
    """
    embedding: Any = model.get_input_embeddings()
    vocabulary, padding = embedding.weight.shape[0], getattr(embedding, "padding_idx", None)
    wanted = ((vocabulary // 2 + 7 * number) % vocabulary for number in range(_LONG))
    long = tuple((token + 1) % vocabulary if token == padding else token for token in wanted)
    return long[:_SHORT], long


def _run_alone(model: PreTrainedModel, tokens: tuple[int, ...]) -> _Outputs:
    """transformers' forward of one document; with eager attention if scores are capped, because torch's attention has no cap."""
    row = torch.tensor([tokens], device=model.device)
    attention = model.config._attn_implementation
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")
    outputs = _with_gradient(model, lambda: model(input_ids=row, use_cache=False).logits[0], [len(tokens)])
    model.set_attn_implementation(attention)
    return outputs


def _run_pass(model: PreTrainedModel, documents: tuple[tuple[int, ...], ...], head: Head) -> list[_Outputs]:
    """The outputs of each document in one pass through the functions that training uses."""
    lengths = [len(each) for each in documents]
    outputs = _with_gradient(model, lambda: _pass_logits(model, documents, head), lengths)
    whole = (outputs.logits, outputs.gradient, outputs.at_others)
    return [_Outputs(*parts) for parts in zip(*(torch.split(each, lengths) for each in whole), strict=True)]


def _pass_hidden(model: PreTrainedModel, documents: tuple[tuple[int, ...], ...]) -> Tensor:
    """The last hidden states [T, D] of one pass of the documents."""
    lengths = tuple(len(each) for each in documents)
    tokens = torch.tensor([token for each in documents for token in each], device=model.device)
    positions = torch.cat([torch.arange(length, device=model.device) for length in lengths])
    return last_hidden(model, tokens, positions, Documents(lengths), attend=reference_attention)


def _pass_logits(model: PreTrainedModel, documents: tuple[tuple[int, ...], ...], head: Head) -> Tensor:
    """The logits [T, V] of one pass of the documents, float32."""
    hidden = _pass_hidden(model, documents)
    scores = torch.nn.functional.linear(hidden.to(head.weight_VD.dtype), head.weight_VD, head.bias_V).float() * head.scale
    return scores if head.softcap is None else torch.tanh(scores / head.softcap) * head.softcap


def _with_gradient(model: PreTrainedModel, run: Callable[[], Tensor], lengths: list[int]) -> _Outputs:
    """The logits that `run` returns and the gradient of their sum, weighted by position, with respect to the embedded tokens.

    The gradients of every second document and of those between are computed apart, so that each is known at the documents of the other.
    """
    embedded: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()  # because some models change the embeddings in place

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logits = run().float()
            generator = torch.Generator().manual_seed(0)
            weights = torch.randn(_LONG, logits.shape[1], generator=generator).to(logits.device)
            weighted = logits * torch.cat([weights[:length] for length in lengths])
            second_T1 = torch.cat([torch.full((length, 1), number % 2 == 1) for number, length in enumerate(lengths)]).to(logits.device)
            if len(lengths) == 1:
                gradient = _gradient(weighted.sum(), embedded)
                return _Outputs(logits.detach(), gradient, torch.zeros_like(gradient))
            even, odd = (_gradient(torch.where(second_T1 == half, weighted, 0).sum(), embedded) for half in (False, True))
    finally:
        hook.remove()
    return _Outputs(logits.detach(), even + odd, torch.where(second_T1, even, odd))


def _gradient(total: Tensor, embedded: list[Tensor]) -> Tensor:
    """The gradient [T, D] of `total` with respect to the embedded tokens; the graph is kept."""
    gradients = torch.autograd.grad(total, embedded, retain_graph=True)
    return torch.cat([gradient.flatten(0, -2) for gradient in gradients]).float()


def _distance(actual: Tensor, expected: Tensor) -> float:
    """The norm of the difference, relative to the norm of `expected`."""
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-12))


def _named_lengths(config: Any) -> list[int]:
    """Lengths in the config at which rotary tables may change."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [each for each in rope.values() if isinstance(each, dict)] if isinstance(rope, dict) else []
    sections = [vars(config), *([rope] if isinstance(rope, dict) else []), *nested]
    return sorted({section[key] for section in sections for key in _LENGTH_KEYS if isinstance(section.get(key), int)})
