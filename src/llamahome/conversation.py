"""Talking to a model: what people mean by its name -> a function that answers a conversation, telling the answer as it appears."""

from collections.abc import Callable

import torch

from llamahome.config.load import LoadedConfig
from llamahome.data.text.tokens import load_tokenizer
from llamahome.model.adapter import open_trained
from llamahome.model.generate import generate
from llamahome.model.precision import choose_precision
from llamahome.pipeline import model_folder


def open_chat(
    target: str, loaded: LoadedConfig, *, say: Callable[[str], None], max_new_tokens: int, temperature: float
) -> Callable[[list[dict[str, str]], Callable[[str], None]], str]:
    """A function that answers a conversation: turns and a place to write to as the answer appears -> the answer."""
    folder = model_folder(target, loaded, say=say)
    tokenizer = load_tokenizer(folder, chat_template=loaded.config.model.chat_template)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = open_trained(folder, dtype=choose_precision(loaded.config, device).storage, device=device, say=say)

    def reply(turns: list[dict[str, str]], write: Callable[[str], None]) -> str:
        told: list[int] = []
        written = 0

        def tell(ids: list[int]) -> None:
            nonlocal written
            told.extend(token for token in ids if token not in tokenizer.end_ids)
            text = tokenizer.decode(told)
            if not text.endswith("\ufffd"):  # half a character: the rest comes with the next token
                write(text[written:])
                written = len(text)

        ids = generate(
            model,
            [tokenizer.encode_prompt(turns)],
            end_ids=tokenizer.end_ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            tell=tell,
        )
        answer = tokenizer.decode(ids[0])
        write(answer[written:])
        return answer

    return reply
