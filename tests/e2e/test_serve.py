"""`llamahome serve` as a process: the openai client talks to it, hostile requests do no harm, and it ends cleanly."""

import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.e2e.test_readme import commands_of
from tests.support.models import save_tiny
from tests.support.projects import ROOT, Project, wait_until
from tests.support.servers import Server, started
from tests.support.tokenizers import save_tokenizer

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def home(make_project: Callable[[Path], Project], tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with a model that can write for hours."""
    project = make_project(tmp_path_factory.mktemp("serve") / "project")
    save_tiny(project.folder / "data/models/base/long", max_position_embeddings=10**6)
    return project


@pytest.fixture(scope="module")
def server(home: Project) -> Iterator[Server]:
    server = started(home, "long", "--queue", "1", "--max-new-tokens", "12")
    yield server
    if server.process.poll() is None:
        server.end(signal.SIGKILL)


def endless(server: Server) -> dict[str, Any]:
    """A request whose answer does not end by itself within any time that a test has."""
    for number in range(40):
        body = {"messages": [{"role": "user", "content": f"Numbers: {number}"}], "max_tokens": 400}
        if server.post(body)[1]["choices"][0]["finish_reason"] == "length":
            return {**body, "max_tokens": 10**9, "stream": True}
    raise AssertionError("every answer ends")


@pytest.mark.medium
def test_the_client_gets_what_chat_prints_whole_and_in_pieces(home: Project, server: Server) -> None:
    client = server.client()
    (model,) = client.models.list().data
    assert model.id == "long" and client.models.retrieve("long").id == "long"
    expected = home.type("chat", "long", "--prompt", QUESTION[0]["content"], "--max-new-tokens", "12", "--json").expect(0).json
    whole = client.chat.completions.create(model="long", messages=QUESTION)
    assert whole.choices[0].message.content == expected["answer"] and whole.choices[0].finish_reason == expected["finish_reason"]
    assert whole.usage.prompt_tokens == expected["prompt_tokens"] and whole.usage.completion_tokens == expected["completion_tokens"]
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    stream = client.chat.completions.create(model="long", messages=QUESTION, stream=True, stream_options={"include_usage": True})
    *pieces, last, usage = list(stream)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected["answer"]
    assert pieces[0].choices[0].delta.role == "assistant" and last.choices[0].finish_reason == expected["finish_reason"]
    assert usage.choices == [] and usage.usage.completion_tokens == expected["completion_tokens"]
    assert all(piece.choices[0].finish_reason is None and piece.usage is None for piece in pieces)
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]
    assert client.chat.completions.create(model="long", messages=parts).choices[0].message.content == expected["answer"]


def test_seeds_repeat_stop_strings_cut_and_lengths_are_kept(server: Server) -> None:
    client = server.client()

    def ask(**options: Any) -> Any:
        return client.chat.completions.create(model="long", messages=QUESTION, temperature=1.5, **options).choices[0]

    first, again, other = (ask(seed=seed).message.content for seed in (1, 1, 2))
    assert first == again != other
    stop = first[2:5]
    cut = ask(seed=1, stop=["never there", stop])
    assert cut.message.content == first[: first.find(stop)] and cut.finish_reason == "stop"
    streamed = client.chat.completions.create(model="long", messages=QUESTION, temperature=1.5, seed=1, stop=stop, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in streamed) == cut.message.content
    short = client.chat.completions.create(model="long", messages=QUESTION, temperature=1.5, seed=1, max_completion_tokens=3)
    assert short.usage.completion_tokens <= 3 and first.startswith(short.choices[0].message.content.rstrip("\ufffd"))
    text = client.completions.create(model="long", prompt="The cat sat", max_tokens=4)
    assert text.usage.completion_tokens <= 4 and text.choices[0].finish_reason in ("stop", "length")


def test_what_cannot_be_done_is_an_error_of_the_client(server: Server) -> None:
    client = server.client()
    with pytest.raises(openai.NotFoundError, match="long"):
        client.chat.completions.create(model="gpt-5", messages=QUESTION)
    for options in ({"n": 2}, {"tools": [{"type": "function", "function": {"name": "f"}}]}, {"response_format": {"type": "json_object"}}):
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="long", messages=QUESTION, **options)
        assert refused.value.param == next(iter(options))


JSON = "Content-Type: application/json\r\n"
HOST = "Host: 127.0.0.1:{port}\r\n"


def request(head: str, body: bytes = b"", *, length: bool = True) -> bytes:
    size = f"Content-Length: {len(body)}\r\n" if length else ""
    return f"{head}{size}\r\n".encode("latin-1") + body


CHAT = "POST /v1/chat/completions HTTP/1.1\r\n"
DEEP = b'{"messages": ' + b"[" * 100_000
HOSTILE: dict[str, tuple[int, bytes]] = {
    "foreign host": (403, request("GET /v1/models HTTP/1.1\r\nHost: evil.com\r\n")),
    "host without port": (403, request("GET /v1/models HTTP/1.1\r\nHost: localhost\r\n")),
    "host of rebinding": (403, request("GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1.evil.com:{port}\r\n")),
    "no host": (400, request("GET /v1/models HTTP/1.1\r\n")),
    "no host, old": (403, request("GET /v1/models HTTP/1.0\r\n")),
    "two hosts": (400, request(f"GET /v1/models HTTP/1.1\r\n{HOST}{HOST}")),
    "absolute target": (403, request("GET http://evil.com/v1/models HTTP/1.1\r\nHost: evil.com\r\n")),
    "foreign origin": (403, request(f"{CHAT}{HOST}{JSON}Origin: http://evil.com\r\n", b"{}")),
    "null origin": (403, request(f"{CHAT}{HOST}{JSON}Origin: null\r\n", b"{}")),
    "preflight": (403, request(f"OPTIONS /v1/chat/completions HTTP/1.1\r\n{HOST}Origin: http://evil.com\r\n")),
    "cross site": (403, request(f"GET /v1/models HTTP/1.1\r\n{HOST}Sec-Fetch-Site: cross-site\r\n")),
    "not http": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"),
    "garbage": (400, b"GET\r\n\r\n"),
    "huge header": (400, request(f"GET /v1/models HTTP/1.1\r\n{HOST}X: {'a' * 200_000}\r\n")),
    "traversal": (404, request(f"GET /../../etc/passwd HTTP/1.1\r\n{HOST}")),
    "encoded traversal": (404, request(f"GET /v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd HTTP/1.1\r\n{HOST}")),
    "control characters in the path": (404, request(f"GET /%1b[31m%0a%00 HTTP/1.1\r\n{HOST}")),
    "other method": (405, request(f"DELETE /v1/models HTTP/1.1\r\n{HOST}")),
    "trace": (405, request(f"TRACE / HTTP/1.1\r\n{HOST}")),
    "get chat": (405, request(f"GET /v1/chat/completions HTTP/1.1\r\n{HOST}")),
    "form": (415, request(f"{CHAT}{HOST}Content-Type: text/plain\r\n", b"{}")),
    "empty body": (400, request(f"{CHAT}{HOST}{JSON}")),
    "bad json": (400, request(f"{CHAT}{HOST}{JSON}", b"{")),
    "bad utf-8": (400, request(f"{CHAT}{HOST}{JSON}", b'{"messages": [{"role": "user", "content": "\xff"}]}')),
    "half a surrogate pair": (400, request(f"{CHAT}{HOST}{JSON}", b'{"messages": [{"role": "user", "content": "\\ud800"}]}')),
    "deep json": (400, request(f"{CHAT}{HOST}{JSON}", DEEP)),
    "deep and whole": (400, request(f"{CHAT}{HOST}{JSON}", DEEP + b"]" * 100_000 + b"}")),
    "nan": (400, request(f"{CHAT}{HOST}{JSON}", b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}')),
    "infinite": (400, request(f"{CHAT}{HOST}{JSON}", b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}')),
    "negative": (400, request(f"{CHAT}{HOST}{JSON}", b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": -1}')),
    "many digits": (400, request(f"{CHAT}{HOST}{JSON}", b'{"messages": [], "max_tokens": ' + b"9" * 10_000 + b"}")),
    "wrong types": (400, request(f"{CHAT}{HOST}{JSON}", b'{"messages": {"role": 5}, "model": []}')),
    "template code": (404, request(f"{CHAT}{HOST}{JSON}", b'{"model": "{{ 7*7 }}", "messages": [{"role": "user", "content": "a"}]}')),
    "told too large": (413, request(f"{CHAT}{HOST}{JSON}Content-Length: 99999999999999999999\r\n", length=False)),
    "too large in chunks": (
        413,
        request(f"{CHAT}{HOST}{JSON}Transfer-Encoding: chunked\r\n", b"500000\r\n" + b"a" * 0x500000 + b"\r\n0\r\n\r\n", length=False),
    ),
    "too large": (413, request(f"{CHAT}{HOST}{JSON}", b"a" * 0x900000)),
    "negative length": (400, request(f"{CHAT}{HOST}{JSON}Content-Length: -5\r\n", length=False)),
    "two lengths": (400, request(f"{CHAT}{HOST}{JSON}Content-Length: 1\r\nContent-Length: 2\r\n", b"{}", length=False)),
    "broken chunk": (400, request(f"{CHAT}{HOST}{JSON}Transfer-Encoding: chunked\r\n", b"zz\r\n", length=False)),
    "websocket": (404, request(f"GET /ws HTTP/1.1\r\n{HOST}Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n")),
    "too long for the model": (
        400,
        request(
            f"{CHAT}{HOST}{JSON}", json.dumps({"messages": [{"role": "user", "content": "漢🙂" * 350_000}]}, ensure_ascii=False).encode()
        ),
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_request_gets_its_error_in_json(server: Server, name: str) -> None:
    status, sent = HOSTILE[name]
    found, body = server.raw(sent.replace(b"{port}", str(server.port).encode()))
    assert found == status, body
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]


def test_after_all_of_them_the_server_answers_and_has_said_one_line_a_request(server: Server) -> None:
    assert server.client().chat.completions.create(model="long", messages=QUESTION).choices[0].finish_reason
    assert not [line for line in server.lines if "Traceback" in line or "\x1b" in line]
    logged = [line for line in server.lines if re.match(r"\d\d:\d\d:\d\d ", line)]
    assert all(re.fullmatch(r"[\d:]{8} [A-Z]+ \S+ (\d{3}|left) [\d.]+ s( \d+\+\d+ tokens \w+)?", line) for line in logged)
    assert not any("France" in line for line in server.lines), "no text of a request is logged"


def test_a_client_that_leaves_stops_its_answer_and_the_queue_has_an_end(server: Server) -> None:
    body = json.dumps(endless(server)).encode()
    head = f"{CHAT}{HOST}{JSON}".format(port=server.port)
    open_ones = []
    for _ in range(2):  # one runs, one waits
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
        connection.sendall(request(head, body))
        assert connection.recv(20).startswith(b"HTTP/1.1 200")
        open_ones.append(connection)
    with pytest.raises(openai.InternalServerError) as full:
        server.client().chat.completions.create(model="long", messages=QUESTION)
    assert full.value.status_code == 503 and int(full.value.response.headers["retry-after"]) > 0
    whole = socket.create_connection(("127.0.0.1", server.port), timeout=60)  # a request that is refused changes nothing for the others
    whole.close()
    for connection in open_ones:
        connection.close()

    def answered() -> bool:
        return server.post({"messages": QUESTION})[0] == 200

    wait_until(answered)


@pytest.mark.medium
def test_a_client_that_leaves_before_a_whole_answer_stops_it(server: Server) -> None:
    body = {**endless(server), "stream": False}
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    connection.sendall(request(f"{CHAT}{HOST}{JSON}".format(port=server.port), json.dumps(body).encode()))
    time.sleep(0.3)
    connection.close()
    wait_until(lambda: server.post({"messages": QUESTION})[0] == 200)


def test_a_port_in_use_and_a_host_without_a_key_are_refused_with_what_helps(home: Project, server: Server) -> None:
    taken = home.type("serve", "long", "--port", str(server.port)).expect(4)
    assert taken.codes == ["machine.port-taken"] and "another program" in taken.err
    free = int(re.fullmatch(r"--port (\d+)", taken.helps[0])[1])
    assert free != server.port
    open_to_all = home.type("serve", "long", "--host", "0.0.0.0", "--port", str(server.port)).expect(2)
    assert open_to_all.codes == ["usage.host-without-key"] and open_to_all.helps == ["--api-key KEY"]
    helped = home.type("serve", "long", "--host", "0.0.0.0", "--port", str(server.port), "--api-key", "KEY").expect(4)
    assert helped.codes == ["machine.port-taken"]


@pytest.mark.medium
def test_the_commands_and_the_script_of_the_page_are_right(home: Project, server: Server) -> None:
    page = ROOT / "docs/Chat.md"
    commands = [shlex.split(text)[1:] for text in commands_of(page) if text.startswith("llamahome serve")]
    for words in commands:  # up to the port, which is taken
        assert home.type(*words[:1], "long", *words[2:], "--port", str(server.port)).expect(4).codes == ["machine.port-taken"]
    assert len(commands) == 3
    script = re.search(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)[1]
    shown = subprocess.run(
        [sys.executable, "-c", script.replace("http://127.0.0.1:8000", server.url)], capture_output=True, text=True, timeout=120, check=True
    )
    assert shown.stdout and not shown.stderr


@pytest.mark.medium
def test_the_system_message_of_the_command_begins_conversations_that_bring_none(home: Project) -> None:
    words = ("--system", "You are Marvin.", "--max-new-tokens", "6")
    expected = home.type("chat", "long", *words, "--prompt", QUESTION[0]["content"], "--json").expect(0)
    server = started(home, "long", *words)
    own = [{"role": "system", "content": "Short."}, *QUESTION]
    plain = server.post({"messages": QUESTION})[1]
    assert plain["choices"][0]["message"]["content"] == expected.json["answer"]
    assert plain["usage"]["prompt_tokens"] == expected.json["prompt_tokens"]
    assert server.post({"messages": own})[1]["usage"]["prompt_tokens"] < plain["usage"]["prompt_tokens"]
    assert server.end() == 0


@pytest.mark.slow
def test_a_model_without_a_template_completes_text_and_says_why_it_does_not_chat(home: Project) -> None:
    plain = save_tiny(home.folder / "data/models/base/plain")
    save_tokenizer(plain, vocabulary=320, template=None)
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    server = started(home, "plain", "--api-key", "secret")
    assert server.post({"messages": QUESTION})[0] == 401
    key = {"Authorization": "Bearer secret"}
    status, body = server.post({"messages": QUESTION}, **key)
    assert status == 400 and "model.chat_template" in body["error"]["message"]
    assert server.post({"prompt": "The cat", "max_tokens": 3}, path="/v1/completions", **key)[0] == 200
    assert server.end() == 0


@pytest.mark.slow
def test_a_connection_without_headers_is_closed(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: ")
        assert connection.recv(1) == b""


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT])
def test_a_signal_ends_the_server_with_status_0_also_in_the_middle_of_an_answer(home: Project, server: Server, number: int) -> None:
    """The last test of this file: SIGINT ends the server of the others."""
    server = started(home, "long") if number == signal.SIGTERM else server
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(request(f"{CHAT}{HOST}{JSON}".format(port=server.port), json.dumps(endless(server)).encode()))
        assert connection.recv(20).startswith(b"HTTP/1.1 200")
        assert server.end(number) == 0
        rest = b"".join(iter(lambda: connection.recv(65536), b""))
        assert b'"code": "stopping"' in rest
    assert not any("Traceback" in line for line in server.lines)
    assert any("vllm serve data/models/base/long" in line for line in server.lines), "it says what to take for others"
