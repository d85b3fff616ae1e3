"""The judge of DESIGN.md and STYLE.md: layers, borders of libraries, caps, names, safety. It only reads the source text."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.support.sources import PACKAGE, ROOT, SOURCES, WRITTEN, assert_none, imports, nodes, room, source, within

FLOORS = (
    {"durable", "errors", "hub_cache", "lfs", "units", "logs", "progress_marks", "redaction", "rundir", "known_runs", "signals"},
    {"config"},
    {"distributed", "web"},
    {"data", "model", "checkpoint", "monitoring"},
    {"training"},
    {
        "pipeline",
        "assembly",
        "resolve",
        "streamed",
        "recording",
        "reference_values",
        "data_limits",
        "initial_values",
        "saving",
        "resuming",
        "rollback",
        "conversation",
        "system_message",
        "objective_rows",
        "stages",
        "teaching",
        "sample_size",
        "export",
        "exported_model",
        "verify_resume",
        "starting_adapter",
        "copied_run",
        "run_folder",
        "run_rows",
        "pass_memory",
        "final_model",
        "comparison",
        "measuring",
        "evaluation_report",
        "answers_file",
        "lm_eval_tasks",
        "public",
        "session",
    },
    {"planning", "doctor", "serving", "sweep", "dashboard"},
    {"cli"},
    {"__main__"},
)
"""An import points to a lower floor. Rooms of one floor do not know each other, but the single files of floors 0 and 5 may."""
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}
OPEN_FLOORS = (0, 5)

BORDERS = {
    "transformers": r"data/text/tokens|model/(load|shard_load|skeleton|starter|export/\w+|generate|attention|backends/cpu/fuse)",
    "peft": r"model/(lora|lora_eva|lora_init|lora_layers|lora_vera|adapter)",
    "ruamel": r"config/\w+",
    "yaml": r"nowhere",
    "torch.utils.tensorboard": r"monitoring/sinks",
    "tensorboard": r"monitoring/(sinks|tensorboard_pages)",
    "torch.distributed": r"distributed/\w+|model/(place|shard|shard_load)|checkpoint/store",
    "click": r"cli/\w+",
    "starlette": r"dashboard/\w+|serving/\w+",
    "uvicorn": r"web/listen",
    "psutil": r"monitoring/\w+|planning/\w+|model/\w+|distributed/(connect|movement)",
    "gguf": r"model/(starter|export/\w+)",
    "py3langid": r"data/checks/answer_quality",
    "matplotlib": r"data/checks/stats|monitoring/charts/png",
    "pyarrow": r"data/files/(columnar|spool)",
    "datasets": r"data/files/hub",
    "trackio": r"monitoring/tracker_process",
    "wandb": r"monitoring/tracker_process",
    "mlflow": r"monitoring/tracker_process",
    "lm_eval": r"lm_eval_tasks",
}
"""Which files may import a foreign library: attention registers its function with transformers and fuse compares with its code."""
FOREIGN_TYPES = ("transformers.PreTrainedModel", "peft.PeftModel")
"""What the files of model/ hand to each other; knowing the type is not knowing the library."""
UNSAFE_MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "shelve", "yaml", "runpy"}
UNSAFE_CALLS = {
    *("torch.load", "torch.save", "np.load", "numpy.load", "yaml.load", "eval", "exec", "compile", "__import__"),
    *("os.system", "os.popen"),
}
UNSAFE_ARGUMENTS = {("trust_remote_code", "True"), ("weights_only", "False"), ("allow_pickle", "True"), ("shell", "True")}
BANNED_WORDS = {"utils", "util", "helpers", "helper", "common", "misc", "core", "base", "manager", "handler", "engine"}
BANNED_IN_NAMES = BANNED_WORDS - {"base", "core", "common"}
"""`base` is a word of this project (the model before training); as the name of a file it says nothing."""


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method of a file."""
    return (node for node in nodes(path) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_every_room_has_a_floor() -> None:
    assert {room(name) for name in SOURCES} - {"__init__"} <= set(FLOOR)


def test_an_import_points_down_and_rooms_of_one_floor_do_not_know_each_other() -> None:
    wrong = []
    for name in SOURCES:
        if name == "__init__.py":
            continue
        here = FLOOR[room(name)]
        for line, module in imports(name):
            if not within(module, "llamahome") or module.removeprefix("llamahome").lstrip(".") in ("", "__version__"):
                continue
            target = module.split(".")[1]
            if target == room(name) or FLOOR[target] < here or (FLOOR[target] == here and here in OPEN_FLOORS):
                continue
            wrong.append(f"{name}:{line} imports {module}")
    assert_none(wrong)


def test_foreign_libraries_stay_within_their_borders() -> None:
    wrong = []
    for name in SOURCES:
        for line, module in imports(name):
            for library, allowed in BORDERS.items():
                own_type = room(name) == "model" and module in FOREIGN_TYPES
                if within(module, library) and not own_type and not re.fullmatch(f"(?:{allowed})\\.py", name):
                    wrong.append(f"{name}:{line} imports {module}")
    assert_none(wrong)


def test_the_lowest_floor_needs_only_python_settings_no_torch_and_the_loop_only_torch() -> None:
    wrong = []
    for name in SOURCES:
        for line, module in imports(name):
            top = module.split(".")[0]
            plain = top in sys.stdlib_module_names or top == "llamahome"
            low = FLOOR.get(room(name)) == 0 or name == "__init__.py"
            if (
                (low and not plain)
                or (room(name) == "config" and top == "torch")
                or (room(name) == "training" and not plain and top != "torch")
            ):
                wrong.append(f"{name}:{line} imports {module}")
    assert_none(wrong)


def test_the_command_line_answers_without_torch() -> None:
    wrong = []
    for name in SOURCES:
        if room(name) in ("cli", "__main__", "config"):
            top_level = [node for node in source(name).body if isinstance(node, ast.Import | ast.ImportFrom)]
            text = "\n".join(ast.unparse(node) for node in top_level)
            wrong += [
                f"{name}: {line}"
                for line in text.splitlines()
                if re.search(r"\b(torch|transformers|peft|numpy)\b", line)
                or re.search(r"llamahome\.(pipeline|assembly|resolve|saving|conversation|training|model|data)\b", line)
            ]
    assert_none(wrong)


def test_files_and_functions_are_short_and_take_few_parameters() -> None:
    wrong = []
    for path in WRITTEN:
        shown = path.relative_to(ROOT).as_posix()
        lines = path.read_text(encoding="utf-8").count("\n")
        if lines > 300:
            wrong.append(f"{shown}: {lines} lines")
        for function in functions(path):
            length = (function.end_lineno or function.lineno) - function.lineno + 1
            arguments = function.args
            every = arguments.posonlyargs + arguments.args + arguments.kwonlyargs
            taken = sum(argument.arg not in ("self", "cls") for argument in every)
            if length > 60:
                wrong.append(f"{shown}:{function.lineno} {function.name}: {length} lines")
            # The parameters of a command are the options that people type, and those of a test are its fixtures.
            if taken > 8 and not shown.startswith(("src/llamahome/cli/", "tests/")):
                wrong.append(f"{shown}:{function.lineno} {function.name}: {taken} parameters")
    assert_none(wrong)


def test_names_say_something() -> None:
    wrong = [
        path.relative_to(ROOT)
        for path in WRITTEN
        if BANNED_WORDS & set(re.split(r"[_/]", path.relative_to(ROOT).with_suffix("").as_posix()))
    ]
    for path in WRITTEN:
        for node in nodes(path):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                words = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", node.name)}
                if words & BANNED_IN_NAMES:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert_none(wrong)


def test_a_package_holds_only_a_docstring() -> None:
    for name in SOURCES:
        if name.endswith("/__init__.py"):
            body = source(name).body
            assert len(body) == 1 and ast.get_docstring(source(name)), name


def test_nothing_is_printed_swallowed_unpickled_or_run_from_afar() -> None:
    wrong = []
    for name in SOURCES:
        for node in nodes(PACKAGE / name):
            if found := _unsafe(name, node):
                wrong.append(f"{name}:{getattr(node, 'lineno', 0)} {found}")
        wrong += [f"{name}:{line} imports {module}" for line, module in imports(name) if module.split(".")[0] in UNSAFE_MODULES]
    assert_none(wrong)


def _unsafe(name: str, node: ast.AST) -> str | None:
    if isinstance(node, ast.ExceptHandler) and name not in ("monitoring/sinks.py", "training/metric_file.py"):
        caught = ast.unparse(node.type) if node.type else "everything"
        if isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None:  # tidies up and lets it pass
            return None
        return f"catches {caught}" if caught == "everything" or re.search(r"\b(Base)?Exception\b", caught) else None
    if isinstance(node, ast.Call):
        called = ast.unparse(node.func)
        if called == "print" and room(name) != "cli" and name != "monitoring/progress.py":
            return "prints"
        if called in UNSAFE_CALLS:
            return f"calls {called}"
        for keyword in node.keywords:
            if (keyword.arg, ast.unparse(keyword.value)) in UNSAFE_ARGUMENTS:
                return f"passes {keyword.arg}={ast.unparse(keyword.value)}"
    return None


def test_only_back_ends_launching_and_settings_know_devices_by_name() -> None:
    """What differs by device is a question to the back end; settings may name one, launching gives each process its own, doctor reports."""
    wrong = []
    for name in SOURCES:
        if name.startswith(("model/backends/", "distributed/", "config/", "doctor/")):
            continue
        for number, line in enumerate((ROOT / "src/llamahome" / name).read_text(encoding="utf-8").splitlines(), 1):
            if re.search(r"(?i)cuda|\bavx|\bmps\b|\bkernels?\b", line):
                wrong.append(f"{name}:{number} {line.strip()}")
    assert_none(wrong)


def test_settings_are_changed_in_few_places() -> None:
    """`auto` becomes a value in resolve.py alone; the others fit rows to a base, take an adapter's settings, or change unused ones."""
    allowed = {"resolve.py", "data_limits.py", "pipeline.py", "planning/simulate.py", "run_folder.py", "starting_adapter.py", "teaching.py"}
    calls = {
        name for name in SOURCES for node in nodes(PACKAGE / name) if isinstance(node, ast.Call) and ast.unparse(node.func) == "with_values"
    }
    assert calls == allowed


def test_nothing_is_left_for_later() -> None:
    wrong = []
    for path in WRITTEN:
        if path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if re.search(r"\b(TODO|FIXME|XXX|NotImplementedError)\b", line):
                wrong.append(f"{path.relative_to(ROOT)}:{number} {line.strip()}")
    assert_none(wrong)


def test_no_test_sets_a_private_constant() -> None:
    """What a test needs otherwise is an argument, or a public constant."""
    wrong = []
    for path in WRITTEN:
        if not path.is_relative_to(ROOT / "tests"):
            continue
        for node in nodes(path):
            called = isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("setattr", "patch", "patch.object"))
            set_here = isinstance(node, ast.Assign) and any(isinstance(each, ast.Attribute) for each in node.targets)
            names = [str(each.value) for each in node.args if isinstance(each, ast.Constant)] if called else []
            names += [each.attr for each in node.targets if isinstance(each, ast.Attribute)] if set_here else []
            if any(re.fullmatch(r"(.*\.)?_[A-Z][A-Z0-9_]+", name) for name in names):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}")
    assert_none(wrong)
