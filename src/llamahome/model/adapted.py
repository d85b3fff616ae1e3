"""What is adapted, told: kinds of layers with adapters, their parameters, and what a token passes that stays as it was.

Read off the model after its adapters have been made, so that it says what is, not what was asked for. Nothing is computed.
"""

from collections import Counter
from collections.abc import Iterable

from transformers import PreTrainedModel

from llamahome.model.decoder import decoder_of
from llamahome.model.targets import ALL, COUNTED, OTHER_SENSES, Matrix, kind, matrices

_FORMS = {"stacked": "fused experts", "router": "router", "head": "output head", "fixed": "PEFT has no adapter for its form"}
_FEW = 0.005
"""Kinds below this share are told together; the weights of a router are usually fewer, but it is always named."""


def account(model: PreTrainedModel) -> list[str]:
    """Lines on the adapters of `model`, the model inside PEFT's wrapper."""
    every = list(matrices(model))
    counted = any(getattr(model.config.get_text_config(), name, None) for name in COUNTED)
    experts = counted or any("expert" in each.path for each in every)  # RecurrentGemma stacks the matrices of its gates, by head
    adapted, left = [each for each in every if each.adapted], [each for each in every if not each.adapted]
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    kinds = Counter(kind(each) for each in adapted)
    shown = ", ".join(f"{name} {count}" for name, count in kinds.items())
    lines = [
        f"adapters on {len(adapted):,} layers of {len(kinds)} kind{'s' * (len(kinds) != 1)}: {shown}; "
        f"{trained:,} parameters, {trained / total:.2%} of the weights"
    ]
    passed = sum(each.weights * each.share for each in every)
    if left:
        share = sum(each.weights * each.share for each in left) / passed
        lines.append(f"without adapters: {', '.join(_left(left, passed, experts))}; {share:.1%} of the weights that a token passes")
    lines += _elsewhere(model, total)
    stacked = sorted({kind(each) for each in left if each.form == "stacked"})
    if stacked and experts:
        names = ", ".join(stacked)
        setting = f"--set 'lora.target_modules=[{ALL}, {names}]'"
        lines.append(f"the fused experts learn too with {setting}; each pass then keeps a second copy of their weights")
    return lines


def _elsewhere(model: PreTrainedModel, total: int) -> list[str]:
    """A line on parts that text does not pass, such as those that read images."""
    weights = [each for part in (decoder_of(model), model.get_output_embeddings()) for each in part.parameters()]
    passed = {id(weight) for weight in weights}
    outside = {name: weight.numel() for name, weight in model.named_parameters() if id(weight) not in passed and OTHER_SENSES.search(name)}
    if not outside:
        return []
    parts = sorted({next(part for part in name.split(".") if OTHER_SENSES.search(part)) for name in outside})
    return [f"{', '.join(parts)} reads no text and stays as it is: {sum(outside.values()) / total:.1%} of the weights"]


def _left(left: Iterable[Matrix], passed: float, experts: bool) -> list[str]:
    """Kinds without adapters by what they are, the largest first."""
    sizes: Counter[tuple[str, str]] = Counter()
    for each in left:
        sizes[_note(each, experts), kind(each)] += int(each.weights * each.share)
    told: dict[str, list[str]] = {}
    for (note, name), size in sizes.most_common():
        if size >= _FEW * passed or note == _FORMS["router"]:
            told.setdefault(note, []).append(name)
    small = len(sizes) - sum(len(names) for names in told.values())
    shown = [f"{' and '.join(names)} ({note})" if note else ", ".join(names) for note, names in told.items()]
    return shown + ([f"{small} small kind{'s' * (small != 1)}"] if small else [])


def _note(each: Matrix, experts: bool) -> str:
    """What is special about a weight, empty for a plain layer."""
    note = _FORMS.get(each.form, "") if experts or each.form != "stacked" else "matrices in one parameter"
    if each.form == "stacked" and each.share < 1:
        return f"{note}, a token passes {each.share:{'.0%' if each.share >= 0.01 else '.1%'}} of them"
    return note
