"""Tells models and adapters apart by their files."""

import hashlib
from pathlib import Path

_SAMPLE = 1 << 20
"""Bytes per sample of a weights file in `fingerprint`."""


def fingerprint(folder: Path) -> str:
    """SHA-256 of a model: its config, and the name, the size and three samples of 1 MiB (start, middle, end) of each weights file.

    Of a PEFT folder, whose files are small, all bytes of the adapter's config and weights; not of its base.
    """
    if (folder / "adapter_config.json").is_file():
        digest = hashlib.sha256()
        for path in sorted(folder.glob("adapter_*")):
            digest.update(f"{path.name}:{path.stat().st_size}:".encode() + path.read_bytes())
        return digest.hexdigest()
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            for start in sorted({0, max(0, size // 2 - _SAMPLE // 2), max(0, size - _SAMPLE)}):
                file.seek(start)
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()
