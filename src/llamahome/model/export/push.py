"""Uploads an export to a hub under the user's own login. Only what `--push` names is written, private unless `--public` is typed.

Source: huggingface_hub, the client of the hub; HF_ENDPOINT names another hub.
"""

import os
from pathlib import Path

from llamahome.errors import ConfigError, MachineError, Problem

PUSHABLE = ("adapter", "merged", "gguf")
"""Forms that a hub takes."""


def require_login(hub_id: str, to: str) -> None:
    """ConfigError unless an export in the form `to` could be pushed as `hub_id`: the id has a form, and there is a login. Asks no hub."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    if to not in PUSHABLE:
        message = f"a hub takes exports in the forms {', '.join(PUSHABLE)}"
        raise ConfigError(Problem(code="export.push-refused", message=message, where="--push", hint="--to gguf"))
    try:
        validate_repo_id(hub_id)
    except HFValidationError as error:
        message = f"{hub_id!r} is no id of a hub, like org/name"
        raise ConfigError(Problem(code="export.push-refused", message=message, where="--push")) from error
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "ON", "YES"):
        raise ConfigError(Problem(code="export.push-refused", message="HF_HUB_OFFLINE is set", where="--push", hint="unset HF_HUB_OFFLINE"))
    if get_token() is None:
        message = "there is no login for the hub"
        raise ConfigError(Problem(code="export.push-refused", message=message, where="--push", hint="hf auth login, or set HF_TOKEN"))


def push(folder: Path, hub_id: str, *, public: bool) -> str:
    """Upload the files of `folder` to the repository `hub_id`, which is made if need be; returns its address. Raises MachineError."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    hub = HfApi()
    try:
        address = hub.create_repo(hub_id, private=not public, exist_ok=True)
        if not public and hub.model_info(hub_id).private is False:
            message = f"{hub_id} is there already, and everybody can read it"
            raise MachineError(_failed(message, folder, hint="--public with --push, if the export may be read by everybody"))
        hub.upload_folder(repo_id=hub_id, folder_path=folder, commit_message="Export with llamahome")
    except (OSError, ValueError, RuntimeError, httpx.HTTPError) as error:
        raise MachineError(_failed(f"{hub_id} was not written: {_reason(error)}", folder)) from error
    return str(address)


def _reason(error: Exception) -> str:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    known = {401: "the hub does not accept the login", 403: "the login may not write there", 404: "the hub does not know it"}
    if status in known:
        return f"{known[status]} (HTTP {status})"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _failed(message: str, folder: Path, *, hint: str | None = None) -> Problem:
    return Problem(code="export.push-failed", message=f"{message}; the export stays", where=str(folder), hint=hint)
