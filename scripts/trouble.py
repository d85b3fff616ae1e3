"""Finds out from the output of pip why an installation failed, and what mends it. Pure: text in, Problem out.

pip tries several registries and several times, so a warning is no verdict: causes are looked for from the most to the least
certain. A full disk and a missing compiler name themselves; a package counts as missing only when no connection was given up.
"""

import re
from dataclasses import dataclass

from llamahome.errors import Problem

_DISK_FULL = re.compile(r"No space left on device|\[Errno 28\]|Disk quota exceeded|\[Errno 122\]")
_NOT_WRITABLE = re.compile(r"\[Errno (?:13|17|20|21|30)\]|Permission denied|Read-only file system")
_NO_PIP = re.compile(r"ensurepip is not|No module named '?(?:ensurepip|venv)\b")
_NO_COMPILER = re.compile(
    r"command '[^']*(?:gcc|g\+\+|cc|c\+\+|clang)' failed: No such file"
    r"|command '[^']*(?:gcc|g\+\+|cc|c\+\+|clang)' failed: None"
    r"|unable to execute '[^']*(?:gcc|g\+\+|cc|c\+\+|clang)'"
    r"|No such file or directory: '[^']*(?:gcc|g\+\+|cc|c\+\+|clang)'"
    r"|No CMAKE_C(?:XX)?_COMPILER could be found|CMAKE_C(?:XX)?_COMPILER not set"
    r"|Unknown compiler\(s\)|Python\.h: No such file|invalid active developer path"
    r"|can't find Rust compiler|Cargo, the Rust package manager, is not installed"
)
_BUILD_FAILED = re.compile(r"Failed building wheel for (\S+)|Failed to build '?([\w.-]+)|Preparing metadata .* did not run successfully")
_BUILD_ERROR = re.compile(r"^(?:\w*Error:|.*: (?:fatal )?error:|error: (?!subprocess-exited))")
_NETWORK = re.compile(
    r"Failed to establish a new connection|Temporary failure in name resolution|Name or service not known|NameResolutionError"
    r"|nodename nor servname|Max retries exceeded|Connection refused|Connection reset|Connection aborted|RemoteDisconnected"
    r"|Network is unreachable|No route to host|[Rr]ead timed out|ReadTimeoutError|ConnectTimeoutError|IncompleteRead|ProxyError"
    r"|SSLError|CERTIFICATE_VERIFY_FAILED|HTTP error \d{3}|HTTPError: \d{3}|\d{3} (?:Client|Server) Error"
    r"|DO NOT MATCH THE HASHES|incomplete-download"
)
_NOT_FOUND = re.compile(r"No matching distribution found for (\S+)|Could not find a version that satisfies the requirement (\S+)")
_GIVEN_UP = re.compile(r"Retry\(total=0|Max retries exceeded|HTTP error \d{3}|\d{3} (?:Client|Server) Error|SSLError|from versions: none")
_CERTIFICATE = re.compile(r"CERTIFICATE_VERIFY_FAILED|SSLError")
_REFUSED = re.compile(r"HTTP error (?:401|403|407)|HTTPError: (?:401|403|407)|(?:401|403|407) Client Error|ProxyError")
_HOST = re.compile(r"host='([^']+)'|https?://(?:[^/@\s]*@)?([A-Za-z0-9.-]+)")
_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")
_WIDTH = 200


@dataclass(frozen=True)
class Machine:
    """What the advice depends on."""

    python: str
    """Like "3.11"."""
    platform: str
    """Like "linux x86_64"."""
    tool: str | None = None
    """The package manager of the system: apt-get, dnf, brew or none of them."""


def explain(output: str, machine: Machine) -> Problem:
    """The one problem behind a failed installation, with the line of `output` that decided it."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if found := _last(_DISK_FULL, lines):
        return _problem("machine.disk-full", "no space left for the installation", found, _make_room())
    if found := _last(_NO_PIP, lines):
        message = f"Python {machine.python} is installed without the parts that make virtual environments"
        return _problem("machine.no-venv", message, found, _get_venv(machine))
    if found := _last(_NOT_WRITABLE, lines):
        hint = "a copy of the project in a folder of your own; or take this one over: sudo chown -R $(id -un) . && make setup"
        return _problem("machine.folder-not-writable", "the installation cannot write its files", found, hint)
    built = _last(_BUILD_FAILED, lines)
    unbuilt = f"{_first_group(_BUILD_FAILED, built)} has no ready-made build for Python {machine.python} on {machine.platform}"
    if found := _last(_NO_COMPILER, lines):
        message = f"{unbuilt}, and there is no compiler to make one"
        return _problem("machine.no-compiler", message, found, _get_compiler(machine, rust="Rust" in found))
    if built:
        hint = "a Python with more ready-made packages, as in make setup PYTHON=python3.12; all output: .venv/install.log"
        return _problem("machine.build-failed", f"{unbuilt}, and building it failed", _last(_BUILD_ERROR, lines) or built, hint)
    missing, network = _last(_NOT_FOUND, lines), _last(_NETWORK, lines)
    if network and (missing is None or _last(_GIVEN_UP, lines)):
        return _problem(
            "machine.download-failed", f"packages could not be fetched from {_host(network, lines)}", network, _reconnect(network)
        )
    if missing:
        name = _first_group(_NOT_FOUND, missing)
        message = f"the package registry has no {name} for Python {machine.python} on {machine.platform}"
        newest = next((line for line in reversed(lines) if "from versions:" in line), missing)
        bare = re.split(r"[=<>!~;\[ ]", name)[0]
        return _problem(
            "machine.package-not-found", message, newest, f".venv/bin/pip index versions {bare}; pip config list names the registry"
        )
    decisive = next((line for line in reversed(lines) if line.lower().startswith("error")), lines[-1] if lines else "pip said nothing")
    return _problem("machine.install-failed", "the installation failed", decisive, "all output: .venv/install.log")


def _last(pattern: re.Pattern[str], lines: list[str]) -> str | None:
    return next((line for line in reversed(lines) if pattern.search(line)), None)


def _first_group(pattern: re.Pattern[str], line: str | None) -> str:
    match = pattern.search(line or "")
    return next((word for word in match.groups() if word), "a package") if match else "a package"


def _problem(code: str, message: str, line: str, hint: str) -> Problem:
    shown = _LOGIN.sub("", line)
    return Problem(code=code, message=message, excerpt=shown if len(shown) <= _WIDTH else "..." + shown[3 - _WIDTH :], hint=hint)


def _host(line: str, lines: list[str]) -> str:
    match = next((found for text in (line, *reversed(lines)) if (found := _HOST.search(text))), None)
    return (match[1] or match[2]) if match else "the package registry"


def _make_room() -> str:
    return "make room (df -h . /tmp), or put .venv on another disk (ln -s DIR .venv) or the downloads (export TMPDIR=DIR); then make setup"


def _get_venv(machine: Machine) -> str:
    if machine.tool == "apt-get":
        return f"sudo apt-get install python{machine.python}-venv, then make setup"
    return "a complete Python, as in make setup PYTHON=/path/to/python3.12"


def _get_compiler(machine: Machine, *, rust: bool) -> str:
    if rust:
        named = {"apt-get": "sudo apt-get install cargo", "dnf": "sudo dnf install cargo", "brew": "brew install rust"}
        return f"{named.get(machine.tool or '', 'install Rust')}, then make setup"
    named = {
        "apt-get": f"sudo apt-get install build-essential python{machine.python}-dev",
        "dnf": f"sudo dnf install gcc gcc-c++ python{machine.python}-devel",
        "brew": "xcode-select --install",
    }
    return f"{named.get(machine.tool or '', 'install a C compiler and the headers of Python')}, then make setup"


def _reconnect(line: str) -> str:
    if _CERTIFICATE.search(line):
        return "pip config set global.cert FILE with the certificate of your network, then make setup"
    if _REFUSED.search(line):
        return "pip config list shows the registry and proxy in use: mend the login there, then make setup"
    return "make setup again when the network is back; behind a proxy export HTTPS_PROXY=URL; a mirror: pip config set global.index-url URL"
