"""The part of a causal language model that turns tokens into hidden states, which the output head then reads."""

from transformers import PreTrainedModel


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """What transformers' get_decoder() means to find; of a model without adapters or the one inside PEFT's wrapper.

    get_decoder() takes anything that is called `decoder`, which is ModernBERT's output head, and gives the whole model back where the
    prefix of the family names no part of it (Llama 4). Then it is the part that owns the embedding.
    """
    found = model.get_decoder()
    if found is not model and found is not model.get_output_embeddings():
        return found
    embedding = model.get_input_embeddings()
    parts = (part for part in model.children() if isinstance(part, PreTrainedModel))
    return next((part for part in parts if any(module is embedding for module in part.modules())), found)
