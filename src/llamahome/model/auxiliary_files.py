"""Copy the files that belong to a base model, except its weights, into the folder of the saved model.

All files of the base's folder are copied (tokenizer, processor, templates, generation config, licence), except weights in any format,
files that saving writes (configs of model and adapter), model cards, pictures, data, code and hidden files. A subfolder is copied unless
it holds weights, because then it is the same model in another format. Symbolic links are followed, because a hub cache consists of links.
The target folder is skipped if it lies inside the base's folder.
"""

import logging
import os
import shutil
from pathlib import Path

_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".ckpt", ".onnx", ".onnx_data", ".gguf", ".ggml", ".ot", ".npz", ".npy"),
    *(".pkl", ".pickle", ".tflite", ".mlmodel", ".mlpackage", ".engine", ".pdparams", ".nemo", ".tar", ".zip", ".gz"),
)
_NOT_FOR_LOADING = (".md", ".rst", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".pdf", ".mp4", ".ipynb", ".py", ".pyc", ".sh", ".log")
_ROWS = (".jsonl", ".csv", ".tsv", ".parquet", ".arrow")
_WRITTEN_BY_SAVING = ("config.json", "adapter_config.json", "trainer_state.json", "MANIFEST.json")
_LARGEST = 256 * 2**20
"""Largest file that is copied, in bytes; tokenizers have up to 40 MB."""


def auxiliary_files(base: Path, folder: Path | None = None) -> list[Path]:
    """The auxiliary files in `base`, sorted and relative to it. `folder` is the target, which is skipped if it lies inside `base`."""
    target = folder.resolve() if folder is not None else None
    files: list[Path] = []
    for directory, subfolders, names in os.walk(base):
        current = Path(directory)
        holds_target = target is not None and current != base and current.resolve() in (target, *target.parents)
        if holds_target or (current != base and any(_is_weights(name) for name in names)):
            subfolders.clear()
            continue
        subfolders[:] = sorted(name for name in subfolders if not name.startswith((".", "__")))
        files += [(current / name).relative_to(base) for name in sorted(names) if _is_auxiliary(current / name, top=current == base)]
    return files


def copy_auxiliary_files(base: Path, folder: Path) -> None:
    """Copy the auxiliary files of `base` into `folder`.

    Call it after transformers has saved the model, because transformers writes its own versions of some of these files.
    """
    for name in auxiliary_files(base, folder):
        if (base / name).stat().st_size > _LARGEST:
            logging.getLogger(__name__).warning("%s is not saved with the model because it is larger than 256 MiB", base / name)
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base / name, folder / name)


def copy_both(base: Path, adapter: Path, folder: Path) -> Path:
    """Copy the auxiliary files of `base` and, in their place where both have one, those of `adapter` into `folder`; returns `folder`."""
    for source in (base, adapter):
        copy_auxiliary_files(source, folder)
    return folder


def _is_auxiliary(path: Path, *, top: bool) -> bool:
    name = path.name
    if name.startswith(".") or (top and name in _WRITTEN_BY_SAVING) or name.endswith(".index.json"):
        return False
    return path.is_file() and not _is_weights(name) and path.suffix.lower() not in (*_NOT_FOR_LOADING, *_ROWS)


def _is_weights(name: str) -> bool:
    return name.lower().endswith(_WEIGHTS)
