"""Chat templates that render like those of well-known model families, in our own wording, with matching small tokenizers.

Each family builds by hand the expected text of a chat and which parts are learned: the reference of the mask tests.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from tests.support.tokenizers import TEXT
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

Turn = tuple[str, str]
Pieces = list[tuple[str, bool]]
"""Parts of a rendered chat, and whether each is learned."""
SAMPLES = (
    *TEXT,
    "[INST] what is it [/INST] it is that\n\n",
    "    def f(x):\n        return x\n",
    '{"name": "clock", "arguments": {"zone": "UTC"}}',
)


@dataclass(frozen=True)
class Family:
    """A template, its special tokens, and the function that builds the expected text."""

    template: str
    pieces: Callable[[list[Turn]], Pieces]
    special: tuple[str, ...]
    eos: str
    bos: str | None = None
    sentencepiece: bool = False
    plain_added: tuple[str, ...] = ()
    """Added tokens that are not special."""
    swallow: bool = False
    """Whether special tokens strip the white space to their right."""
    system: bool = True
    """Whether the template renders a system turn."""
    merges: bool = False
    """If it does not: whether the system text is put before the first question."""

    def tokenizer(self, template: str | None = None) -> PreTrainedTokenizerFast:
        """A tokenizer trained in this session, with the family's template or another one."""
        special = tuple(AddedToken(text, special=True, rstrip=self.swallow, normalized=False) for text in self.special)
        tokenizer = _trained(self.sentencepiece)
        tokenizer.add_special_tokens(list(special))
        tokenizer.add_tokens([AddedToken(text, normalized=False) for text in self.plain_added])
        wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=self.eos, bos_token=self.bos, pad_token=self.eos)
        wrapped.chat_template = self.template if template is None else template
        return wrapped


def _trained(sentencepiece: bool) -> Tokenizer:
    return Tokenizer.from_str(_sentencepiece() if sentencepiece else _byte_level())


@cache
def _byte_level() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(SAMPLES * 3, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False))
    return str(tokenizer.to_str())


@cache
def _sentencepiece() -> str:
    """A BPE tokenizer with a mark for spaces, one mark before the text, and byte fallback, as in Llama 2 and Mistral."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.train_from_iterator(
        [word for text in SAMPLES for word in text.split(" ")], trainers.BpeTrainer(vocab_size=300, show_progress=False)
    )
    learned = json.loads(tokenizer.to_str())["model"]
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *learned["vocab"]]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer.model = models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return str(tokenizer.to_str())


def _split_system(turns: list[Turn]) -> tuple[str | None, list[Turn]]:
    return (turns[0][1], turns[1:]) if turns[0][0] == "system" else (None, turns)


def _llama2(turns: list[Turn]) -> Pieces:
    system, rest = _split_system(turns)
    pieces: Pieces = []
    for number, (role, text) in enumerate(rest):
        if role == "assistant":
            pieces.append((f" {text.strip()} </s>", True))
            continue
        intro = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if number == 0 and system is not None else ""
        pieces.append((f"<s>[INST] {(intro + text).strip()} [/INST]", False))
    return pieces


def _llama3(turns: list[Turn]) -> Pieces:
    pieces: Pieces = [("<|begin_of_text|>", False)]
    for role, text in turns:
        pieces += [(f"<|start_header_id|>{role}<|end_header_id|>\n\n", False), (f"{text.strip()}<|eot_id|>", role == "assistant")]
    return pieces


def _llama31(turns: list[Turn]) -> Pieces:
    system, rest = _split_system(turns)
    head = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 01 Jan 2025\n\n"
    return [(f"{head}{(system or '').strip()}<|eot_id|>", False), *_llama3(rest)[1:]]


def _mistral(turns: list[Turn]) -> Pieces:
    system, rest = _split_system(turns)
    pieces: Pieces = [("<s>", False)]
    for number, (role, text) in enumerate(rest):
        if role == "assistant":
            pieces.append((f" {text.strip()}</s>", True))
        else:
            pieces.append((f"[INST] {system + chr(10) * 2 if number == 0 and system is not None else ''}{text}[/INST]", False))
    return pieces


def _chatml(turns: list[Turn], default: str | None = None) -> Pieces:
    if default is not None and turns[0][0] != "system":
        turns = [("system", default), *turns]
    pieces: Pieces = []
    for role, text in turns:
        pieces += [(f"<|im_start|>{role}\n", False), (f"{text}<|im_end|>", role == "assistant"), ("\n", False)]
    return pieces


def _qwen3(turns: list[Turn]) -> Pieces:
    """The last answer without thoughts is rendered with an empty thought, which is learned too."""
    pieces = _chatml(turns[:-1])
    return [
        *pieces,
        ("<|im_start|>assistant\n", False),
        (f"<think>\n\n</think>\n\n{turns[-1][1].lstrip(chr(10))}<|im_end|>", True),
        ("\n", False),
    ]


def _gemma(turns: list[Turn]) -> Pieces:
    system, rest = _split_system(turns)
    if system is not None:
        rest = [("user", f"{system}\n\n{rest[0][1]}"), *rest[1:]]
    pieces: Pieces = [("<bos>", False)]
    for role, text in rest:
        name = "model" if role == "assistant" else role
        pieces += [(f"<start_of_turn>{name}\n", False), (f"{text.strip()}<end_of_turn>", role == "assistant"), ("\n", False)]
    return pieces


def _phi(turns: list[Turn]) -> Pieces:
    pieces: Pieces = []
    for role, text in turns:
        pieces += [(f"<|{role}|>\n", False), (f"{text}<|end|>", role == "assistant"), ("\n", False)]
    return [*pieces, ("<|endoftext|>", False)]


def _zephyr(turns: list[Turn]) -> Pieces:
    pieces: Pieces = []
    for role, text in turns:
        pieces += [(f"<|{role}|>\n", False), (f"{text}</s>", role == "assistant"), ("\n", False)]
    return pieces


LLAMA2 = """
{%- set shift = 1 if messages[0].role == 'system' else 0 -%}
{%- for turn in messages[shift:] -%}
{%- if (turn.role == 'user') != (loop.index0 is even) -%}{{ raise_exception('user and assistant must take turns') }}{%- endif -%}
{%- set intro = '<<SYS>>\\n' ~ messages[0].content ~ '\\n<</SYS>>\\n\\n' if shift and loop.first else '' -%}
{%- if turn.role == 'user' -%}{{ bos_token ~ '[INST] ' ~ (intro ~ turn.content).strip() ~ ' [/INST]' }}
{%- else -%}{{ ' ' ~ turn.content.strip() ~ ' ' ~ eos_token }}{%- endif -%}
{%- endfor -%}"""
LLAMA3 = """
{{- bos_token -}}
{%- for turn in messages -%}
{{ '<|start_header_id|>' ~ turn.role ~ '<|end_header_id|>\\n\\n' ~ turn.content | trim ~ '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}"""
LLAMA31 = """
{{- bos_token ~ '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' ~ strftime_now('%d %b %Y') ~ '\\n\\n' -}}
{%- set spoken = messages -%}
{%- if messages[0].role == 'system' -%}{{ messages[0].content | trim }}{%- set spoken = messages[1:] -%}{%- endif -%}
{{- '<|eot_id|>' -}}
{%- for turn in spoken -%}
{{ '<|start_header_id|>' ~ turn.role ~ '<|end_header_id|>\\n\\n' ~ turn.content | trim ~ '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}"""
MISTRAL = """
{{- bos_token -}}
{%- set shift = 1 if messages[0].role == 'system' else 0 -%}
{%- for turn in messages[shift:] -%}
{%- if turn.role == 'user' -%}{{ '[INST] ' ~ (messages[0].content ~ '\\n\\n' if shift and loop.first else '') ~ turn.content ~ '[/INST]' }}
{%- else -%}{{ ' ' ~ turn.content | trim ~ eos_token }}{%- endif -%}
{%- endfor -%}"""
CHATML = """
{%- for turn in messages -%}{{ '<|im_start|>' ~ turn.role ~ '\\n' ~ turn.content ~ '<|im_end|>\\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
STARTER = (
    """
{%- if messages[0].role != 'system' -%}{{ '<|im_start|>system\\nYou are kind.<|im_end|>\\n' }}{%- endif -%}"""
    + CHATML
)
QWEN25 = """
{%- set told = messages[0].content if messages[0].role == 'system' else 'You are kind.' -%}
{{- '<|im_start|>system\\n' ~ told -}}
{%- if tools -%}{{ '\\n\\nTools:\\n' }}{%- for tool in tools -%}{{ tool | tojson ~ '\\n' }}{%- endfor -%}{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- for turn in messages -%}
{%- if turn.role == 'tool' -%}
{%- if messages[loop.index0 - 1].role != 'tool' -%}{{ '<|im_start|>user' }}{%- endif -%}
{{ '\\n<tool_response>\\n' ~ turn.content ~ '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{ '<|im_end|>\\n' }}{%- endif -%}
{%- elif turn.role != 'system' or not loop.first -%}
{{ '<|im_start|>' ~ turn.role }}
{%- if turn.content -%}{{ '\\n' ~ turn.content }}{%- endif -%}
{%- for call in turn.tool_calls or [] -%}
{{ '\\n<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' ~ call.function.arguments | tojson ~ '}\\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
QWEN3 = """
{%- set seen = namespace(question=-1) -%}
{%- for turn in messages -%}{%- if turn.role == 'user' -%}{%- set seen.question = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for turn in messages -%}
{{ '<|im_start|>' ~ turn.role ~ '\\n' }}
{%- if turn.role == 'assistant' -%}
{%- set words = turn.content.split('</think>')[-1].lstrip('\\n') if '</think>' in turn.content else turn.content -%}
{%- set thought = turn.content.split('</think>')[0].split('<think>')[-1].strip('\\n') if '</think>' in turn.content else '' -%}
{%- if loop.index0 > seen.question and (loop.last or thought) -%}
{{ '<think>\\n' ~ thought ~ '\\n</think>\\n\\n' ~ words.lstrip('\\n') }}
{%- else -%}{{ words }}{%- endif -%}
{%- else -%}{{ turn.content }}{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
NO_SYSTEM = "{%- if messages[0].role == 'system' -%}{{ raise_exception('there is no system role') }}{%- endif -%}" + CHATML
GEMMA = """
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}{{ raise_exception('there is no system role') }}{%- endif -%}
{%- for turn in messages -%}
{{ '<start_of_turn>' ~ ('model' if turn.role == 'assistant' else turn.role) ~ '\\n' ~ turn.content | trim ~ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""
PHI = """
{%- for turn in messages -%}{{ '<|' ~ turn.role ~ '|>\\n' ~ turn.content ~ '<|end|>\\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- else -%}{{ eos_token }}{%- endif -%}"""
ZEPHYR = """
{%- for turn in messages -%}{{ '<|' ~ turn.role ~ '|>\\n' ~ turn.content ~ eos_token ~ '\\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}"""

_IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_HEADERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_THINK = ("<think>", "</think>")
_CALLS = ("<tool_call>", "</tool_call>")
FAMILIES = {
    "Llama 2": Family(LLAMA2, _llama2, ("<s>", "</s>"), eos="</s>", bos="<s>", sentencepiece=True),
    "Llama 3": Family(LLAMA3, _llama3, _HEADERS, eos="<|eot_id|>", bos="<|begin_of_text|>"),
    "Llama 3 with a date": Family(LLAMA31, _llama31, _HEADERS, eos="<|eot_id|>", bos="<|begin_of_text|>"),
    "Mistral": Family(MISTRAL, _mistral, ("<s>", "</s>", "[INST]", "[/INST]"), eos="</s>", bos="<s>", sentencepiece=True),
    "Qwen 2.5": Family(QWEN25, lambda turns: _chatml(turns, "You are kind."), _IM, eos="<|im_end|>", plain_added=_CALLS),
    "Qwen 3": Family(QWEN3, _qwen3, _IM, eos="<|im_end|>", plain_added=_THINK),
    "Gemma": Family(
        GEMMA, _gemma, ("<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"), eos="<eos>", bos="<bos>", system=False, merges=True
    ),
    "No system": Family(NO_SYSTEM, _chatml, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), eos="<|im_end|>", system=False),
    "Phi": Family(PHI, _phi, ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), eos="<|endoftext|>", swallow=True),
    "ChatML": Family(CHATML, _chatml, _IM, eos="<|im_end|>"),
    "Zephyr": Family(ZEPHYR, _zephyr, ("<s>", "</s>"), eos="</s>", bos="<s>", sentencepiece=True),
    "starter": Family(STARTER, lambda turns: _chatml(turns, "You are kind."), _IM, eos="<|im_end|>"),
}
