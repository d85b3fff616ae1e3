"""What belongs to a model beside its weights, and goes with it to wherever it is saved: by rule, not by list.

Everything in the base's folder comes along (tokenizer, processor, templates, generation config, licence) but weights in any form, what is
written anew (configs of model and adapter), model cards and pictures, rows of data, code, and hidden files. A folder inside comes along
unless it holds weights: then it is the model once more, in another form. Links are followed to their content, as a hub cache consists of
links. Nothing is taken from where the model is being saved, which may be a folder inside the base's.
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
_WRITTEN_ANEW = ("config.json", "adapter_config.json", "trainer_state.json", "MANIFEST.json")
_LARGEST = 256 * 2**20
"""Bytes of one file; tokenizers have up to 40 MB."""


def companions(base: Path, folder: Path | None = None) -> list[Path]:
    """The files that go along with the model in `base`, relative to it, in their order; `folder`, to where they go, may lie inside."""
    goal = folder.resolve() if folder is not None else None
    found: list[Path] = []
    for place, folders, names in os.walk(base):
        here = Path(place)
        inside = goal is not None and here != base and here.resolve() in (goal, *goal.parents)
        if inside or (here != base and any(_is_weights(name) for name in names)):
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        found += [(here / name).relative_to(base) for name in sorted(names) if _comes_along(here / name, top=here == base)]
    return found


def copy_companions(base: Path, folder: Path) -> None:
    """Copy them; last, for transformers would put its own reading of some in the place of the base's."""
    for name in companions(base, folder):
        if (base / name).stat().st_size > _LARGEST:
            logging.getLogger(__name__).warning("%s is not saved with the model: it has more than 256 MiB", base / name)
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base / name, folder / name)


def _comes_along(path: Path, *, top: bool) -> bool:
    name = path.name
    if name.startswith(".") or (top and name in _WRITTEN_ANEW) or name.endswith(".index.json"):
        return False
    return path.is_file() and not _is_weights(name) and path.suffix.lower() not in (*_NOT_FOR_LOADING, *_ROWS)


def _is_weights(name: str) -> bool:
    return name.lower().endswith(_WEIGHTS)
