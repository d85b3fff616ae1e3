"""The folder that the hub's cache keeps for a repository, `models--org--name` or `datasets--org--name`: snapshots/, refs/, blobs/.

Source: huggingface_hub's guide to its cache. A ref is a file with the commit of a branch, and each commit has a folder under snapshots/.
"""

from pathlib import Path


def snapshot_in(folder: Path) -> Path | None:
    """The snapshot that such a folder means: of the branch `main`, else the newest; None if `folder` is none."""
    if "--" not in folder.name or not (folder / "snapshots").is_dir():
        return None
    snapshots = [path for path in sorted((folder / "snapshots").iterdir()) if path.is_dir()]
    try:
        main = folder / "snapshots" / (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        main = None
    return main if main in snapshots else max(snapshots, key=lambda path: path.stat().st_mtime_ns, default=None)
