"""Which kind of layer a module is: attention, MLP, norm, embedding, head or adapter, so that a profile can say what took the time."""

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from llamahome.model.packing import decoder_of

ATTENTION, MLP, NORM, LORA, EMBEDDING, HEAD, REST = "attention", "MLP", "norm", "LoRA", "embedding", "head and loss", "rest of the model"
_ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention", "linear_attn", "mixer")
_MLP_NAMES = ("mlp", "feed_forward", "ffn", "moe", "block_sparse_moe", "experts", "shared_experts", "shared_expert")
_HEAD_NAMES = ("lm_head", "embed_out")


def layer_kinds(model: PreTrainedModel) -> Iterator[tuple[nn.Module, str]]:
    """Every module of a known kind; a module inside another one counts for itself. The decoder around them is the rest of the model."""
    decoder = decoder_of(model)
    for name, module in model.named_modules():
        kind = REST if module is decoder else _kind(name, module)
        if kind is not None:
            yield module, kind


def adapter_ranks(model: nn.Module) -> set[int]:
    """The ranks of the adapters of `model`: a product with such a side is one of theirs."""
    return {parameter.shape[0] for name, parameter in model.named_parameters() if ".lora_A." in name or ".vera_lambda_d." in name}


def _kind(name: str, module: nn.Module) -> str | None:
    last, kind = name.rpartition(".")[2], type(module).__name__
    if any(part.startswith("lora_") for part in name.split(".")) and not isinstance(module, nn.ModuleDict):
        return LORA
    if last in _HEAD_NAMES:
        return HEAD
    if isinstance(module, nn.Embedding):
        return EMBEDDING
    if "norm" in kind.lower():
        return NORM
    if last in _ATTENTION_NAMES or kind.endswith("Attention"):
        return ATTENTION
    return MLP if last in _MLP_NAMES or kind.endswith(("MLP", "Experts")) else None
