"""`llamahome chat`: commands, comparison and JSON through a pipe; columns, Ctrl-C and Ctrl-D on a real terminal."""

import fcntl
import json
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.e2e.test_readme import commands_of
from tests.support.models import save_tiny
from tests.support.projects import ROOT, Project
from tests.support.tokenizers import CHATML, save_tokenizer

SHORT = ("--max-new-tokens", "6")


@pytest.fixture(scope="module")
def trained(make_project: Callable[[Path], Project], tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = make_project(tmp_path_factory.mktemp("chat") / "project")
    project.type("train", "chats.jsonl", "--max-steps", "3", "--set", "training.learning_rate=0.05").expect(0)
    return project


def one(project: Project, model: str, *words: str) -> dict:
    return project.type("chat", model, "--prompt", "hello there", "--json", *SHORT, *words).expect(0).json


def test_one_object_of_json_holds_the_last_answer_and_all_turns(trained: Project) -> None:
    found = trained.type("chat", "latest", "--prompt", "hello", "--prompt", "how are you", "--json", *SHORT).expect(0).json
    assert [turn["prompt"] for turn in found["turns"]] == ["hello", "how are you"]
    assert {name: found[name] for name in found["turns"][-1]} == found["turns"][-1] and found["model"] == "latest"
    assert found["finish_reason"] in ("stop", "length") and found["completion_tokens"] <= 6 < found["prompt_tokens"]
    printed = trained.type("chat", "latest", "--prompt", "hello", "--prompt", "how are you", *SHORT).expect(0).out
    assert printed == "".join(turn["answer"] + "\n" for turn in found["turns"])
    assert trained.type("chat", "latest", "--json").expect(2).codes == ["usage.missing-option"]


def test_a_comparison_shows_what_each_model_answers_alone(trained: Project) -> None:
    alone, base = one(trained, "latest")["answer"], one(trained, "tiny")["answer"]
    assert alone != base
    beside = one(trained, "latest", "--compare", "tiny")
    assert (beside["answer"], beside["compare"]["answer"], beside["compare"]["model"]) == (alone, base, "tiny")
    again = one(trained, "tiny", "--compare", "latest")
    assert (again["answer"], again["compare"]["answer"]) == (base, alone)
    nobody = trained.type("chat", "latest", "--prompt", "hello", "--compare", "nobody").expect(2)
    assert nobody.codes == ["model.not-found"] and "--compare: " in nobody.err
    shown = trained.type("chat", "latest", "--prompt", "hello there", "--compare", "tiny", *SHORT).expect(0).out
    assert shown == f"--- tiny ---\n{base}\n--- latest ---\n{alone}\n"


def test_the_second_turn_of_a_comparison_goes_on_from_each_models_own_answer(trained: Project) -> None:
    words = ("--prompt", "hello", "--prompt", "and you?", "--json", *SHORT)
    both = trained.type("chat", "latest", "--compare", "tiny", *words).expect(0).json
    assert both["answer"] == trained.type("chat", "latest", *words).expect(0).json["answer"]
    assert both["compare"]["answer"] == trained.type("chat", "tiny", *words).expect(0).json["answer"]


def test_a_seed_draws_the_same_answer_again(trained: Project) -> None:
    drawn = [
        one(trained, "tiny", "--temperature", "2", *words)["answer"] for words in (("--seed", "1"), ("--seed", "1"), ("--seed", "2"), ())
    ]
    assert drawn[0] == drawn[1] and len(set(drawn)) == 3
    assert one(trained, "tiny", "--temperature", "2", "--top-k", "1")["answer"] == one(trained, "tiny")["answer"]
    idle = trained.type("chat", "tiny", "--prompt", "hello", "--top-p", "0.5", *SHORT).expect(0)
    assert "--top-p: no effect at --temperature 0" in idle.err


@pytest.mark.parametrize(
    "words", [("--temperature", "nan"), ("--temperature", "inf"), ("--top-p", "1.5"), ("--top-k", "-1"), ("--repetition-penalty", "0")]
)
def test_an_option_out_of_range_is_refused(trained: Project, words: tuple[str, str]) -> None:
    answer = trained.type("chat", "tiny", "--prompt", "a", *words).expect(2)
    assert answer.codes == ["usage.command-line"] and words[0] in answer.err


def typed(project: Project, model: str, *lines: str, words: tuple[str, ...] = ()) -> tuple[list[str], str]:
    """What is printed for these lines, and the notes."""
    answer = project.type("chat", model, *SHORT, *words, stdin="".join(line + "\n" for line in lines)).expect(0)
    assert "\x1b" not in answer.out + answer.err and "\r" not in answer.out
    return answer.out.splitlines(), answer.err


def answers(project: Project, model: str, *questions: str, system: str | None = None) -> list[str]:
    words = [word for question in questions for word in ("--prompt", question)]
    found = project.type("chat", model, "--json", *SHORT, *words, *(["--system", system] if system else [])).expect(0).json
    return [line for turn in found["turns"] for line in (turn["answer"] + "\n").splitlines()]


@pytest.mark.medium
def test_undo_clear_and_system_change_what_the_model_is_asked(trained: Project) -> None:
    hello, other = answers(trained, "latest", "hello"), answers(trained, "latest", "the cat")
    assert typed(trained, "latest", "hello", "/undo", "the cat")[0] == hello + other
    assert typed(trained, "latest", "hello", "/clear", "the cat")[0] == hello + other
    assert typed(trained, "latest", "hello", "the cat")[0] == answers(trained, "latest", "hello", "the cat") != hello + other
    cat = answers(trained, "latest", "hello", system="You are a cat.")
    assert typed(trained, "latest", "/system You are a cat.", "hello", "/system", "/clear", "the cat")[0] == cat + other
    assert typed(trained, "latest", "hello", "/exit", "the cat")[0] == hello
    assert "no question to forget" in typed(trained, "latest", "/undo")[1]


@pytest.mark.medium
def test_an_unknown_command_is_named_with_the_nearest_and_paths_are_questions(trained: Project) -> None:
    out, err = typed(trained, "latest", "/udno", "/SAVE", "/xyzzy")
    assert out == [] and "/udno: /undo is the nearest" in err and "/SAVE: /save is the nearest" in err and "/xyzzy: the commands are" in err
    assert typed(trained, "latest", "/etc/hosts is what")[0] == answers(trained, "latest", "/etc/hosts is what")
    assert typed(trained, "latest", "//undo")[0] == answers(trained, "latest", "/undo")
    assert all(name in typed(trained, "latest", "/help")[1] for name in ("/undo", "/save", "/system", "/clear", "/exit"))


def test_a_saved_conversation_is_data_that_trains_and_nothing_is_overwritten(trained: Project) -> None:
    system, asked = ("--system", "Be brief."), [f"hello {number}" for number in range(20)]
    brief = (*system, "--max-new-tokens", "2")

    def answer(question: str) -> str:
        return trained.type("chat", "tiny", "--prompt", question, "--json", *brief).expect(0).json["answer"]

    clean = next(question for question in asked if (text := answer(question)).strip() and "<|" not in text and text.isprintable())
    lines = (
        "/save early.jsonl",
        clean,
        "/save talk.txt",
        "/save 'my talk.jsonl'",
        "/save 'my talk.jsonl'",
        "/save",
        "/save no/where.jsonl",
    )
    _, err = typed(trained, "tiny", *lines, words=brief)
    codes = re.findall(r"^error\[([^\]]+)\]: ([^:]+):", err, flags=re.MULTILINE)
    assert codes == [("usage.not-saved", name) for name in ("early.jsonl", "talk.txt", "my talk.jsonl", "no/where.jsonl")]
    saved = trained.folder / "my talk.jsonl"
    (row,) = (json.loads(line) for line in saved.read_text().splitlines())
    assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant"]
    assert row["messages"][1]["content"] == clean and "saved in my talk.jsonl: one row of 3 messages" in err
    trained.type("data", "check", str(saved.name)).expect(0)
    trained.type("train", saved.name, "--max-steps", "1", "--set", "data.eval_split=0", "--output", "out-of-chat").expect(0)


def test_a_template_that_refuses_a_system_message_says_so_and_the_chat_goes_on(trained: Project) -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML
    folder = save_tiny(trained.folder / "data/models/base/refusing")
    save_tokenizer(folder, vocabulary=320, template=refusing)
    out, err = typed(trained, "refusing", "/system Be brief.", "hello")
    assert "no system here" in err and out == answers(trained, "refusing", "hello")
    early = trained.type("chat", "refusing", "--system", "Be brief.", "--prompt", "hello").expect(3)
    assert early.codes == ["data.template-refused"] and early.out == ""


def test_a_conversation_that_is_too_long_is_refused_and_no_turn_is_dropped(trained: Project) -> None:
    save_tiny(trained.folder / "data/models/base/positions", "gpt2", max_position_embeddings=160)
    out, err = typed(trained, "positions", "hello", "the cat " * 90, "hello there")
    assert "error[model.too-long]" in err and "160 positions" in err
    assert out == answers(trained, "positions", "hello", "hello there")
    save_tiny(trained.folder / "data/models/base/rotary", max_position_embeddings=48)
    _, err = typed(trained, "rotary", "the cat sat on the mat " * 12)
    assert "was trained on at most 48" in err


PASTING = r"\x1b\[\?2004[hl]"
"""What readline writes around a line to tell the terminal whether pasted text is marked."""


class Terminal:
    """A command on a pseudo-terminal."""

    def __init__(self, project: Project, *words: str, columns: int = 100) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "llamahome", *words],
            cwd=project.folder,
            env={**environment, "OMP_NUM_THREADS": "1", "TERM": "xterm"},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        os.set_blocking(self._master, False)
        self.text, self._waited = "", 0

    def wait_for(self, pattern: str, *, seconds: float = 120) -> str:
        """Everything shown since the last wait, up to this pattern."""
        deadline, begun = time.monotonic() + seconds, self._waited
        while not (found := re.search(pattern, self.text[begun:])):
            assert time.monotonic() < deadline, self.text
            try:
                self.text += os.read(self._master, 65536).decode("utf-8", "replace")
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:  # its end
                assert re.search(pattern, self.text[begun:]), self.text
        self._waited = begun + found.end()
        return self.text[begun : self._waited]

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def rest(self) -> str:
        """Everything up to the end of the command."""
        os.set_blocking(self._master, True)
        parts = []
        try:
            while part := os.read(self._master, 65536):
                parts.append(part)
        except OSError:  # how Linux tells that nobody writes any more
            assert self.end() == 0
        return b"".join(parts).decode("utf-8", "replace")

    def end(self) -> int:
        status = self._process.wait(timeout=60)
        os.close(self._master)
        return status


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_not_the_chat_and_ctrl_d_leaves(trained: Project) -> None:
    save_tiny(trained.folder / "data/models/base/long", max_position_embeddings=10**6)
    terminal = Terminal(trained, "chat", "long", "--max-new-tokens", "100000", "--temperature", "5", "--top-p", "0.3", "--seed", "4")
    terminal.wait_for("you> ")
    for number in range(8):  # an answer that ends by itself before Ctrl-C leaves it to the next prompt
        terminal.type(f"hello {number}\n")
        terminal.wait_for(rf"hello {number}\s(?:\s|{PASTING})*[^\s\x1b]")  # the answer has begun
        terminal.type("\x03")
        if "stopped" in terminal.wait_for("(stopped; /undo|exit leaves)"):
            break
    else:
        raise AssertionError("no answer was stopped")
    terminal.wait_for("you> ")
    terminal.type("/undo\n")
    terminal.wait_for("forgotten: hello")
    terminal.type("\x03")
    terminal.wait_for("Ctrl-D or /exit leaves")
    terminal.type("\x04")
    assert terminal.end() == 0


@pytest.mark.slow
@pytest.mark.parametrize("columns", [100, 50])
def test_a_comparison_stands_in_columns_where_there_is_room(trained: Project, columns: int) -> None:
    terminal = Terminal(trained, "chat", "latest", "--compare", "tiny", "--prompt", "hello there", *SHORT, columns=columns)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.rest())
    assert bool(re.search(r"tiny {10,}latest", shown)) == (columns == 100), shown
    assert ("--- tiny ---" in shown) == (columns == 50), shown


def test_ctrl_c_in_one_question_leaves(trained: Project) -> None:
    answer = trained.type("chat", "tiny", "--prompt", "hello", at=[("llamahome.conversation:generate", 1, ["SIGINT"])])
    assert answer.status == 128 + signal.SIGINT and "Traceback" not in answer.err


COMMANDS = [text for text in commands_of(ROOT / "docs/Chat.md") if text.startswith("llamahome chat")]


@pytest.mark.parametrize("text", COMMANDS)
def test_the_commands_of_the_page_run(trained: Project, text: str) -> None:
    command, _, source = text.partition("#")[0].strip().partition(" < ")
    words = ["tiny" if word == "smollm2-135m-instruct" else word for word in shlex.split(command)[1:]]
    answer = trained.type(*words, *SHORT, stdin="hello\n" if source or "--prompt" not in words else "").expect(0)
    assert answer.out and len(COMMANDS) == 6
