"""A `llamahome serve` process that tests talk to."""

import http.client
import json
import re
import signal
import socket
import subprocess
import threading
from dataclasses import dataclass, field
from typing import Any

import openai
from tests.support.projects import Project


@dataclass
class Server:
    """A server process and what it has said."""

    process: subprocess.Popen
    url: str
    lines: list[str] = field(default_factory=list)
    reader: threading.Thread | None = None

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0, timeout=60, **options)

    def raw(self, request: bytes) -> tuple[int, bytes]:
        """Send bytes, read to the end; the status (0 for none) and the body."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(request)
            answer = http.client.HTTPResponse(connection)
            try:
                answer.begin()
                return answer.status, answer.read()
            except (http.client.HTTPException, ConnectionError):
                return 0, b""

    def post(self, body: Any, *, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, content, {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        found = answer.status, json.loads(answer.read())
        connection.close()
        return found

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        status = self.process.wait(timeout=60)
        self.reader.join(timeout=60)
        self.process.stdout.close()
        self.process.stderr.close()
        return status


def started(project: Project, *words: str) -> Server:
    process = project.start("serve", *words, "--port", "0")
    server = Server(process, "")

    def read() -> None:
        for line in process.stderr:
            server.lines.append(line.rstrip("\n"))

    server.reader = threading.Thread(target=read, daemon=True)
    server.reader.start()
    line = process.stdout.readline()
    assert re.fullmatch(r"listening on http://127\.0\.0\.1:\d+\n", line), (line, server.lines)
    server.url = line.split()[-1]
    return server
