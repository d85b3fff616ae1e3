"""Finds the cause of a failed installation in the output of pip, and a remedy. Pure: text in, Problem out.

pip tries several registries several times, so a warning need not be the cause: causes are checked from the most to the least certain. A
full disk and a missing compiler are explicit. A package is missing only if pip gave up no connection.
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
    """The facts on which a remedy depends."""

    python: str
    """Like "3.11"."""
    platform: str
    """Like "linux x86_64"."""
    tool: str | None = None
    """The package manager of the system: apt-get, dnf or brew; None without one of them."""


def diagnose(output: str, machine: Machine) -> Problem:
    """Return the cause of a failed installation, with the line of `output` that shows it."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if line := _last(_DISK_FULL, lines):
        return _problem("machine.disk-full", "no space left for the installation", line, _free_space())
    if line := _last(_NO_PIP, lines):
        message = f"Python {machine.python} is installed without the modules that create virtual environments"
        return _problem("machine.no-venv", message, line, _get_venv(machine))
    if line := _last(_NOT_WRITABLE, lines):
        hint = "copy the project into a folder of your own, or change the owner of this one: sudo chown -R $(id -un) . && make setup"
        return _problem("machine.folder-not-writable", "the installation cannot write its files", line, hint)
    failed_build = _last(_BUILD_FAILED, lines)
    no_binary = f"{_first_group(_BUILD_FAILED, failed_build)} has no binary package for Python {machine.python} on {machine.platform}"
    if line := _last(_NO_COMPILER, lines):
        message = f"{no_binary}, and there is no compiler to build one"
        return _problem("machine.no-compiler", message, line, _get_compiler(machine, rust="Rust" in line))
    if failed_build:
        hint = "use a Python with more binary packages, such as make setup PYTHON=python3.12; all output: .venv/install.log"
        return _problem("machine.build-failed", f"{no_binary}, and building it failed", _last(_BUILD_ERROR, lines) or failed_build, hint)
    missing, network = _last(_NOT_FOUND, lines), _last(_NETWORK, lines)
    if network and (missing is None or _last(_GIVEN_UP, lines)):
        return _problem(
            "machine.download-failed", f"packages could not be downloaded from {_host(network, lines)}", network, _reconnect(network)
        )
    if missing:
        name = _first_group(_NOT_FOUND, missing)
        message = f"the package registry has no {name} for Python {machine.python} on {machine.platform}"
        newest = next((line for line in reversed(lines) if "from versions:" in line), missing)
        bare = re.split(r"[=<>!~;\[ ]", name)[0]
        return _problem(
            "machine.package-not-found", message, newest, f".venv/bin/pip index versions {bare}; pip config list names the registry"
        )
    last_error = next((line for line in reversed(lines) if line.lower().startswith("error")), lines[-1] if lines else "pip said nothing")
    return _problem("machine.install-failed", "the installation failed", last_error, "all output: .venv/install.log")


def _last(pattern: re.Pattern[str], lines: list[str]) -> str | None:
    return next((line for line in reversed(lines) if pattern.search(line)), None)


def _first_group(pattern: re.Pattern[str], line: str | None) -> str:
    match = pattern.search(line or "")
    return next((word for word in match.groups() if word), "a package") if match else "a package"


def _problem(code: str, message: str, line: str, hint: str) -> Problem:
    excerpt = _LOGIN.sub("", line)
    return Problem(code=code, message=message, excerpt=excerpt if len(excerpt) <= _WIDTH else "..." + excerpt[3 - _WIDTH :], hint=hint)


def _host(line: str, lines: list[str]) -> str:
    match = next((host for text in (line, *reversed(lines)) if (host := _HOST.search(text))), None)
    return (match[1] or match[2]) if match else "the package registry"


def _free_space() -> str:
    return (
        "free disk space (df -h . /tmp), or use another disk for .venv (ln -s DIR .venv) or downloads (export TMPDIR=DIR); then make setup"
    )


def _get_venv(machine: Machine) -> str:
    if machine.tool == "apt-get":
        return f"sudo apt-get install python{machine.python}-venv, then make setup"
    return "use a complete Python, such as make setup PYTHON=/path/to/python3.12"


def _get_compiler(machine: Machine, *, rust: bool) -> str:
    if rust:
        commands = {"apt-get": "sudo apt-get install cargo", "dnf": "sudo dnf install cargo", "brew": "brew install rust"}
        return f"{commands.get(machine.tool or '', 'install Rust')}, then make setup"
    commands = {
        "apt-get": f"sudo apt-get install build-essential python{machine.python}-dev",
        "dnf": f"sudo dnf install gcc gcc-c++ python{machine.python}-devel",
        "brew": "xcode-select --install",
    }
    return f"{commands.get(machine.tool or '', 'install a C compiler and the headers of Python')}, then make setup"


def _reconnect(line: str) -> str:
    if _CERTIFICATE.search(line):
        return "pip config set global.cert FILE with the certificate of your network, then make setup"
    if _REFUSED.search(line):
        return "pip config list shows the registry and proxy in use: correct the login there, then make setup"
    return "make setup again when the network is back; behind a proxy export HTTPS_PROXY=URL; a mirror: pip config set global.index-url URL"
