"""The auxiliary files that are saved with a model: all files of the base except weights, replaced files and code."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.models import our_model, save_tiny
from tests.support.tokenizers import save_tokenizer
from transformers import AutoTokenizer, GenerationConfig

from llamahome.config.schema import LoraConfig
from llamahome.data.text.tokens import load_tokenizer
from llamahome.model import auxiliary_files as module
from llamahome.model.adapter import save_model
from llamahome.model.auxiliary_files import auxiliary_files, copy_auxiliary_files
from llamahome.model.lora import add_lora

_COMES = (
    *(
        "tokenizer.json",
        "vocab.txt",
        "spiece.model",
        "tekken.json",
        "chat_template.json",
        "chat_template.jinja",
        "preprocessor_config.json",
    ),
    *("additional_chat_templates/tools.jinja", "LICENSE", "merges.txt", "a/b/c.json", "sentencepiece.bpe.model", "unheard-of.thing"),
)
_STAYS = (
    *("model.safetensors", "pytorch_model.bin", "tf_model.h5", "model.gguf", "model.safetensors.index.json", "config.json", "README.md"),
    *("onnx/model.onnx", "original/consolidated.00.pth", ".gitattributes", ".cache/x.json"),
    *("modeling_x.py", "__pycache__/x.pyc", "adapter_config.json", "figure.png", "MODEL.SAFETENSORS"),
)


def written(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name, encoding="utf-8")
    return folder


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(comes=st.sets(st.sampled_from(_COMES)), stays=st.sets(st.sampled_from(_STAYS)))
def test_all_files_except_weights_code_and_replaced_files_are_copied(
    tmp_path_factory: pytest.TempPathFactory, comes: set[str], stays: set[str]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    base, saved = written(folder / "base", sorted(comes | stays)), folder / "saved"
    base.mkdir(exist_ok=True)
    saved.mkdir()
    copy_auxiliary_files(base, saved)
    found = {path.relative_to(saved).as_posix(): path.read_text() for path in saved.rglob("*") if path.is_file()}
    assert found == {name: name for name in comes}


def test_a_subfolder_with_weights_is_not_copied(tmp_path: Path) -> None:
    written(tmp_path, ["onnx/model.onnx", "onnx/config.json", "onnx/more/x.json", "original/params.json", "original/a.pth", "tools/x.json"])
    assert auxiliary_files(tmp_path) == [Path("tools/x.json")]


def test_symbolic_links_of_a_hub_cache_are_copied_as_files(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/1f").write_text("{}")
    snapshot = tmp_path / "snapshots/main"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").symlink_to("../../blobs/1f")
    (snapshot / "gone.json").symlink_to("../../blobs/gone")
    saved = tmp_path / "saved"
    saved.mkdir()
    copy_auxiliary_files(snapshot, saved)
    assert [path.name for path in saved.iterdir()] == ["tokenizer.json"]
    assert not (saved / "tokenizer.json").is_symlink() and (saved / "tokenizer.json").read_text() == "{}"


def test_a_file_that_is_too_large_is_not_copied_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base, saved = written(tmp_path / "base", ["tokenizer.json", "large.data"]), tmp_path / "saved"
    saved.mkdir()
    with (base / "large.data").open("wb") as file:
        file.truncate(module._LARGEST + 1)
    copy_auxiliary_files(base, saved)
    assert [path.name for path in saved.iterdir()] == ["tokenizer.json"] and "large.data" in caplog.text


def test_no_auxiliary_file_is_listed_twice(tmp_path: Path) -> None:
    base = written(tmp_path, [*_COMES, *_STAYS])
    assert sorted(set(auxiliary_files(base))) == sorted(auxiliary_files(base)) == sorted(Path(name) for name in _COMES)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_saved_model_has_the_tokens_template_and_end_tokens_of_its_base(tmp_path: Path, method: str, adds_bos: bool) -> None:
    base = save_tokenizer(save_tiny(tmp_path / "base"), vocabulary=320, adds_bos=adds_bos)
    GenerationConfig(eos_token_id=[2, 0], pad_token_id=3).save_pretrained(base)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates/tools.jinja").write_text("{{ messages[0].content }} with tools")
    model = our_model(base)
    if method == "lora":
        model = add_lora(model, LoraConfig(rank=2), base=str(base), seed=0, lean=False)
    save_model(model, tmp_path / "saved", base=base)
    theirs, ours = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs.chat_template == ours.chat_template and "tools" in ours.chat_template
    assert theirs("Hello <|im_end|> Paris").input_ids == ours("Hello <|im_end|> Paris").input_ids
    assert theirs.special_tokens_map == ours.special_tokens_map
    assert GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id == [2, 0]
    assert load_tokenizer(tmp_path / "saved").end_ids == load_tokenizer(base).end_ids
    assert (tmp_path / "saved/config.json").exists() == (method == "full")


def test_a_run_inside_its_base_folder_copies_neither_itself_nor_data(tmp_path: Path) -> None:
    written(tmp_path, ["tokenizer.json", "model.safetensors", "rows.jsonl", "rows.csv", "out/config.yaml", "out/logs/metrics.json"])
    copy_auxiliary_files(tmp_path, tmp_path / "out/final")
    assert [path.name for path in (tmp_path / "out/final").rglob("*")] == ["tokenizer.json"]
