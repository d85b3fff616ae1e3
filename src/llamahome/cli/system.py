"""The `config` commands: show every setting with its origin, check files, explain a key, write a schema or the commented files.

Nothing is imported at the top but Typer; the settings (pydantic, YAML) are loaded when a command runs, torch never.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llamahome.errors import ConfigError, LlamaHomeError, Problem, UsageError

if TYPE_CHECKING:
    from llamahome.config.load import LoadedConfig

config_app = typer.Typer(
    name="config",
    help="Settings: where they come from, what they mean, whether they are right.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigFiles = Annotated[
    list[Path] | None, typer.Option("--config", help="A YAML file above those of .config/; repeatable.", metavar="FILE")
]
Assignments = Annotated[list[str] | None, typer.Option("--set", help="One setting, above all files; repeatable.", metavar="KEY=VALUE")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@config_app.command()
def show(config: ConfigFiles = None, assignments: Assignments = None, as_json: AsJson = False) -> None:
    """Print every setting and where its value came from, as YAML that loads again."""
    from llamahome.config.load import dump_config, load_config

    loaded = load_config(config or (), assignments=assignments or ())
    if as_json:
        _print_json({key: {"value": value, "origin": loaded.origins[key]} for key, value in _flat(loaded).items()})
    else:
        typer.echo(dump_config(loaded), nl=False)


@config_app.command()
def check(
    files: Annotated[list[Path] | None, typer.Argument(help="YAML files above those of .config/.", metavar="[FILE]...")] = None,
    assignments: Assignments = None,
    as_json: AsJson = False,
) -> None:
    """Find everything that is wrong with the settings; exit status 2 when something is."""
    from llamahome.config.check import check_config, config_warnings
    from llamahome.config.files import standard_files
    from llamahome.config.load import is_chosen, load_config

    read = [str(path) for path in [*standard_files(Path()), *(files or ())]]
    try:
        loaded = load_config(files or (), assignments=assignments or ())
        errors = check_config(loaded.config, loaded.origins)
        if errors:
            raise ConfigError(errors)
    except ConfigError as error:
        if not as_json:
            raise
        _print_json({"ok": False, "files": read, "errors": [vars(problem) for problem in error.problems], "warnings": []})
        raise SystemExit(error.exit_status) from error
    warnings = config_warnings(loaded.config, loaded.origins)
    chosen = sum(is_chosen(origin) for origin in loaded.origins.values())
    if as_json:
        _print_json({"ok": True, "files": read, "errors": [], "warnings": [vars(problem) for problem in warnings]})
        return
    for problem in warnings:
        print(problem.render(level="warning"), file=sys.stderr)
    typer.echo(f"ok: {', '.join(read) or 'no files'}; {chosen} of {len(loaded.origins)} settings are set, the others are at their defaults")


@config_app.command()
def explain(
    key: Annotated[str, typer.Argument(help="A key like training.epochs, or a section like training.", metavar="KEY")],
    config: ConfigFiles = None,
    assignments: Assignments = None,
    as_json: AsJson = False,
) -> None:
    """Say what a setting means, what it takes, its default, and its value now."""
    from llamahome.config.describe import sections, settings

    if key in settings():
        facts = _facts(key, config or [], assignments or [])
        if as_json:
            _print_json(facts)
        else:
            _print_facts(facts)
    elif key in sections():
        _explain_section(key, as_json=as_json)
    else:
        raise UsageError(_unknown(key))


def _facts(key: str, files: list[Path], assignments: list[str]) -> dict[str, Any]:
    """What there is to say about a key. Broken settings elsewhere do not keep it from being explained."""
    from llamahome.config.describe import settings
    from llamahome.config.load import load_config

    setting = settings()[key]
    facts = {"key": key, "help": setting.help, "takes": setting.shape.describe(), "default": setting.default, "variable": setting.variable}
    try:
        loaded = load_config(files, assignments=assignments)
    except LlamaHomeError:
        return {**facts, "value": None, "origin": "unknown until `llamahome config check` finds no mistake"}
    return {**facts, "value": _flat(loaded)[key], "origin": loaded.origins[key]}


def _print_facts(facts: dict[str, Any]) -> None:
    from llamahome.config.yamltext import write_value

    typer.echo(facts["key"])
    for line in facts["help"].splitlines():
        typer.echo(f"  {line}")
    readable = not facts["origin"].startswith("unknown")
    typer.echo(f"takes    {facts['takes']}")
    typer.echo(f"default  {write_value(facts['default'])}")
    typer.echo(f"now      {write_value(facts['value'])}  # {facts['origin']}" if readable else f"now      {facts['origin']}")
    typer.echo(f"set it   --set {facts['key']}=VALUE, or the variable {facts['variable']}, or in .config/")


def _explain_section(section: str, *, as_json: bool) -> None:
    from llamahome.config.describe import section_help, settings

    members = [setting for setting in settings().values() if setting.section == section]
    if as_json:
        _print_json({"section": section, "help": section_help(section), "keys": [setting.key for setting in members]})
        return
    typer.echo(f"{section}: {section_help(section)}")
    width = max(len(setting.key) for setting in members)
    for setting in members:
        typer.echo(f"  {setting.key:{width}}  {setting.help.splitlines()[0]}")


def _unknown(key: str) -> Problem:
    from llamahome.config.describe import sections, unknown_key, unknown_section

    section, _, name = key.partition(".")
    message, hint = unknown_key(section, name) if section in sections() else unknown_section(key, what="key")
    return Problem(code="config.unknown-key", message=message, hint=hint)


@config_app.command()
def schema(markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/configuration.md instead.")] = False) -> None:
    """Print the JSON schema of the settings, for editors."""
    if markdown:
        from llamahome.config.pages import configuration_page

        typer.echo(configuration_page(), nl=False)
        return
    from llamahome.config.schema import Config

    _print_json({"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()})


@config_app.command()
def init(force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False) -> None:
    """Write .config/training_config.yaml and .config/distributed_config.yaml with comments."""
    from llamahome.config.pages import starter_files, write_starter_files

    write_starter_files(Path(), force=force)
    for path in starter_files():
        typer.echo(f"wrote {path}")


def _flat(loaded: "LoadedConfig") -> dict[str, Any]:
    return {f"{section}.{name}": value for section, group in loaded.config.model_dump().items() for name, value in group.items()}


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
