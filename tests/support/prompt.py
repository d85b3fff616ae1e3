"""A prompt that types llamahome's commands with the imports already behind it: python -m tests.support.prompt reads JSON lines.

Each command runs in a fork of this process, which has imported everything and computed nothing, so it is a process of its own with
its own signals, streams and exit status, and starts in a tenth of a second instead of four. `at` sends the process a signal when a
function of the program is called for the n-th time, or raises an error of the disk; the function itself runs as it is. After `?` a place
may hold a text: then only calls count whose arguments hold it. `after` sends a signal some seconds after the start.
What else may happen there than signals: HANG sleeps for an hour, "SLEEP 2" for two seconds, and "WAIT go" until there is a file `go`;
"LIMIT 9000" lets no file of the process become larger, as a full disk of its own does, until "LIMIT -1"; MEMORY raises torch's error.
Variables: POISON="TOKEN FACTOR" multiplies the loss of every micro-batch that holds that token. STREAMED=1 makes every frozen base one
that is larger than memory, of which nothing stays. SLOW_SAVES=S lets every file operation of a save take S seconds more. UNSEEN="NAME N"
hides the checkpoint NAME at first, as a client of NFS does; ALL_UNSEEN=N hides all of them in the first N looks.
{"lane": [IN, OUT]} forks a second prompt, which reads and answers through these named pipes at the same time.
Answers: {"pid": N}, later {"status": S}.
"""

import errno
import importlib
import json
import os
import resource
import signal
import sys
import threading
import time
from typing import Any

IMPORTED = (
    "llamahome.pipeline",
    "llamahome.cli.app",
    "llamahome.data.sample",
    "llamahome.data.view",
    "llamahome.monitoring.plain",
    "llamahome.monitoring.report",
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
    "peft.tuners.lora",
)


def happen(what: str, args: tuple[Any, ...]) -> None:
    """Send a signal, sleep for an hour, leave a file `struck`, or raise an error of the disk; SHORT first cuts the written file in half."""
    if what == "HANG":
        time.sleep(3600)
    elif what.startswith("SLEEP"):
        time.sleep(float(what.split()[1]))
    elif what.startswith("WAIT"):
        deadline = time.monotonic() + 60
        while not os.path.exists(what.split()[1]) and time.monotonic() < deadline:
            time.sleep(0.02)
    elif what.startswith("LIMIT"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(what.split()[1]), resource.RLIM_INFINITY))
    elif what == "MEMORY":
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")
    elif what.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[what])
    elif what == "STRUCK":
        os.close(os.open("struck", os.O_CREAT))
    else:
        if what == "SHORT" and os.path.isfile(args[1]):
            os.truncate(args[1], os.path.getsize(args[1]) // 2)
        number = getattr(errno, "ENOSPC" if what == "SHORT" else what)
        raise OSError(number, os.strerror(number), *(str(each) for each in args[1:2]))


def strike(place: str, turn: int, names: list[str]) -> None:
    """Send this process the signals `names` when `module:function` or `module:Class.method` is called for the `turn`-th time."""
    place, _, text = place.partition("?")
    module, _, path = place.partition(":")
    *outer, name = path.split(".")
    holder: Any = importlib.import_module(module)
    for each in outer:
        holder = getattr(holder, each)
    original = getattr(holder, name)
    calls = 0

    def struck(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        counts = not text or any(text in str(each) for each in args)
        calls += counts
        if counts and calls == turn:
            for each in names:
                happen(each, args)
        return original(*args, **kwargs)

    setattr(holder, name, struck)


def poison(token: int, factor: float) -> None:
    """Multiply the loss of each micro-batch in which `token` occurs: a row that does harm, wherever it is seen."""
    objective: Any = importlib.import_module("llamahome.model.objective").Objective
    original = objective.loss_sum

    def poisoned(self: Any, batch: Any) -> Any:
        loss = original(self, batch)
        return loss * factor if bool((batch.tokens_T == token).any()) else loss

    objective.loss_sum = poisoned


def stream_every_base() -> None:
    """Let runs, plans and models that answer take every frozen base for larger than the memory beside the activations."""
    for place in ("llamahome.training.loaded_model", "llamahome.planning.streamed"):
        importlib.import_module(place).must_stream = lambda base_bytes, *, free_bytes: True
    importlib.import_module("llamahome.model.stream").Stream._chosen = lambda self, keep_bytes: frozenset()
    importlib.import_module("llamahome.conversation").HELD_SHARE = -1.0
    importlib.import_module("llamahome.model.export.verify").LARGE = 0


def slow_down(seconds: float) -> None:
    """Let every file operation on a checkpoint take so much longer."""
    durable: Any = importlib.import_module("llamahome.durable")
    original = durable._observe

    def slow(operation: str, path: Any, source: Any = None) -> None:
        if "checkpoint-" in str(path):
            time.sleep(seconds)
        original(operation, path, source)

    durable._observe = slow


def hide(name: str, looks: int) -> None:
    """Let this process not find the checkpoint `name` by itself, and not see it in its next `looks` when it is told of it."""
    paths: Any = importlib.import_module("llamahome.rundir").RunPaths
    chosen: Any = importlib.import_module("llamahome.checkpoint.chosen")
    original, digest, seen = paths.checkpoints, chosen._digest, []

    def checkpoints(self: Any) -> Any:
        return [each for each in original(self) if each[1].name != name or seen]

    def digest_of(folder: Any) -> Any:
        seen.append(folder.name)
        return None if folder.name == name and seen.count(name) <= looks else digest(folder)

    paths.checkpoints, chosen._digest = checkpoints, digest_of


def hide_all(looks: int) -> None:
    """Let this process find no checkpoint in its first `looks`."""
    paths: Any = importlib.import_module("llamahome.rundir").RunPaths
    original, seen = paths.checkpoints, []

    def checkpoints(self: Any) -> Any:
        seen.append(self)
        return original(self) if len(seen) > looks else []

    paths.checkpoints = checkpoints


def become(command: dict[str, Any]) -> None:
    """Turn this fork into the process that a shell would have started."""
    os.setsid()
    os.chdir(command["folder"])
    for number, name, flags in (
        (0, command["stdin"], os.O_RDONLY),
        (1, command["stdout"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, command["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        opened = os.open(name, flags)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = os.fdopen(0, "r", encoding="utf-8", closefd=False)
    os.environ.update(command["variables"])
    sys.argv = ["llamahome", *command["words"]]
    for place, turn, names in command["at"]:
        strike(place, turn, names)
    if "POISON" in command["variables"]:
        token, factor = command["variables"]["POISON"].split()
        poison(int(token), float(factor))
    if "SLOW_SAVES" in command["variables"]:
        slow_down(float(command["variables"]["SLOW_SAVES"]))
    if "UNSEEN" in command["variables"]:
        name, looks = command["variables"]["UNSEEN"].split()
        hide(name, int(looks))
    if "ALL_UNSEEN" in command["variables"]:
        hide_all(int(command["variables"]["ALL_UNSEEN"]))
    if "LLAMAHOME_LAUNCH" in command["variables"]:
        os.environ["LLAMAHOME_LAUNCHER_PID"] = str(os.getppid())
    if "STREAMED" in command["variables"]:
        stream_every_base()


def wait_for(child: int, after: tuple[float, str] | None) -> int:
    """The wait status of `child`, which gets the signal of `after` some seconds from now if it still runs then."""
    timer = threading.Timer(after[0], lambda: os.kill(child, signal.Signals[after[1]])) if after else None
    if timer is not None:
        timer.start()
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # it keeps its number until the timer has ended
        timer.cancel()
        timer.join()
    return os.waitpid(child, 0)[1]


def open_lane(incoming: str, outgoing: str) -> None:
    """Let this fork read and answer through named pipes."""
    for number, name, flags in ((0, incoming, os.O_RDONLY), (1, outgoing, os.O_WRONLY)):  # the other side opens them in this order
        opened = os.open(name, flags)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = os.fdopen(0, "r", encoding="utf-8", closefd=False)


def warm() -> None:
    """Import everything, and let transformers make its table of old names of weights, which takes a third of a short run."""
    for name in IMPORTED:
        importlib.import_module(name)
    importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")


def serve() -> None:
    print(json.dumps({"ready": True}), flush=True)
    while line := sys.stdin.readline():
        command = json.loads(line)
        child = os.fork()
        if child == 0 and "lane" in command:
            open_lane(*command["lane"])
            serve()
            os._exit(0)
        if child == 0:
            become(command)
            status = 0
            try:
                importlib.import_module("llamahome.cli.app").main()
            except SystemExit as ended:
                status = ended.code or 0
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)  # the interpreter's own end takes half a second; `shell` sees it
        print(json.dumps({"pid": child}), flush=True)
        if "lane" in command:
            continue
        ended = wait_for(child, command.get("after"))
        print(json.dumps({"status": os.waitstatus_to_exitcode(ended)}), flush=True)


if __name__ == "__main__":
    warm()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    serve()
