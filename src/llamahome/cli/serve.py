"""`serve` answers the requests of OpenAI clients on this machine."""

from typing import Any

import click

from llamahome.cli import options
from llamahome.cli.sampling import sampling_options
from llamahome.cli.train import importing_torch


@click.command(epilog=options.examples("llamahome serve latest", "llamahome serve latest --port 0 --max-new-tokens 1024"))
@click.argument("model", help="A run, a checkpoint, a model folder, a model's name, or `latest`.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, help="0 picks a free one.")
@click.option("--host", default="127.0.0.1", help="Address to listen on; one beyond this machine needs --api-key.")
@click.option("--api-key", metavar="KEY", help="Answer only requests with the header Authorization: Bearer KEY.")
@click.option("--queue", type=click.IntRange(0, 1000), default=8, help="Requests that may wait; the others get status 503.")
@click.option("--system", help="System message of conversations that bring none.")
@sampling_options
@options.assignments
@options.debug
@options.pass_overrides
def serve(
    overrides: options.Overrides,
    /,
    model: str,
    port: int,
    host: str,
    api_key: str | None,
    queue: int,
    system: str | None,
    debug: bool,
    **sampling: Any,
) -> None:
    """Try a model from any OpenAI client: /v1/chat/completions, /v1/completions and /v1/models on this machine.

    One request is answered at a time. The options about answers hold for requests that name no value. Ctrl-C ends the server.
    """
    from llamahome.errors import Problem, UsageError
    from llamahome.logs import log_to_stderr
    from llamahome.web.access import Access
    from llamahome.web.listen import open_socket, url_of
    from llamahome.web.listen import serve as run

    log_to_stderr(debug=debug)
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.split() == [api_key]):
        message = "a key is printable ASCII without spaces"
        raise UsageError(Problem(code="usage.bad-choice", message=message, where="--api-key"))
    loaded = overrides.load()
    opened = open_socket(host, port, key=api_key)
    with opened:
        with importing_torch():
            from llamahome.conversation import model_folder, open_chat
            from llamahome.export import commands_to_serve
            from llamahome.model.sampling import Sampling
            from llamahome.serving.app import Served, make_app
            from llamahome.system_message import note_unless
        chosen = Sampling(**sampling)
        chat_model = open_chat(model, loaded, say=options.note)
        name, commands = commands_to_serve(model, loaded, say=lambda _: None)  # open_chat has said it
        names = tuple(dict.fromkeys((name, model)))
        note_unless(system, model_folder(model, loaded, say=lambda _: None), note=options.note)
        access = Access(host, opened.getsockname()[1], api_key)
        app, worker = make_app(Served(chat_model, names, chosen, queue, system), access, log=options.note)
        options.note("one request at a time, for trying the model out. To serve it to others:")
        options.note("\n".join(f"  {command}" for command in commands))
        if chat_model.tokenizer.chat_template is None:
            options.note("the model has no chat template: /v1/chat/completions refuses, /v1/completions continues text")
        run(app, opened, ready=lambda: print(f"listening on {url_of(opened, host)}", flush=True), stop=worker.stop)
