"""All processes compare what they are about to do and refuse together when one of them would do something else.

Machines have their own copies of settings, data, model and packages; training on would mix them without a word. Called by all processes;
cost: one broadcast of the facts of process 0.
"""

from collections.abc import Mapping
from importlib.metadata import version

from llamahome import __version__
from llamahome.config.schema import Config
from llamahome.distributed import failures
from llamahome.distributed.world import World
from llamahome.errors import ConfigError, MachineError, Problem

_SHOWN = 60
_NAMED = 5
_OWN = ("distributed.node_rank", "distributed.master_addr")
"""What is each machine's own."""


def settings_and_versions(config: Config) -> dict[str, str]:
    """What every process can say before it has read anything."""
    sections = config.model_dump(mode="json")
    settings = {f"{section}.{key}": str(value) for section, values in sections.items() for key, value in values.items()}
    packages = {f"the version of {name}": version(name) for name in ("torch", "transformers")}
    return {**{key: value for key, value in settings.items() if key not in _OWN}, "the version of llamahome": __version__, **packages}


def require_agreement(world: World, facts: Mapping[str, str]) -> None:
    """ConfigError distributed.ranks-differ on the processes whose `facts` are not those of process 0, and names them.

    The first of them speaks, all others end in silence, also where no launcher of ours hears them.
    """
    if world.size == 1:
        return
    first: dict[str, str] = world.broadcast_object(dict(facts))
    differing = [name for name in {**first, **facts} if first.get(name) != facts.get(name)]
    differs = world.gather(bool(differing))
    if not any(differs):
        return
    if world.rank != differs.index(True):
        failures.fall_silent()
    if not differing:
        message = "another process has other settings, data or versions than this one"
        raise MachineError(Problem(code=failures.PEER_LOST, message=message))
    raise ConfigError([_differs(world, name, facts.get(name), first.get(name)) for name in differing[:_NAMED]])


def _differs(world: World, name: str, here: str | None, there: str | None) -> Problem:
    message = f"process {world.rank} has {name} {_cut(here)}, process 0 has {_cut(there)}"
    hint = "give every machine the same command, settings, data, model and packages"
    return Problem(code="distributed.ranks-differ", message=message, where=name, hint=hint)


def _cut(value: str | None) -> str:
    shown = "nothing" if value is None else value
    return shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 3]}..."
