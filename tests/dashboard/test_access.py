"""Who may ask the dashboard: forty requests that must fail, and those that must not."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from tests.support.dashboards import RUN_ID, Dashboard, started, write_run

TOKEN = "a-token-of-some-length"
SECRET = "the text of a file that no page may show"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("access") / "home"
    write_run(home)
    (home.parent / "secret.txt").write_text(SECRET)
    (home / "output/runs/secret.txt").write_text(SECRET)
    escaping = home / "output/runs/escaping"  # a run from elsewhere, whose id is a path
    escaping.mkdir()
    (escaping / "config.yaml").write_text("")
    (escaping / "run_id").write_text("../../../../..\n")
    return home


@pytest.fixture(scope="module")
def open_server(home: Path) -> Iterator[Dashboard]:
    with started(home) as server:
        yield server


@pytest.fixture(scope="module")
def guarded(home: Path) -> Iterator[Dashboard]:
    with started(home, "--token", TOKEN) as server:
        yield server


PATHS = (
    "/../secret.txt",
    "/%2e%2e/secret.txt",
    "/..%2fsecret.txt",
    "/static/../app.py",
    "/static/..%2fapp.py",
    "/static/%2e%2e%2fapp.py",
    "/static/..%5capp.py",
    "/static//etc/passwd",
    "/static/%2fetc%2fpasswd",
    "/static/uPlot.sha256",
    "/static/style.css%00.js",
    "/run/../../secret.txt",
    "/run/..%2f..%2fsecret.txt",
    "/run/%2e%2e/samples",
    "/run/..%252f..%252fsecret.txt",
    "/run/secret.txt",
    "/run/..%2f..%2f..%2f..%2f../samples",
    f"/run/{RUN_ID}/../../secret.txt",
    f"/run/{RUN_ID}%00",
    f"/run/{RUN_ID}/config.yaml",
    f"/api/run/..%2f{RUN_ID}/curves",
    "/api/run/%2e%2e/live",
    f"/api/run/{RUN_ID}/live?cursor=../../etc",
    f"/api/run/{RUN_ID}/live?cursor=-1--1",
    "//evil.com/run",
)


@pytest.mark.parametrize("path", PATHS)
def test_no_address_leaves_the_runs(open_server: Dashboard, path: str) -> None:
    status, _, body = open_server.get(path)
    assert status == 404 and SECRET not in body


def test_a_run_whose_id_is_a_path_is_shown_under_the_name_of_its_folder(open_server: Dashboard) -> None:
    """And nothing that lies where the path leads to."""
    for page in ("", "/samples", "/system"):
        status, _, body = open_server.get(f"/run/escaping{page}")
        assert status == 200 and SECRET not in body and "../.." not in body


METHODS = ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "NONSENSE")


@pytest.mark.parametrize("method", METHODS)
def test_only_reading_is_answered(open_server: Dashboard, method: str) -> None:
    assert open_server.get("/", method=method)[0] in (400, 405)


FOREIGN = (
    {"Host": "evil.com"},
    {"Host": "evil.com:80"},
    {"Host": ""},
    {"Host": "127.0.0.1"},
    {"Origin": "http://evil.com"},
    {"Origin": "null"},
    {"Sec_Fetch_Site": "cross-site"},
    {"Sec_Fetch_Site": "same-site"},
)


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_pages_of_other_sites_get_nothing(open_server: Dashboard, headers: dict[str, str]) -> None:
    status, _, body = open_server.get(f"/api/run/{RUN_ID}/curves?names=train/loss", **headers)
    assert status == 403 and "lines" not in body


def test_requests_that_are_too_large_or_have_a_body_are_refused(open_server: Dashboard) -> None:
    host = f"Host: 127.0.0.1:{open_server.port}\r\n".encode()
    assert open_server.get("/?q=" + "a" * 3000)[0] == 414
    assert open_server.raw(b"GET / HTTP/1.1\r\n" + host + b"X: " + b"a" * 70000 + b"\r\n\r\n") in (0, 400, 431)
    assert open_server.raw(b"GET / HTTP/1.1\r\n" + host + b"X: 1\r\n" * 20000 + b"\r\n") in (0, 400, 431)
    assert open_server.raw(b"GET / HTTP/1.1\r\n" + host + b"Content-Length: 3\r\n\r\nabc") == 400
    assert open_server.raw(b"GET / HTTP/1.1\r\n" + host + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n") == 400
    assert open_server.raw(b"GET / HTTP/1.1\r\n" + host + host + b"\r\n") in (400, 403)
    assert open_server.raw(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n") == 400


WRONG = (
    {},
    {"Authorization": "Bearer wrong-token-of-length"},
    {"Authorization": f"Basic {TOKEN}"},
    {"Authorization": f"Bearer {TOKEN}x"},
    {"Cookie": "llamahome-PORT=wrong"},
    {"Cookie": f"llamahome-PORT={TOKEN}"},
    {"Cookie": "llamahome-PORT"},
)


@pytest.mark.parametrize("headers", WRONG, ids=str)
def test_without_the_token_there_are_no_runs(guarded: Dashboard, headers: dict[str, str]) -> None:
    given = {name: value.replace("PORT", str(guarded.port)) for name, value in headers.items()}
    for path in ("/", f"/run/{RUN_ID}", f"/api/run/{RUN_ID}/live", "/api/runs", f"/?token={TOKEN[:-1]}", f"/?token={TOKEN}&token=a"):
        status, answer, body = guarded.get(path, **given)
        assert status == 401 and RUN_ID not in body and "set-cookie" not in answer


def test_the_token_is_exchanged_for_a_cookie_that_scripts_and_other_sites_do_not_get(guarded: Dashboard) -> None:
    status, answer, _ = guarded.get(f"/run/{RUN_ID}?row=3&token={quote(TOKEN)}")
    assert status == 303 and answer["location"] == f"/run/{RUN_ID}?row=3"
    cookie = answer["set-cookie"]
    assert TOKEN not in cookie and {"httponly", "samesite=strict"} <= {part.strip().lower() for part in cookie.split(";")}
    held = cookie.split(";")[0]
    assert guarded.get("/", Cookie=held)[0] == 200
    assert guarded.get("/", Cookie=held, Host="evil.com")[0] == 403
    assert guarded.get("/", Authorization=f"Bearer {TOKEN}")[0] == 200
    assert guarded.get(f"//evil.com/?token={TOKEN}")[1]["location"] == "/evil.com/"


def test_every_answer_confines_what_a_page_may_load(open_server: Dashboard) -> None:
    for path in ("/", f"/run/{RUN_ID}", "/nothing", "/static/style.css", "/api/runs"):
        headers = open_server.get(path)[1]
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert (headers["x-content-type-options"], headers["referrer-policy"]) == ("nosniff", "no-referrer")


def test_beyond_this_machine_a_token_is_needed_and_a_short_one_is_refused(home: Path) -> None:
    for words, said in (
        (("--host", "0.0.0.0"), r"usage.host-without-key.*help: --token [\w-]{20,}"),
        (("--token", "short"), "usage.bad-choice"),
    ):
        with pytest.raises(AssertionError, match=said):
            started(home, *words)
    with started(home, "--host", "0.0.0.0", "--token", TOKEN) as server:
        assert server.get("/")[0] == 401
