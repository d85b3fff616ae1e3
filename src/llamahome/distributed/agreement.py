"""All processes compare their settings, versions and data before training, and all refuse to start if one of them differs.

Machines have their own copies of settings, data, model and packages; training with different ones would mix them silently.
All processes call `require_agreement`. Cost: one broadcast of the facts of process 0.
"""

from collections.abc import Mapping
from importlib.metadata import version

from llamahome import __version__
from llamahome.config.schema import Config
from llamahome.distributed import failures
from llamahome.distributed.world import World
from llamahome.errors import ConfigError, MachineError, Problem

_SHOWN_CHARACTERS = 60
_SHOWN_DIFFERENCES = 5
_MACHINE_SETTINGS = ("distributed.node_rank", "distributed.master_addr")
"""Settings that may differ between machines."""


def settings_and_versions(config: Config) -> dict[str, str]:
    """The facts that every process knows before it has read any data."""
    sections = config.model_dump(mode="json")
    settings = {f"{section}.{key}": str(value) for section, values in sections.items() for key, value in values.items()}
    packages = {f"the version of {name}": version(name) for name in ("torch", "transformers")}
    shared = {key: value for key, value in settings.items() if key not in _MACHINE_SETTINGS}
    return {**shared, "the version of llamahome": __version__, **packages}


def require_agreement(world: World, facts: Mapping[str, str]) -> None:
    """Raise ConfigError distributed.ranks-differ on the processes whose `facts` differ from those of process 0; it names the differences.

    Only the first of these processes shows its error. All others end silently, also if no launcher of ours collects their errors.
    """
    if world.size == 1:
        return
    first: dict[str, str] = world.broadcast_object(dict(facts))
    differing = [name for name in {**first, **facts} if first.get(name) != facts.get(name)]
    differs = world.gather(bool(differing))
    if not any(differs):
        return
    if world.rank != differs.index(True):
        failures.mute_stderr()
    if not differing:
        message = "another process has other settings, data or versions than this one"
        raise MachineError(Problem(code=failures.PEER_LOST, message=message))
    raise ConfigError([_difference(world, name, facts.get(name), first.get(name)) for name in differing[:_SHOWN_DIFFERENCES]])


def _difference(world: World, name: str, here: str | None, on_process_0: str | None) -> Problem:
    message = f"process {world.rank} has {name} {_shorten(here)}, process 0 has {_shorten(on_process_0)}"
    hint = "give every machine the same command, settings, data, model and packages"
    return Problem(code="distributed.ranks-differ", message=message, where=name, hint=hint)


def _shorten(value: str | None) -> str:
    text = "nothing" if value is None else value
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."
