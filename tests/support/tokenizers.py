"""A small tokenizer with a ChatML template, trained on a few sentences without a download."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>")
CHATML = (
    "{% for turn in messages %}"
    "{{ '<|im_start|>' ~ turn.role ~ '\n' ~ turn.content ~ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = (
    "The cat sat on the mat. What is the capital of France? The capital of France is Paris.",
    "user assistant system tool",
    "def write(path, rows): return the docstring of this function",
    "Hello there, how are you today? I am fine, thank you. Numbers: 0 1 2 3 4 5 6 7 8 9.",
)


def train_tokenizer(*, vocabulary: int = 512, template: str | None = CHATML, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about `vocabulary` tokens; ends turns with <|im_end|>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(TEXT) * 3, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<|endoftext|>", pad_token="<pad>")
    wrapped.chat_template = template
    return wrapped


def save_tokenizer(folder: Path, *, vocabulary: int = 512, template: str | None = CHATML, adds_bos: bool = False) -> Path:
    """Save the tokenizer into `folder`, as in a model folder."""
    train_tokenizer(vocabulary=vocabulary, template=template, adds_bos=adds_bos).save_pretrained(folder)
    return folder
