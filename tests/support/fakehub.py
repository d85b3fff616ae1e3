"""A hub on loopback that takes pushes: what huggingface_hub asks of one to make a repository and to commit files to it."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class FakeHub:
    """The repositories of a hub."""

    address: str = ""
    token: str = "hf_right"
    repositories: dict[str, bool] = field(default_factory=dict)
    """Name -> whether it is private."""
    files: dict[str, bytes] = field(default_factory=dict)
    fail_commits: bool = False


class Requests(BaseHTTPRequestHandler):
    """What the hub answers."""

    hub: FakeHub

    def log_message(self, *_: object) -> None:
        return None

    def body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, status: int, content: object) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def refused(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {self.hub.token}":
            return False
        self.body()
        self.answer(401, {"error": "Invalid credentials in Authorization header"})
        return True

    def do_GET(self) -> None:
        name = "/".join(self.path.split("?")[0].split("/")[3:5])
        if self.refused():
            return
        if name in self.hub.repositories:
            self.answer(200, {"id": name, "private": self.hub.repositories[name], "siblings": [], "tags": [], "sha": "0" * 40})
        else:
            self.answer(404, {"error": "Repository not found"})

    def do_POST(self) -> None:
        if self.refused():
            return
        body = self.body()
        path = self.path.split("?")[0]
        repository = "/".join(path.split("/")[3:5])
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"someone/{asked['name']}"
            known = name in self.hub.repositories
            self.hub.repositories.setdefault(name, bool(asked.get("private", asked.get("visibility") == "private")))
            self.answer(409 if known else 200, {"url": f"{self.hub.address}/{name}"})
        elif path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in path:
            asked = json.loads(body)
            files = [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in asked["files"]]
            self.answer(200, {"files": files})
        elif "/commit/" in path and self.hub.fail_commits:
            self.answer(403, {"error": "Forbidden"})
        elif "/commit/" in path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.hub.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.answer(
                200,
                {
                    "commitUrl": f"{self.hub.address}/{repository}/commit/1",
                    "commitOid": "1" * 40,
                    "success": True,
                },
            )
        else:
            self.answer(404, {"error": f"{path} is not here"})


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub that listens until the context ends."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("RequestsHere", (Requests,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
