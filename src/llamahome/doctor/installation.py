"""Checks Python and the installed packages against pyproject.toml and requirements.lock. Standard library only.

Cost: reads the metadata of each installed package (0.1 s), and imports those that llamahome needs (about 5 s, most of it torch).
"""

import importlib
import importlib.metadata
import importlib.util
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import llamahome
from llamahome.doctor.checks import Check, failed, one_line, passed, warned
from llamahome.doctor.versions import is_within, parse_version

_MOST_SHOWN = 4
_IMPORT_ERRORS = (ImportError, OSError, RuntimeError, AttributeError, TypeError, ValueError, SyntaxError, LookupError, NameError)
"""What the import of a broken package raises; a crash of the process is seen by watch.py."""
_MODULES = {"ruamel.yaml": "ruamel.yaml"}
"""Modules that are not named as their package with _ in place of -."""


@dataclass(frozen=True)
class Requirement:
    """A package and the versions that are allowed."""

    package: str
    ranges: str

    @property
    def typed(self) -> str:
        """As pip takes it."""
        return f"{self.package}{self.ranges}"


@dataclass(frozen=True)
class Installation:
    """What is installed, and what is asked for."""

    python: str
    """Version."""
    python_ranges: str
    requirements: tuple[Requirement, ...]
    installed: dict[str, tuple[str, ...]]
    """Normal name -> versions, the one that Python imports first."""
    locked: dict[str, str]
    """Normal name -> version of requirements.lock; empty if there is no such file."""
    checkout: str | None
    """The folder of the source, if llamahome runs from one."""
    pip: tuple[str, ...]
    """The words that install a package into this environment; empty if there is no installer."""
    newer_pythons: tuple[str, ...] = ()
    """Supported versions on the PATH, such as python3.12."""


def normal(name: str) -> str:
    """PEP 503: Ruamel.YAML -> ruamel-yaml."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_installation() -> Installation:
    """Look at the running Python."""
    source = Path(llamahome.__file__).parents[2]
    project = _project(source)
    if project is None:
        ranges, lines, checkout = _from_metadata()
        locked: dict[str, str] = {}
    else:
        ranges, lines, checkout = str(project["requires-python"]), list(project["dependencies"]), str(source)  # type: ignore[call-overload]
        locked = _locked(source / "requirements.lock")
    return Installation(
        python=".".join(str(part) for part in sys.version_info[:3]),
        python_ranges=ranges,
        requirements=tuple(_requirement(line) for line in lines),
        installed=_installed(),
        locked=locked,
        checkout=checkout,
        pip=_installer(),
        newer_pythons=tuple(name for minor in range(14, 10, -1) if shutil.which(name := f"python3.{minor}")),
    )


def _project(source: Path) -> Mapping[str, object] | None:
    try:
        project = tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8")).get("project", {})
    except (OSError, ValueError):
        return None
    return project if project.get("name") == "llamahome" else None


def _from_metadata() -> tuple[str, list[str], None]:
    """What the installed wheel asks for; nothing if llamahome is not installed as a package."""
    try:
        metadata = importlib.metadata.metadata("llamahome")
    except importlib.metadata.PackageNotFoundError:
        return "", [], None
    lines = [line for line in importlib.metadata.requires("llamahome") or [] if "extra ==" not in line]
    return metadata["Requires-Python"] or "", lines, None


def _requirement(line: str) -> Requirement:
    match = re.match(r"([A-Za-z0-9._-]+?)\s*(?:\[[^\]]*\])?\s*((?:[<>=!~][^;]*)?)(?:;.*)?$", line.strip())
    if match is None:
        raise ValueError(f"{line!r} is no requirement")
    return Requirement(match[1], match[2].replace(" ", ""))


def _locked(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pins = (line.split("#")[0].split(";")[0].strip().partition("==") for line in lines)
    return {normal(name): version for name, equals, version in pins if equals}


def _installed() -> dict[str, tuple[str, ...]]:
    """Every version of each package on the path, in the order in which Python looks."""
    found: dict[str, list[str]] = {}
    for distribution in importlib.metadata.distributions():
        name, version = distribution.metadata["Name"], distribution.metadata["Version"]
        if name and version and version not in found.setdefault(normal(name), []):
            found[normal(name)].append(version)
    return {name: tuple(versions) for name, versions in found.items()}


def _installer() -> tuple[str, ...]:
    if importlib.util.find_spec("pip") is not None:
        return (sys.executable, "-m", "pip", "install")
    uv = shutil.which("uv")
    return (uv, "pip", "install", "--python", sys.executable) if uv else ()


def _install(found: Installation, *words: str) -> str | None:
    return shlex.join([*found.pip, *words]) if found.pip else None


def python_check(found: Installation) -> Check:
    """Whether this version of Python is supported."""
    if not found.python_ranges or is_within(found.python, found.python_ranges):
        return passed("python", f"Python {found.python}, {sys.executable}")
    better = next((name for name in found.newer_pythons if is_within(name.removeprefix("python"), found.python_ranges)), None)
    help_ = f"make -C {shlex.quote(found.checkout)} setup PYTHON={better}" if better and found.checkout else None
    return failed("python", f"Python {found.python} is not supported ({found.python_ranges})", help_)


def package_checks(found: Installation) -> Iterator[Check]:
    """Whether each package is there once, in a version within its range; then whether the versions are those of requirements.lock."""
    missing = [each for each in found.requirements if normal(each.package) not in found.installed]
    wrong = [each for each in found.requirements if each not in missing and not _fits(found, each)]
    if missing or wrong:
        texts = [f"{each.package} is missing" for each in missing]
        texts += [f"{each.package} is {found.installed[normal(each.package)][0]}, not {each.ranges}" for each in wrong]
        yield failed("packages", _some(texts), _install(found, *(each.typed for each in (*missing, *wrong))))
    elif not found.requirements:
        yield warned("packages", "llamahome is not installed as a package, so the versions that it needs are not known")
    else:
        yield passed("packages", f"{len(found.requirements)} packages within the ranges of pyproject.toml")
    needed = {normal(each.package) for each in found.requirements}
    twice = {name: found.installed[name] for name in sorted(needed & set(found.installed)) if len(found.installed[name]) > 1}
    if twice:
        texts = [f"{name} {' and '.join(versions)}, of which {versions[0]} is used" for name, versions in twice.items()]
        name, versions = next(iter(twice.items()))
        uninstall = _install(found, "--force-reinstall", "--no-deps", f"{name}=={versions[-1]}")
        yield warned("package-versions", f"installed twice: {_some(texts)}", "unset PYTHONPATH" if _by_python_path(name) else uninstall)
    if found.locked:
        yield _lock_check(found)


def _fits(found: Installation, requirement: Requirement) -> bool:
    try:
        return is_within(found.installed[normal(requirement.package)][0], requirement.ranges)
    except ValueError:
        return False


def _by_python_path(name: str) -> bool:
    """Whether the version that Python imports first comes from a folder of PYTHONPATH and not from the environment."""
    first = next((each for each in importlib.metadata.distributions() if normal(each.metadata["Name"] or "") == name), None)
    return first is not None and "site-packages" not in str(first.locate_file(""))


def _lock_check(found: Installation) -> Check:
    """Other versions within the ranges should work, but they are not the ones that were tested."""
    differ = []
    for name, version in sorted(found.locked.items()):
        here = found.installed.get(name)
        if here is None:
            differ.append(f"{name} is missing")
        elif _numbers(here[0]) != _numbers(version):
            differ.append(f"{name} is {here[0]}, not {version}")
    if not differ:
        return passed("requirements-lock", f"the versions of requirements.lock ({len(found.locked)} packages)")
    path = f"{found.checkout}/requirements.lock"
    return warned("requirements-lock", f"{len(differ)} of {len(found.locked)} differ: {_some(differ)}", _install(found, "-r", path))


def _numbers(version: str) -> object:
    try:
        return parse_version(version)
    except ValueError:
        return version


def import_check(found: Installation, *, say: Callable[[str], None]) -> Check:
    """Import every package; `say` gets the name before each, because a broken one can end the process."""
    missing = [each.package for each in found.requirements if normal(each.package) not in found.installed]
    broken: list[tuple[Requirement, str]] = []
    for requirement in found.requirements:
        module = _MODULES.get(requirement.package, requirement.package.replace("-", "_").lower())
        say(f"while importing {module}")
        try:
            importlib.import_module(module)
        except _IMPORT_ERRORS as error:
            broken.append((requirement, one_line(f"{module} cannot be imported: {type(error).__name__}: {error}")))
    if not broken:
        return passed("imports", f"{len(found.requirements)} packages can be imported")
    options = [] if missing else ["--force-reinstall", "--no-deps"]
    return failed("imports", _some([text for _, text in broken]), _install(found, *options, *(each.typed for each, _ in broken)))


def _some(texts: list[str]) -> str:
    more = len(texts) - _MOST_SHOWN
    return "; ".join(texts[:_MOST_SHOWN]) + (f"; and {more} more" if more > 0 else "")
