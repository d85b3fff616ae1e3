"""Starting trainings from the page: who may, what a form may hold, and that a signal reaches only a process that the page started."""

import json
import os
import re
import socket
from collections.abc import Iterator
from html import escape, unescape
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest
from tests.support.dashboards import RUN_ID, Dashboard, started, write_data, write_run
from tests.support.projects import wait_until

from llamahome.dashboard.uploads import MOST_BYTES

TOKEN = "a-token-of-some-length"
FORM = {"data": "chats.jsonl", "model": "smollm2-135m-instruct", "method": "lora", "do": "check"}
TYPE = {"Content_Type": "application/x-www-form-urlencoded"}
MODELS = ["smollm2-135m-instruct"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("starting") / "home"
    write_run(home, state="stopped")
    write_data(home, RUN_ID)
    write_run(home, "20261122-090000-other", state="finished")
    (home.parent / "secret.jsonl").write_text('{"text": "a secret"}\n')
    return home


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[Dashboard]:
    with started(home, "--allow-start", "--token", TOKEN) as server:
        yield server


def post(server: Dashboard, path: str, body: bytes | dict[str, str] = b"", **headers: str) -> tuple[int, dict[str, str], str]:
    """A POST as a page of the server sends it, unless `headers` say otherwise; an empty header is left out."""
    sent = urlencode(body).encode() if isinstance(body, dict) else body
    usual = {"Authorization": f"Bearer {TOKEN}", "Origin": server.url, **TYPE}
    return server.get(path, method="POST", body=sent, **{name: value for name, value in {**usual, **headers}.items() if value})


def cookie_of(server: Dashboard) -> str:
    return server.get(f"/?token={quote(TOKEN)}")[1]["set-cookie"].split(";")[0]


def nothing_happened(home: Path) -> bool:
    kept = home / "data/training/uploads"
    return not (home / "data/metrics/started").exists() and not (kept.exists() and any(kept.iterdir()))


WITHOUT_RIGHT = {
    "no token": {"Authorization": ""},
    "a wrong token": {"Authorization": f"Bearer {TOKEN}x"},
    "the token as another scheme": {"Authorization": f"Basic {TOKEN}"},
    "the token as a cookie": {"Authorization": "", "Cookie": f"llamahome-PORT={TOKEN}"},
    "a foreign origin": {"Origin": "http://evil.com"},
    "the origin of another port": {"Origin": "http://127.0.0.1:1"},
    "the origin of nobody": {"Origin": "null"},
    "a foreign host": {"Host": "evil.com"},
    "another site": {"Sec_Fetch_Site": "cross-site"},
    "another port of this machine": {"Sec_Fetch_Site": "same-site"},
}
POSTS = ("/start", "/start/upload?name=a.jsonl", f"/run/{RUN_ID}/resume", "/started/20261129-114732-692279/stop")


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("headers", WITHOUT_RIGHT.values(), ids=WITHOUT_RIGHT.keys())
def test_a_post_without_the_right_is_refused(server: Dashboard, home: Path, path: str, headers: dict[str, str]) -> None:
    sent = {name: value.replace("PORT", str(server.port)) for name, value in headers.items()}
    status, answer, body = post(server, path, FORM, **sent)
    assert status in (401, 403) and "set-cookie" not in answer and RUN_ID not in body and nothing_happened(home)


def test_the_cookie_of_a_page_suffices_only_together_with_its_origin(server: Dashboard, home: Path) -> None:
    held = {"Authorization": "", "Cookie": cookie_of(server)}
    assert post(server, "/start", {**FORM, "method": "other"}, **held)[0] == 422
    assert post(server, "/start", FORM, **held, Origin="")[0] == 403
    assert post(server, f"/start?token={TOKEN}", FORM, Authorization="")[0] == 401 and nothing_happened(home)


HOSTILE = (
    ("/start", {**FORM, "data": ""}, {}, 422),
    ("/start", {**FORM, "data": "a\x00b"}, {}, 422),
    ("/start", {**FORM, "data": "a\nb"}, {}, 422),
    ("/start", {**FORM, "model": "../../etc"}, {}, 422),
    ("/start", {**FORM, "model": "--debug"}, {}, 422),
    ("/start", {**FORM, "method": "lora --set x=y"}, {}, 422),
    ("/start", {**FORM, "epochs": "--debug"}, {}, 422),
    ("/start", {**FORM, "max_steps": "5; reboot"}, {}, 422),
    ("/start", {**FORM, "settings": "a=b\n" * 60}, {}, 422),
    ("/start", {**FORM, "do": "train"}, {}, 404),
    ("/start", {**FORM, "do": "train", "draft": "../../x"}, {}, 404),
    ("/start", b"x" * 70_000, {}, 413),
    ("/start", b"a=1&" * 60, {}, 400),
    ("/start", b"\xff\xfe=1", {}, 400),
    ("/start", b"{}", {"Content_Type": "application/json"}, 415),
    ("/start", b"a=b", {"Content_Type": "text/plain"}, 415),
    ("/start/upload?name=../a.jsonl", b"{}", {}, 400),
    ("/start/upload?name=..%2Fa.jsonl", b"{}", {}, 400),
    ("/start/upload?name=..%5Ca.jsonl", b"{}", {}, 400),
    ("/start/upload?name=%2Fetc%2Fcron.d%2Fa.jsonl", b"{}", {}, 400),
    ("/start/upload?name=..", b"{}", {}, 400),
    ("/start/upload?name=.bashrc", b"{}", {}, 400),
    ("/start/upload?name=a%00.jsonl", b"{}", {}, 400),
    ("/start/upload?name=C:a.jsonl", b"{}", {}, 400),
    ("/start/upload?name=a.py", b"{}", {}, 415),
    ("/start/upload?name=authorized_keys", b"{}", {}, 415),
    ("/start/upload?name=a.jsonl.gz.sh", b"{}", {}, 415),
    ("/start/upload", b"{}", {}, 400),
    ("/start/upload?name=a.jsonl", b"", {}, 400),
    ("/start/upload/../x?name=a.jsonl", b"{}", {}, 405),
    (f"/run/{RUN_ID}", b"", {}, 405),
    ("/", b"", {}, 405),
    ("/run/nobody/resume", b"", {}, 404),
    ("/run/..%2f..%2fhome/resume", b"", {}, 405),
    ("/run/20261122-090000-other/resume", b"", {}, 409),
    ("/started/nobody/stop", b"", {}, 404),
    ("/started/..%2f..%2fx/stop", b"", {}, 405),
    ("/started/20261129-114732-692279/stop", b"", {}, 404),
)


@pytest.mark.parametrize(("path", "body", "headers", "expected"), HOSTILE)
def test_a_post_that_asks_for_what_is_not_offered_does_nothing(
    server: Dashboard, home: Path, path: str, body: bytes, headers: dict[str, str], expected: int
) -> None:
    assert post(server, path, body, **headers)[0] == expected and nothing_happened(home)


def test_a_body_that_is_too_large_unannounced_or_cut_off_leaves_nothing(server: Dashboard, home: Path) -> None:
    head = f"POST /start/upload?name=a.jsonl HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nAuthorization: Bearer {TOKEN}\r\n".encode()
    assert server.raw(head + f"Content-Length: {MOST_BYTES + 1}\r\n\r\n".encode() + b"{}") == 413
    assert server.raw(head + b"Content-Length: 99999999999999999999999\r\n\r\n{}") in (400, 413)
    assert server.raw(head + b"Content-Length: -1\r\n\r\n{}") in (400, 411)
    assert server.raw(head + b"\r\n{}") == 411
    assert server.raw(head + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n") == 411
    uploads = home / "data/training/uploads"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head + b"Content-Length: 1000\r\n\r\n" + b"x" * 100)
        wait_until(lambda: uploads.is_dir() and list(uploads.iterdir()))
    wait_until(lambda: nothing_happened(home))


def test_without_the_option_there_is_no_such_page_and_nothing_can_be_sent(home: Path) -> None:
    with started(home, "--token", TOKEN) as server:
        key = {"Authorization": f"Bearer {TOKEN}"}
        assert server.get("/start", **key)[0] == server.get("/started/20261129-114732-692279", **key)[0] == 404
        assert [post(server, path, FORM)[0] for path in POSTS] == [405] * len(POSTS) and nothing_happened(home)
        page = server.get(f"/run/{RUN_ID}", **key)[2]
        assert "<form method" not in page and 'href="/start"' not in server.get("/", **key)[2]


def test_what_a_form_held_comes_back_as_text_and_never_as_markup(server: Dashboard) -> None:
    markup = '"><script>alert(1)</script><textarea>'
    status, _, page = post(server, "/start", {**FORM, "data": markup, "settings": f"{markup}\x00", "epochs": markup})
    assert status == 422 and "<script>alert" not in page and page.count("<textarea") == 1
    assert f'value="{escape(markup)}"' in page.replace("&#34;", "&quot;").replace("&#39;", "&#x27;")


@pytest.mark.medium
def test_the_option_prints_a_token_that_every_page_needs(home: Path) -> None:
    with started(home, "--allow-start") as server:
        token = re.fullmatch(rf"open {server.url}/\?token=([\w-]{{20,}})\n", server.process.stderr.readline())[1]
        assert server.get("/start")[0] == server.get("/")[0] == 401
        assert server.get("/start", Authorization=f"Bearer {token}")[0] == 200


def test_a_page_lets_forms_name_their_origin_and_is_confined_otherwise(server: Dashboard) -> None:
    headers = server.get("/start", Authorization=f"Bearer {TOKEN}")[1]
    assert headers["referrer-policy"] == "same-origin" and "form-action 'self'" in headers["content-security-policy"]


@pytest.mark.medium
def test_a_file_is_uploaded_whole_and_never_over_another_one(tmp_path: Path) -> None:
    with started(tmp_path, "--allow-start", "--token", TOKEN) as server:
        large = os.urandom(3 << 20)
        names = []
        for content in (large, b"{}\n"):
            status, _, body = post(
                server, f"/start/upload?name={quote('my rows (ü).jsonl')}", content, Content_Type="application/octet-stream"
            )
            assert status == 201
            names.append(json.loads(body)["path"])
        assert names == ["data/training/uploads/my-rows-ü.jsonl", "data/training/uploads/my-rows-ü-2.jsonl"]
        assert [(tmp_path / name).read_bytes() for name in names] == [large, b"{}\n"]
        assert len(list((tmp_path / "data/training/uploads").iterdir())) == 2


@pytest.mark.medium
def test_a_server_that_other_machines_reach_is_confined(home: Path) -> None:
    with started(home, "--host", "0.0.0.0", "--allow-start", "--token", TOKEN) as server:
        status, _, page = post(server, "/start", {**FORM, "data": "../secret.jsonl"})
        assert status == 422 and "Other machines can reach this server" in page


def test_the_page_of_a_run_offers_what_can_be_done_with_it(server: Dashboard, home: Path) -> None:
    key = {"Authorization": f"Bearer {TOKEN}"}
    stopped, finished = (server.get(f"/run/{name}", **key)[2] for name in (RUN_ID, "20261122-090000-other"))
    assert f'action="/run/{RUN_ID}/resume"' in stopped and f"llamahome train-resume output/runs/{RUN_ID}" in unescape(stopped)
    assert "/resume" not in finished and "/stop" not in finished + stopped
