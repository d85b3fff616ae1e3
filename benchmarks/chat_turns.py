"""How long a turn of a chat takes to begin, with the values of the turns before and without: python -m benchmarks.chat_turns [MODEL]

Each turn is answered twice from the same conversation, once by a model that keeps the values and once by one that computes all tokens,
in turns about which is first. The conversation grows by the answers of the first. Prints a table; equal answers are counted.
"""

import statistics
import sys
import time
from collections.abc import Sequence

from llamahome.config.load import load_config
from llamahome.conversation import ChatModel, open_chat
from llamahome.model.sampling import Sampling

_QUESTIONS = ("What is the capital of France?", "Tell me more about it.", "How many people live there?", "Which river flows through it?")
_TURNS = 8
_NEW_TOKENS = 48


def first_token(chat: ChatModel, prompt: Sequence[int]) -> tuple[float, float, str]:
    """Seconds to the first text, seconds to the end, and the answer."""
    begun, first = time.perf_counter(), 0.0

    def write(text: str) -> None:
        nonlocal first
        first = first or time.perf_counter() - begun

    answer = chat.answer(prompt, Sampling(max_new_tokens=_NEW_TOKENS), write=write)
    return first, time.perf_counter() - begun, answer.text


def main(name: str) -> None:
    """Measure and print."""
    kept = open_chat(name, load_config(), say=print)
    turns: list[dict[str, str]] = []
    equal, ratios = 0, []
    first_token(kept, kept.encode([{"role": "user", "content": "Hello"}]))  # warm
    print("tokens  first text: kept  computed  whole answer: kept  computed")
    for turn in range(_TURNS):
        turns.append({"role": "user", "content": _QUESTIONS[turn % len(_QUESTIONS)]})
        prompt = kept.encode(turns)
        anew = ChatModel(kept.tokenizer, kept.model, kept.folder)  # the same weights, nothing kept
        pair = [first_token(chat, prompt) for chat in ((kept, anew) if turn % 2 else (anew, kept))]
        (soon, whole, answer), (late, whole_anew, other) = pair if turn % 2 else pair[::-1]
        equal += answer == other
        ratios.append(late / soon)
        print(f"{len(prompt):6}  {soon:16.3f}  {late:8.3f}  {whole:18.2f}  {whole_anew:8.2f}")
        turns.append({"role": "assistant", "content": answer})
    print(
        f"equal answers: {equal} of {_TURNS}; first text {statistics.median(ratios[1:]):.1f} times as soon (median of turns 2 to {_TURNS})"
    )


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct")
