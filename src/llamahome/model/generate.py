"""Generate answers: token ids in, token ids out, deterministic unless a temperature is set.

A PromptCache keeps the keys and values of a prompt and its answer, so that the next turn of a chat computes only what is new. Answers are
those of a computation from the beginning up to rounding: in float32 the tests find the same tokens, in bfloat16 a near tie may fall
differently.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from llamahome.model.limits import ModelLimits, limits_from
from llamahome.model.packing import packing_of
from llamahome.model.sampling import GREEDY, Sampling, choose_token, generator_for
from llamahome.model.shard_load import generating


@contextmanager
def as_transformers_runs_it(model: PreTrainedModel) -> Iterator[None]:
    """Switch `model` to evaluation, torch's attention and an empty generation config; restore all three at the end.

    Models that cap attention scores use the eager attention, because torch's has no cap.
    """
    training, attention, generation_config = model.training, model.config._attn_implementation, model.generation_config
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    packing = packing_of(model)
    model.eval()
    packing.begin(None)
    if packing.why_alone is None or capped:
        model.set_attn_implementation("eager" if capped else "sdpa")
    model.generation_config = GenerationConfig()  # transformers would add penalties and limits of the base's config
    try:
        yield
    finally:
        model.generation_config = generation_config
        model.set_attn_implementation(attention)
        model.train(training)


class _Draw(LogitsProcessor):  # type: ignore[misc]
    """Chooses the next token of each row itself, and leaves only this token to transformers, whose own draw uses a global generator."""

    def __init__(self, sampling: Sampling, lengths: Sequence[int], width: int) -> None:
        seed = sampling.seeded().seed
        assert seed is not None
        numbers = sampling.numbers or range(len(lengths))
        self._sampling, self._sources = sampling, [generator_for(seed, number) for number in numbers]
        self._starts = [width - length for length in lengths]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = zip(input_ids, scores, self._sources, self._starts, strict=True)
        chosen = [choose_token(logits_V, ids[start:], self._sampling, source) for ids, logits_V, source, start in rows]
        only = torch.full_like(scores, -torch.inf)
        return only.scatter(1, torch.tensor(chosen, device=scores.device)[:, None], 0.0)


class _Listener(StoppingCriteria):  # type: ignore[misc]
    """Passes on each new token of a single prompt, then asks whether to stop; says nothing after the end of the answer.

    A streamer of transformers is no alternative: it gets a token only after the criteria were asked.
    """

    def __init__(self, tell: Callable[[list[int]], None] | None, stop: Callable[[], bool] | None, *, end_ids: Sequence[int]) -> None:
        self._tell, self._stop, self._end_ids, self._over = tell, stop, end_ids, False

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        if self._tell is not None and not self._over:
            new = input_ids[:, -1].tolist()
            self._tell(new)
            self._over = new[0] in self._end_ids
        self._over = self._over or (self._stop is not None and self._stop())
        return torch.full((input_ids.shape[0],), self._over, device=input_ids.device)


class PromptCache:
    """The keys and values of the last prompt and its answer, for the next prompt that begins in the same way.

    Models that keep a state instead of keys and values, and models whose rotary tables depend on the length, always compute all tokens.
    """

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._values: Cache | None = None
        self.reused = 0
        """Tokens of the last prompt that were not computed again."""

    def take(self, prompt: Sequence[int]) -> Cache | None:
        """The values of the longest beginning of `prompt` that is known, at most all but its last token; None if there is none."""
        values, ids = self._values, self._ids
        self.forget()
        if values is None:
            return None
        most = min(len(ids), len(prompt) - 1)
        shared = next((number for number in range(most) if ids[number] != prompt[number]), most)
        surplus = len(ids) - shared
        if shared == 0 or (surplus and any(layer.is_sliding and layer.get_seq_length() >= layer.sliding_window for layer in values.layers)):
            return None  # a full sliding window has forgotten what would have to come back
        if surplus:
            values.crop(-surplus)
        self.reused = shared
        return values

    def forget(self) -> None:
        """Keep nothing."""
        self._values, self._ids, self.reused = None, [], 0

    def keep(self, ids: Sequence[int], values: Cache | None, model: PreTrainedModel) -> None:
        """Remember the values of `ids`, all but the last of which were computed, if this model can go on from them."""
        layers = getattr(values, "layers", None)
        plain = layers and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
        if values is not None and plain and not packing_of(model).rotaries and values.get_seq_length() == len(ids) - 1:
            self._values, self._ids = values, list(ids[:-1])


def limits_of_loaded(model: PreTrainedModel) -> ModelLimits:
    """The limits of a loaded model: positions, trained length."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return limits_from(model.config.get_text_config().to_dict(), shapes)


def cached_bytes(model: PreTrainedModel) -> int:
    """Bytes of the keys and values of one token."""
    text = model.config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    itemsize: int = model.get_input_embeddings().weight.dtype.itemsize
    return int(2 * text.num_hidden_layers * heads * size * itemsize)


def positions_of(model: PreTrainedModel) -> int | None:
    """The number of positions of a model with a position table, or None."""
    return limits_of_loaded(model).positions


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    end_ids: Sequence[int],
    max_new_tokens: int | None = None,
    sampling: Sampling = GREEDY,
    tell: Callable[[list[int]], None] | None = None,
    stop: Callable[[], bool] | None = None,
    cache: PromptCache | None = None,
) -> list[list[int]]:
    """Continue each prompt until one of `end_ids` or `max_new_tokens`; the end token is not part of the answer.

    Generation also stops at the last position of a model with a position table. The prompts are padded on the left to one batch, unless
    padding would change the results of this model. `max_new_tokens` replaces that of `sampling`. With one prompt, `tell` receives new ids
    as they appear, and `cache` keeps what the next prompt may share. `stop` is asked after each token and ends all answers.
    """
    if max_new_tokens is not None:
        sampling = replace(sampling, max_new_tokens=max_new_tokens)
    parts: dict[str, Any] = {}
    if tell is not None or stop is not None:
        parts["stopping_criteria"] = StoppingCriteriaList([_Listener(tell, stop, end_ids=_known(end_ids, model))])
    rows = _continue(model, prompts, end_ids=end_ids, sampling=sampling, cache=cache, parts=parts)
    return [row[:-1] if ended else row for row, ended in rows]


@torch.no_grad()
def draw_answers(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, end_ids: Sequence[int], sampling: Sampling
) -> list[tuple[list[int], bool]]:
    """An answer to each prompt with its end token, and whether it has one or was cut at the most tokens. `sampling` has a seed.

    The draws of a prompt depend on the seed and its number in `sampling.numbers`, not on the other prompts, on which its logits depend
    only by rounding.
    """
    return _continue(model, prompts, end_ids=end_ids, sampling=sampling, cache=None, parts={})


def _known(end_ids: Sequence[int], model: PreTrainedModel) -> list[int]:
    """Those of `end_ids` that the embedding has, because a tokenizer may have more tokens."""
    rows = model.get_input_embeddings().weight.shape[0]
    return [number for number in end_ids if number < rows]


def _continue(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    end_ids: Sequence[int],
    sampling: Sampling,
    cache: PromptCache | None,
    parts: dict[str, Any],
) -> list[tuple[list[int], bool]]:
    """The new tokens of each prompt with the end token, and whether there is one; `parts` are passed on to transformers."""
    if len(prompts) > 1 and not packing_of(model).shares_prefixes:  # padding would change the results
        sampling = sampling.seeded() if sampling.draws else sampling
        options: dict[str, Any] = {"end_ids": end_ids, "cache": None, "parts": parts}
        return [_continue(model, [prompt], sampling=sampling.for_prompt(n), **options)[0] for n, prompt in enumerate(prompts)]
    end_ids = _known(end_ids, model)
    width, most = max(len(prompt) for prompt in prompts), sampling.max_new_tokens
    positions = positions_of(model)
    if positions is not None and width + most > positions:
        most = positions - width
        if most < 1:
            return [([], False) for _ in prompts]
    padding = end_ids[0] if end_ids else 0
    tokens = torch.tensor([[padding] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    settings = GenerationConfig(
        max_new_tokens=most, do_sample=False, eos_token_id=list(end_ids) or None, pad_token_id=padding, use_cache=True
    )
    if sampling.draws or sampling.repetition_penalty != 1:
        draw = _Draw(sampling, [len(prompt) for prompt in prompts], width)
        parts = {**parts, "logits_processor": LogitsProcessorList([draw])}
    if cache is not None and sampling.draws and sampling.seed is not None:
        cache.forget()  # values computed in other passes are rounded otherwise, and the same seed would draw another answer
    elif cache is not None and (known := cache.take(prompts[0])) is not None:
        parts = {**parts, "past_key_values": known}
    with as_transformers_runs_it(model), generating(model):
        output: Any = model.generate(
            input_ids=tokens, attention_mask=mask, generation_config=settings, return_dict_in_generate=True, **parts
        )
    if cache is not None:
        cache.keep(output.sequences[0].tolist(), getattr(output, "past_key_values", None), model)
    answers = []
    for row in output.sequences[:, width:].tolist():
        length = next((i + 1 for i, token in enumerate(row) if token in end_ids), None)
        answers.append((row[:length], length is not None))
    return answers
