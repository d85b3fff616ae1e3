"""Answers from a model: token ids in, token ids out, the same answer every time unless a temperature is set."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from llamahome.model.limits import limits_from
from llamahome.model.packing import packing_of


@contextmanager
def _ready_to_generate(model: PreTrainedModel) -> Iterator[None]:
    """Torch's own attention (not where scores are capped) without the settings that the base brings, and back to what was before."""
    training, before, brought = model.training, model.config._attn_implementation, model.generation_config
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    packing = packing_of(model)
    model.eval()
    packing.begin(None)
    if packing.why_alone is None or capped:
        model.set_attn_implementation("eager" if capped else "sdpa")
    model.generation_config = GenerationConfig()  # transformers would fill in penalties and limits from it
    try:
        yield
    finally:
        model.generation_config = brought
        model.set_attn_implementation(before)
        model.train(training)


class _Relay(BaseStreamer):  # type: ignore[misc]
    """Passes new token ids on as they come; the first call carries the prompt."""

    def __init__(self, tell: Callable[[list[int]], None]) -> None:
        self._tell, self._prompt_seen = tell, False

    def put(self, value: Tensor) -> None:
        if self._prompt_seen:
            self._tell(value.flatten().tolist())
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is held back."""


def positions_of(model: PreTrainedModel) -> int | None:
    """Tokens that a model with a table of positions can take; None where it has none."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return limits_from(model.config.get_text_config().to_dict(), shapes).positions


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    end_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    tell: Callable[[list[int]], None] | None = None,
) -> list[list[int]]:
    """Continue each prompt until one of `end_ids` or `max_new_tokens`; the end token is not part of the answer.

    It ends where a model with a table of positions has no more of them. Prompts are padded on the left to one batch, where the rows of
    one leave each other alone. Greedy at temperature 0. `tell` gets new ids as they appear (one prompt only).
    """
    if len(prompts) > 1 and not packing_of(model).shares_beginnings:  # padding would change what a row comes to
        choices: dict[str, Any] = {"end_ids": end_ids, "max_new_tokens": max_new_tokens, "temperature": temperature}
        return [generate(model, [prompt], **choices)[0] for prompt in prompts]
    width = max(len(prompt) for prompt in prompts)
    positions = positions_of(model)
    if positions is not None and width + max_new_tokens > positions:
        max_new_tokens = positions - width
        if max_new_tokens < 1:
            return [[] for _ in prompts]
    filler = end_ids[0] if end_ids else 0
    tokens = torch.tensor([[filler] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    choice: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=list(end_ids) or None, pad_token_id=filler, use_cache=True, **choice
    )
    with _ready_to_generate(model):
        output: Any = model.generate(
            input_ids=tokens, attention_mask=mask, generation_config=settings, streamer=_Relay(tell) if tell else None
        )
    answers = []
    for row in output[:, width:].tolist():
        stop = next((i for i, token in enumerate(row) if token in end_ids), len(row))
        answers.append(row[:stop])
    return answers
