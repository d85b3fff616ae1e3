"""A help line with a command or an option is typed as it stands, and the error that it belongs to is gone.

Help lines of files of rows are typed in test_help_lines.py.
"""

import json
import random
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.support.families import family_model
from tests.support.hints import codes_with_commands
from tests.support.models import VOCABULARY, save_tiny
from tests.support.projects import Project, chats, pairs, sentence, write_rows
from tests.support.tokenizers import save_tokenizer
from transformers import AutoTokenizer

COLUMNS = ("--set", "data.columns={prompt: question, completion: answer}", "--set", "data.format=messages")
TRAIN = ("train", "chats.jsonl", "--max-steps", "1")
TEACH = ("data", "teach", "chats.jsonl", "--teacher", "tiny", "--top-k", "4")
SWEEP = ("sweep", "chats.jsonl", "--max-steps", "1", "--dry-run")


@dataclass(frozen=True)
class Fault:
    """What is typed, and what is prepared before."""

    code: str
    words: tuple[str, ...]
    prepare: Callable[[Path], Any] = lambda folder: None
    slow: bool = False
    """Whether it makes the sample data or plans a large model."""


def model_below(*without: str) -> Callable[[Path], Any]:
    def prepare(folder: Path) -> None:
        shutil.copytree(folder / "data/models/base/tiny", folder / "mine/inner")
        for name in ("config.json", "tokenizer.json"):
            if name not in without:
                shutil.copy(folder / "mine/inner" / name, folder / "mine" / name)

    return prepare


def text(name: str, content: str) -> Callable[[Path], Any]:
    def prepare(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)

    return prepare


def _mixed(folder: Path) -> None:
    write_rows(folder / "rows.jsonl", [*chats(6), *({"prompt": f"{n}", "completion": "b"} for n in range(6))])


def _broken(folder: Path) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats(6)) + '{"messages": [\n')


def _pairs(folder: Path) -> None:
    write_rows(folder / "rows.jsonl", pairs(12))


def _short(folder: Path) -> None:
    write_rows(folder / "long.jsonl", [{"prompt": "a", "completion": "b " * 200}] * 8)


def _bias(folder: Path) -> None:
    """A head with a bias, and a tokenizer with more tokens than it has rows."""
    shutil.rmtree(folder / "data/models/base/tiny")
    base = save_tiny(folder / "data/models/base/tiny", "phi")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<new{number}>" for number in range(VOCABULARY + 3 - len(tokenizer))])
    tokenizer.save_pretrained(base)


def _short_teacher(folder: Path) -> None:
    """A model with fewer positions than the longest row has tokens, and a student with more."""
    save_tiny(folder / "data/models/base/short", "gpt2", max_position_embeddings=64)


def _renamed(folder: Path) -> None:
    """A model whose weights transformers renames while loading."""
    base = folder / "data/models/base/tiny"
    shutil.rmtree(base)
    family_model("inkling2_text", vocab_size=VOCABULARY).save_pretrained(base)
    save_tokenizer(base, vocabulary=VOCABULARY)


def _two_to_train(folder: Path) -> None:
    for name in ("train_sft", "train_gen"):
        write_rows(folder / f"folder/data/{name}-00000-of-00001.jsonl", chats(6))


def _subsets(folder: Path) -> None:
    for subset in ("one", "two"):
        for name in ("train", "test"):
            write_rows(folder / f"folder/{subset}/{name}.jsonl", chats(6, seed=len(subset + name)))


def _questions(folder: Path) -> None:
    write_rows(folder / "rows.jsonl", [{**row, "question": f"{n}?", "answer": f"{n}"} for n, row in enumerate(chats(6))])


def _split(folder: Path) -> None:
    for name in ("train", "test"):
        write_rows(folder / f"folder/{name}.jsonl", chats(6))


def _texts(folder: Path) -> None:
    write_rows(folder / "rows.jsonl", ({"text": f"{sentence(random.Random(number))} {number}"} for number in range(20)))


LOUD = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content if m.role == 'user' else m.content ~ ' ###' }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Writes something of its own after an answer."""
SHARDED_ADAFACTOR = ("--set", "distributed.strategy=shard", "--set", "training.optimizer=adafactor")
FAULTS = (
    Fault("model.not-found", (*TRAIN, "--model", "tinny")),
    Fault("model.no-config", (*TRAIN, "--model", "mine"), model_below("config.json")),
    Fault("model.no-weights", (*TRAIN, "--model", "mine"), model_below()),
    Fault("model.no-config", ("plan", "--simulate", "--world-size", "8", "--model", "llama-3-8c"), slow=True),
    Fault("model.unknown-token", (*TRAIN, "--set", "model.eos_token=<|im_en|>")),
    Fault("model.bad-new-token", (*TRAIN, "--set", "model.new_tokens=tokns.txt"), text("tokens.txt", "<new>")),
    Fault("model.bad-chat-template", (*TRAIN, "--set", "model.chat_template=mne.jinja"), text("mine.jinja", "{{ messages }}")),
    Fault("model.backend-missing", (*TRAIN, "--set", "model.backend=cuda")),
    Fault("model.nothing-to-quantize", (*TRAIN, "--set", "model.quantization=nf4")),
    Fault("config.quantized-full", (*TRAIN, "--model", "tiny", "--set", "model.quantization=nf4", "--method", "full")),
    Fault("config.quantized-sharded", (*TRAIN, "--set", "model.quantization=nf4", "--set", "distributed.strategy=shard")),
    Fault("lora.no-such-module", (*TRAIN, "--set", "lora.target_modules=[q_porj]")),
    Fault("lora.no-initial-values", (*TRAIN, "--set", "lora.init=eva", "--set", "lora.rank=24")),
    Fault("lora.no-such-layer", (*TRAIN, "--set", "lora.layers=[0-9]")),
    Fault("lora.rows-twice", (*TRAIN, "--set", "model.new_tokens=[<new>]", "--set", "lora.modules_to_save=[lm_head]")),
    Fault("config.muon-needs-full", (*TRAIN, "--set", "training.optimizer=muon")),
    Fault("config.optimizer-needs-whole-weights", (*TRAIN, "--method", "full", *SHARDED_ADAFACTOR)),
    Fault("training.no-such-precision", (*TRAIN, "--set", "training.mixed_precision=fp16")),
    Fault("training.nothing-to-compile", (*TRAIN, "--set", "model.backend=reference", "--set", "training.compile=true")),
    Fault("data.no-targets", (*TRAIN, "--set", "data.max_length=16")),
    Fault("data.overlong", ("train", "long.jsonl", "--set", "data.max_length=50", "--set", "data.on_overlong=error"), _short),
    Fault("data.bad-rows", ("train", "rows.jsonl", "--set", "data.eval_split=0"), _broken),
    Fault("data.mixed-formats", ("train", "rows.jsonl"), _mixed),
    Fault("data.empty-folder", ("train", "raw", "--max-steps", "1"), lambda folder: (folder / "raw").mkdir(), slow=True),
    Fault("data.no-labels", (*TRAIN, "--set", "training.objective=kto")),
    Fault("data.no-pairs", (*TRAIN, "--set", "training.objective=dpo")),
    Fault("data.preference", ("train", "rows.jsonl", "--max-steps", "1"), _pairs),
    Fault("config.eval-of-pairs", ("train-eval", "tiny", "rows.jsonl", "--set", "training.objective=dpo"), _pairs),
    Fault("config.eval-of-pairs", ("train-eval", "tiny", "rows.jsonl"), _pairs),
    Fault("config.eval-of-pairs", ("train-eval", "tiny", "chats.jsonl", "--set", "training.objective=dpo")),
    Fault("data.mixture-empty", (*TRAIN, "--set", "data.mixture={chats.jsonl: 0}")),
    Fault("data.unknown-split", ("train", "folder", "--max-steps", "1", "--set", "data.split=trian"), _split),
    Fault("data.several-splits", ("train", "folder", "--max-steps", "1"), _two_to_train),
    Fault("data.several-subsets", ("train", "folder", "--max-steps", "1"), _subsets),
    Fault("data.unknown-subset", ("train", "folder", "--max-steps", "1", "--set", "data.subset=oen"), _subsets),
    Fault("data.unread-column", ("train", "rows.jsonl", "--max-steps", "1", *COLUMNS), _questions),
    Fault("model.cannot-grow", (*TRAIN, "--set", "model.resize_embeddings=true"), _bias),
    Fault("lora.not-loadable", (*TRAIN, "--set", "lora.target_modules=[weight_proj]"), _renamed),
    Fault("evaluation.no-prompts", ("train", "rows.jsonl", "--max-steps", "1", "--set", "evaluation.metric=f1"), _texts),
    Fault("data.mask-unproved", (*TRAIN, "--set", "model.chat_template=loud.jinja"), text("loud.jinja", LOUD)),
    Fault("config.bad-assignment", (*TRAIN, "--set", "training.epochs")),
    Fault("config.unknown-key", (*TRAIN, "--set", "training.epcohs=1")),
    Fault("config.file-exists", ("config", "init")),
    Fault("usage.file-exists", ("data", "sample", "chats.jsonl"), slow=True),
    Fault("usage.missing-option", ("data", "check", "chats.jsonl", "--dry-run")),
    Fault("usage.plan-simulates", ("plan",)),
    Fault("usage.plan-simulates", ("plan", "chats.jsonl", "--simulate", "--world-size", "8")),
    Fault("export.exists", ("export", "tiny", "--to", "merged", "--output", "data")),
    Fault("export.no-adapter", ("export", "tiny", "--to", "adapter", "--output", "out")),
    Fault("export.unknown-quant", ("export", "tiny", "--to", "merged", "--quant", "q4_0", "--output", "out")),
    Fault("sweep.key-twice", (*SWEEP, "--set", "lora.rank=2", "--set", "lora.rank=4")),
    Fault("sweep.nothing-held-out", (*SWEEP, "--set", "lora.rank=2,4", "--set", "data.eval_split=0")),
    Fault("sweep.one-run", (*SWEEP, "--set", "lora.rank=2")),
    Fault("sweep.value-twice", (*SWEEP, "--set", "training.learning_rate=1e-4,0.0001,1e-3")),
    Fault("output.not-a-folder", (*TRAIN, "--output", "chats.jsonl")),
    Fault("config.teach-needs-answers", (*TEACH, "--output", "taught", "--set", "training.objective=dpo")),
    Fault("data.teacher-folder-used", (*TEACH, "--output", "taught"), text("taught/mine.txt", "mine")),
    Fault("model.teacher-too-short", (*TEACH, "--teacher", "short", "--output", "taught"), _short_teacher),
)
_REASONS = {
    "needs machines, processes or GPUs that are not here": (
        "distributed.bad-environment distributed.cannot-shard distributed.contact-lost distributed.machines-not-met "
        "distributed.more-processes-than-gpus distributed.no-meeting-place distributed.node-rank-too-large distributed.node-rank-twice "
        "distributed.port-taken distributed.process-killed distributed.ranks-differ distributed.ranks-missing "
        "distributed.world-size-not-divisible data.worker-failed machine.process-lost training.out-of-memory training.hung "
        "distributed.crash-loop distributed.overtaken checkpoint.ranks-differ"
    ),
    "names another model, which is a download, or a path of the user's": (
        "model.hub-failed model.pickled-weights model.unreadable model.unsupported model.unplannable machine.download-failed machine.no-pip"
    ),
    "would write outside of the folder of the test": "machine.output-not-writable machine.cannot-write",
    "names a command that needs a run, or needs one that ends faster than it can be killed": (
        "run.stopped checkpoint.newer-schema model.is-an-adapter model.not-here model.adapter-differs "
        "model.not-trainable-adapter training.reference-lost training.optimizer-differs training.objective-differs checkpoint.base-changed "
        "sweep.losses-differ training.weights-differ checkpoint.not-killed"
    ),
    "typed in test_limits, test_learning, test_model_causes, test_bad_input, test_quantization and test_vera": (
        "model.tokenizer-too-large model.base-gone lora.not-plain lora.not-vera data.no-chat-template data.too-much-lost "
        "model.quantized-twice lora.whole-quantized evaluation.no-answers"
    ),
    "of files of rows, typed in test_help_lines.py and test_wrong_archives.py": (
        "data.bad-json data.bad-json-array data.columns data.empty-file data.other-kind data.unclear-columns "
        "data.unknown-format data.whole-table data.bad-gzip data.bad-zst"
    ),
    "typed in test_sweep.py": "sweep.not-a-sweep sweep.other-data sweep.other-settings",
    "typed in test_answers.py": "evaluation.answers-ending evaluation.answers-exist evaluation.unknown-metric",
    "needs a full disk or too small a memory": (
        "evaluation.out-of-memory training.rollout-out-of-memory training.row-too-long checkpoint.write-failed model.quantized-not-written "
        "model.larger-than-memory training.no-room-to-offload training.offload-failed machine.model-not-writable"
    ),
    "names the user's": "data.bad-teacher data.not-taught data.missing-key data.turn-left-out model.other-tokenizer model.incomplete",
    "of a warning, typed below, and typed in test_data_modes.py": "data.byte-order-mark data.store-unwritable",
    "needs a repository with a server": "data.lfs-pointer",
    "needs a model that GGUF, Ollama or float16 cannot hold; what they say is shown in tests/model/export and test_export.py": (
        "export.differs export.out-of-range export.unsupported export.unsupported-tokenizer export.untranslated-template"
    ),
    "of exports, typed in test_export_use.py": ("export.push-refused export.unused-option export.write-failed"),
    "tells to mend a line by hand, or to name a file": "config.no-such-file config.not-text config.unreadable usage.fix-in-place",
    "typed in test_serve.py, where a server listens": "machine.port-taken usage.host-without-key",
    "shows what there is to choose from": "usage.bad-choice usage.command-line usage.no-such-row",
}
NOT_TYPED = {code: reason for reason, codes in _REASONS.items() for code in codes.split()}
"""Codes whose help lines are not typed here, and why."""


def in_help(line: str) -> list[str] | None:
    """The words of a help line that are typed: a whole command, or the options to add; None where it holds neither."""
    first = line.split("   ")[0]
    if first.startswith("llamahome "):
        return shlex.split(first.split(", ")[0])
    for way in re.split(r"[,;] or ", first):
        options = re.findall(r"--[a-z][a-z-]*(?: (?:'[^']*'|[^\s,;-](?:[^\s,;]|,(?=\S))*))?", way)
        if options:
            return [word for option in options for word in shlex.split(option)]
    return None


def without(words: tuple[str, ...], options: list[str]) -> list[str]:
    """What was typed without what the options replace."""
    kept, number = [], 0
    while number < len(words):
        option, value = words[number], words[number + 1] if number + 1 < len(words) else ""
        again = option.startswith("--") and option in options
        if again and option == "--set":
            keys = [word.partition("=")[0] for word in options]
            again = value.partition("=")[0] in keys
        number += (2 if value in words[number + 1 :] and not value.startswith("--") else 1) if again else 0
        if not again:
            kept.append(option)
            number += 1
    return kept


@pytest.mark.parametrize(
    "fault",
    [pytest.param(each, id=f"{each.code} {each.words[0]}", marks=pytest.mark.slow if each.slow else pytest.mark.medium) for each in FAULTS],
)
def test_what_a_help_line_says_mends_the_fault_when_it_is_typed(project: Project, fault: Fault) -> None:
    fault.prepare(project.folder)
    answer = project.type(*fault.words)
    assert fault.code in answer.codes, answer.err
    typed = next(found for line in answer.helps if (found := in_help(line)) is not None)
    if typed[0] == "llamahome":
        then = project.type(*typed[1:])
        assert fault.code not in then.codes, then.err
        assert then.status == 0 or then.codes, then.err
        if fault.code.startswith("data."):
            then = project.type(*fault.words)
    else:
        then = project.type(*without(fault.words, typed), *typed)
    assert fault.code not in then.codes, (typed, then.err)
    assert "usage.command-line" not in then.codes and "Traceback" not in then.err, (typed, then.err)


def test_the_copy_that_the_help_of_a_byte_order_mark_writes_has_none(project: Project) -> None:
    rows = (project.folder / "chats.jsonl").read_bytes()
    (project.folder / "marked.jsonl").write_bytes(b"\xef\xbb\xbf" + rows)
    words = ("data", "check", "marked.jsonl", "--no-tokens")
    answer = project.type(*words).expect(0)
    assert "warning[data.byte-order-mark]" in answer.err
    typed = [found for line in answer.helps if (found := in_help(line)) is not None]
    for number, more in enumerate(typed):
        then = project.type(*(more[1:] if more[0] == "llamahome" else (*words, *more))).expect(0)
        copy = project.folder / more[more.index("--fix") + 1]
        assert copy.read_bytes() == rows, (number, then.err)
        assert "byte-order-mark" not in project.type("data", "check", copy.name, "--no-tokens").expect(0).err
    assert typed


def test_every_help_line_with_a_command_is_typed_or_listed_with_the_reason_why_not() -> None:
    typed = {fault.code for fault in FAULTS}
    assert codes_with_commands() - typed - NOT_TYPED.keys() == set()
    assert NOT_TYPED.keys() & typed == set() and NOT_TYPED.keys() <= codes_with_commands()
