"""`chat` talks to a model, alone or beside its base, on a terminal, through a pipe, or with the questions on the command line."""

import json
from typing import TYPE_CHECKING, Any

import click

from llamahome.cli import options
from llamahome.cli.dialogue import Dialogue, Exchange, readable
from llamahome.cli.sampling import sampling_options, without_effect
from llamahome.cli.train import importing_torch

if TYPE_CHECKING:
    from llamahome.conversation import Answer


@click.command(
    epilog=options.examples(
        "llamahome chat latest",
        "llamahome chat latest --compare smollm2-135m-instruct",
        'llamahome chat output/training/final --prompt "What is the capital of France?" --json',
        "llamahome chat latest --temperature 0.7 --top-p 0.9 --seed 1 < questions.txt",
    )
)
@click.argument("model", help="A run, a checkpoint, a model folder, a model's name, or `latest`.")
@click.option("--prompt", "prompts", multiple=True, help="One question instead of a conversation; given again, the next question in it.")
@click.option("--system", help="System message before the conversation.")
@click.option("--compare", metavar="BASE", help="A second model that answers the same questions, shown beside the first.")
@sampling_options
@options.assignments
@options.debug
@options.as_json
@options.pass_overrides
def chat(
    overrides: options.Overrides,
    /,
    model: str,
    prompts: tuple[str, ...],
    system: str | None,
    compare: str | None,
    debug: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Talk to a model.

    On a terminal, /help lists the commands, Ctrl-C stops an answer, and an empty line or Ctrl-D ends the conversation.
    Without a terminal, each line of the input is one question.
    """
    from llamahome.errors import Problem, UsageError
    from llamahome.logs import log_to_stderr

    log_to_stderr(debug=debug)
    if as_json and not prompts:
        message = "--json answers questions of the command line"
        raise UsageError(Problem(code="usage.missing-option", message=message, hint="--prompt TEXT"))
    loaded = overrides.load()
    with importing_torch():
        from llamahome.conversation import model_folder, open_beside, open_chat
        from llamahome.model.sampling import Sampling
        from llamahome.system_message import note_unless
    chosen = Sampling(**sampling)
    if line := without_effect(sampling):
        options.note(line)
    chat_model = open_chat(model, loaded, say=options.note)
    beside = open_beside(chat_model, compare, loaded, say=options.note) if compare is not None else None
    dialogue = Dialogue(chat_model, beside, sampling=chosen, names=(model, compare or ""))
    note_unless(system, model_folder(model, loaded, say=lambda _: None), note=options.note)
    if system:
        dialogue.set_system(readable(system))
    if not prompts:
        from llamahome.cli.chatting import converse

        converse(dialogue)
    elif as_json:
        print(json.dumps(_as_json(model, compare, [dialogue.ask(readable(prompt)) for prompt in prompts]), ensure_ascii=False))
    else:
        from llamahome.cli.columns import show_answers

        for prompt in prompts:
            show_answers(dialogue, readable(prompt), note=options.note)


def _as_json(model: str, compare: str | None, exchanges: list[Exchange]) -> dict[str, Any]:
    """The last exchange, and all of them in `turns`."""
    turns = [
        {
            "prompt": exchange.question,
            **_answer(exchange.answer),
            **({"compare": {"model": compare, **_answer(exchange.beside)}} if exchange.beside is not None else {}),
        }
        for exchange in exchanges
    ]
    return {"model": model, **turns[-1], "turns": turns}


def _answer(answer: "Answer") -> dict[str, Any]:
    return {
        "answer": answer.text,
        "finish_reason": answer.finish,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
    }
