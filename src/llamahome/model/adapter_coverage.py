"""Describe the adapters of a model: which kinds of layers have one, their parameters, and the weights without an adapter.

The description is read from the model with its adapters, not from the settings. Nothing is computed.
"""

from collections import Counter
from collections.abc import Iterable

from transformers import PreTrainedModel

from llamahome.model.packing import decoder_of
from llamahome.model.targets import ALL, EXPERT_COUNT_KEYS, OTHER_MODALITIES, Matrix, kind, matrices

_NOTES = {"stacked": "fused experts", "router": "router", "head": "output head", "fixed": "PEFT has no adapter for its form"}
_SMALL_SHARE = 0.005
"""Kinds with a smaller share of the weights are only counted, except routers."""


def coverage_lines(model: PreTrainedModel) -> list[str]:
    """Lines that describe the adapters of `model`, which is the model inside PEFT's wrapper."""
    every = list(matrices(model))
    config_has_experts = any(getattr(model.config.get_text_config(), name, None) for name in EXPERT_COUNT_KEYS)
    # Stacked matrices need not be experts: RecurrentGemma stacks the matrices of its gates by head.
    has_experts = config_has_experts or any("expert" in each.path for each in every)
    adapted, others = [each for each in every if each.adapted], [each for each in every if not each.adapted]
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    kinds = Counter(kind(each) for each in adapted)
    counts = ", ".join(f"{name} {count}" for name, count in kinds.items())
    lines = [
        f"adapters on {len(adapted):,} layers of {len(kinds)} kind{'s' * (len(kinds) != 1)}: {counts}; "
        f"{trained:,} parameters, {trained / total:.2%} of the weights"
    ]
    active = sum(each.weights * each.share for each in every)
    if others:
        share = sum(each.weights * each.share for each in others) / active
        names = ", ".join(_without_adapters(others, active, has_experts))
        lines.append(f"without adapters: {names}; {share:.1%} of the weights that a token passes")
    lines += _other_modalities(model, total)
    stacked = sorted({kind(each) for each in others if each.form == "stacked"})
    if stacked and has_experts:
        setting = f"--set 'lora.target_modules=[{ALL}, {', '.join(stacked)}]'"
        lines.append(f"the fused experts learn too with {setting}; each pass then keeps a second copy of their weights")
    return lines


def _other_modalities(model: PreTrainedModel, total: int) -> list[str]:
    """A line about the modules for images or sound, if the model has any."""
    text = {id(weight) for module in (decoder_of(model), model.get_output_embeddings()) for weight in module.parameters()}
    outside = {name: each.numel() for name, each in model.named_parameters() if id(each) not in text and OTHER_MODALITIES.search(name)}
    if not outside:
        return []
    modules = sorted({next(part for part in name.split(".") if OTHER_MODALITIES.search(part)) for name in outside})
    return [f"{', '.join(modules)} reads no text and stays as it is: {sum(outside.values()) / total:.1%} of the weights"]


def _without_adapters(others: Iterable[Matrix], active: float, has_experts: bool) -> list[str]:
    """The kinds of the matrices without an adapter, grouped by note, largest first."""
    sizes: Counter[tuple[str, str]] = Counter()
    for each in others:
        sizes[_note(each, has_experts), kind(each)] += int(each.weights * each.share)
    groups: dict[str, list[str]] = {}
    for (note, name), size in sizes.most_common():
        if size >= _SMALL_SHARE * active or note == _NOTES["router"]:
            groups.setdefault(note, []).append(name)
    small = len(sizes) - sum(len(names) for names in groups.values())
    texts = [f"{' and '.join(names)} ({note})" if note else ", ".join(names) for note, names in groups.items()]
    return texts + ([f"{small} small kind{'s' * (small != 1)}"] if small else [])


def _note(matrix: Matrix, has_experts: bool) -> str:
    """What is special about a matrix; empty for a linear layer."""
    note = _NOTES.get(matrix.form, "") if has_experts or matrix.form != "stacked" else "matrices in one parameter"
    if matrix.form == "stacked" and matrix.share < 1:
        return f"{note}, a token passes {matrix.share:{'.0%' if matrix.share >= 0.01 else '.1%'}} of them"
    return note
