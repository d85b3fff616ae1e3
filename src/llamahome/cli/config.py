"""The `config` commands: show, check, explain, schema, init.

Only click is imported at the top; pydantic and YAML are imported when a command runs, torch never.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llamahome.cli import options
from llamahome.errors import ConfigError, LlamaHomeError, Problem, UsageError

if TYPE_CHECKING:
    from llamahome.config.load import LoadedConfig


@click.group("config", cls=options.Group)
def config_app() -> None:
    """Settings: where they come from, what they mean, whether they are right."""


@config_app.command()
@options.config_files
@options.assignments
@options.as_json
@options.pass_overrides
def show(overrides: options.Overrides, as_json: bool) -> None:
    """Print every setting and where its value came from, as YAML that loads again."""
    from llamahome.config.load import dump_config

    loaded = overrides.load()
    if as_json:
        options.print_json({key: {"value": value, "origin": loaded.origins[key]} for key, value in _flat(loaded).items()})
    else:
        click.echo(dump_config(loaded), nl=False)


@config_app.command()
@click.argument("files", type=click.Path(path_type=Path), nargs=-1, metavar="[FILE]...", help="YAML files above those of .config/.")
@options.config_files
@options.assignments
@options.as_json
@options.pass_overrides
def check(overrides: options.Overrides, files: tuple[Path, ...], as_json: bool) -> None:
    """Find everything that is wrong with the settings; exit status 2 if something is."""
    from llamahome.config.check import config_warnings
    from llamahome.config.layers import standard_files
    from llamahome.config.load import is_chosen

    overrides.files.extend(files)
    paths = [str(path) for path in [*standard_files(Path()), *overrides.files]]
    try:
        loaded = overrides.load()
        options.check_settings(loaded)
    except ConfigError as error:
        if not as_json:
            raise
        options.print_json({"ok": False, "files": paths, "errors": [vars(problem) for problem in error.problems], "warnings": []})
        raise click.exceptions.Exit(error.exit_status) from error
    warnings = config_warnings(loaded.config, loaded.origins)
    chosen = sum(is_chosen(origin) for origin in loaded.origins.values())
    if as_json:
        options.print_json({"ok": True, "files": paths, "errors": [], "warnings": [vars(problem) for problem in warnings]})
        return
    for problem in warnings:
        print(problem.render(level="warning"), file=sys.stderr)
    click.echo(f"ok: {', '.join(paths) or 'no files'}; {chosen} of {len(loaded.origins)} settings are set, the others have their defaults")


@config_app.command()
@click.argument("key", help="A key like training.epochs, or a section like training.")
@options.config_files
@options.assignments
@options.as_json
@options.pass_overrides
def explain(overrides: options.Overrides, key: str, as_json: bool) -> None:
    """Explain a setting: what it means, what it takes, its default, and its value now."""
    from llamahome.config.describe import sections, settings, unknown_key

    if key in settings():
        facts = _facts(key, overrides)
        if as_json:
            options.print_json(facts)
        else:
            _print_facts(facts)
    elif key in sections():
        _explain_section(key, as_json=as_json)
    else:
        message, hint = unknown_key(key)
        raise UsageError(Problem(code="config.unknown-key", message=message, hint=hint))


def _facts(key: str, overrides: options.Overrides) -> dict[str, Any]:
    """What `explain` shows of a key. Its value is unknown if other settings are wrong, but the rest is still shown."""
    from llamahome.config.describe import settings

    setting = settings()[key]
    facts = {"key": key, "help": setting.help, "takes": setting.describe_values(), "default": setting.default, "variable": setting.variable}
    try:
        loaded = overrides.load()
    except LlamaHomeError:
        return {**facts, "value": None, "origin": "unknown until `llamahome config check` finds no mistake"}
    return {**facts, "value": _flat(loaded)[key], "origin": loaded.origins[key]}


def _print_facts(facts: dict[str, Any]) -> None:
    from llamahome.config.yamltext import write_value

    click.echo(facts["key"])
    for line in facts["help"].splitlines():
        click.echo(f"  {line}")
    readable = not facts["origin"].startswith("unknown")
    click.echo(f"takes    {facts['takes']}")
    click.echo(f"default  {write_value(facts['default'])}")
    click.echo(f"now      {write_value(facts['value'])}  # {facts['origin']}" if readable else f"now      {facts['origin']}")
    click.echo(f"set it   --set {facts['key']}=VALUE, or the variable {facts['variable']}, or in .config/")


def _explain_section(section: str, *, as_json: bool) -> None:
    from llamahome.config.describe import section_help, settings

    members = [setting for setting in settings().values() if setting.section == section]
    if as_json:
        options.print_json({"section": section, "help": section_help(section), "keys": [setting.key for setting in members]})
        return
    click.echo(f"{section}: {section_help(section)}")
    width = max(len(setting.key) for setting in members)
    for setting in members:
        click.echo(f"  {setting.key:{width}}  {setting.help.splitlines()[0]}")


@config_app.command()
@click.option("--markdown", is_flag=True, help="Print docs/configuration.md instead.")
def schema(markdown: bool) -> None:
    """Print the JSON schema of the settings, for editors."""
    if markdown:
        from llamahome.config.pages import configuration_page

        click.echo(configuration_page(), nl=False)
        return
    from llamahome.config.describe import json_schema

    options.print_json(json_schema())


@config_app.command()
@click.option("--force", is_flag=True, help="Replace existing files.")
def init(force: bool) -> None:
    """Write .config/training_config.yaml and .config/distributed_config.yaml with comments, and .config/schema.json for editors."""
    from llamahome.config.pages import starter_files, write_starter_files

    write_starter_files(Path(), force=force)
    for path in starter_files():
        click.echo(f"wrote {path}")


def _flat(loaded: "LoadedConfig") -> dict[str, Any]:
    return {f"{section}.{name}": value for section, group in loaded.config.model_dump().items() for name, value in group.items()}
