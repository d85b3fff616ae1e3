"""Requests that name another host or origin, or lack the key, are refused; those of the machine itself are not."""

import socket

import pytest

from llamahome.errors import ConfigError, MachineError
from llamahome.web.access import Access, is_loopback
from llamahome.web.listen import open_socket, url_of

HOME = Access("127.0.0.1", 8000)


def headers(**values: str) -> list[tuple[bytes, bytes]]:
    return [(name.replace("_", "-").encode(), value.encode()) for name, value in values.items()]


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "LOCALHOST:8000", "[::1]:8000"])
def test_the_names_of_this_machine_are_answered(host: str) -> None:
    assert HOME.denied(headers(host=host)) is None
    assert HOME.denied(headers(host=host, origin=f"http://{host}")) is None


HOSTS = (
    "evil.com",
    "evil.com:8000",
    "localhost",
    "127.0.0.1",
    "127.0.0.1:8001",
    "localhost.evil.com:8000",
    "127.0.0.1:8000@evil.com",
    "",
    "[::1]",
)


@pytest.mark.parametrize("host", HOSTS)
def test_a_foreign_host_is_refused(host: str) -> None:
    assert HOME.denied(headers(host=host)).code == "foreign_host"


def test_a_request_without_a_host_or_with_two_is_refused() -> None:
    assert HOME.denied([]).status == 403
    assert HOME.denied([*headers(host="localhost:8000"), *headers(host="localhost:8000")]).status == 403


@pytest.mark.parametrize(
    "origin", ["http://evil.com", "null", "https://127.0.0.1:8000", "http://127.0.0.1:8001", "http://localhost", "file://"]
)
def test_a_foreign_origin_is_refused(origin: str) -> None:
    assert HOME.denied(headers(host="127.0.0.1:8000", origin=origin)).code == "foreign_origin"


def test_a_request_that_a_browser_marks_as_of_another_site_is_refused() -> None:
    assert HOME.denied(headers(host="127.0.0.1:8000", sec_fetch_site="cross-site")).code == "foreign_origin"
    assert HOME.denied(headers(host="127.0.0.1:8000", sec_fetch_site="same-origin")) is None


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_key_is_asked_for_and_compared_whole(host: str) -> None:
    access = Access(host, 8000, "secret-key")
    for given in ({}, {"authorization": "Bearer secret-ke"}, {"authorization": "secret-key"}, {"authorization": "Basic secret-key"}):
        assert access.denied(headers(host="127.0.0.1:8000", **given)).status == 401
    assert access.denied(headers(host="127.0.0.1:8000", authorization="Bearer secret-key")) is None
    assert access.denied(headers(host="127.0.0.1:8000"), needs_key=False) is None


def test_a_server_beyond_loopback_is_asked_by_any_name_but_by_pages_of_its_own_only() -> None:
    access, key = Access("0.0.0.0", 8000, "k"), {"authorization": "Bearer k"}
    assert access.denied(headers(host="box.lan:8000", **key)) is None
    assert access.denied(headers(host="box.lan:8000", origin="http://evil.com", **key)).code == "foreign_origin"


def test_only_addresses_of_this_machine_are_loopback() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.0.0.5", "::1", "localhost"))
    assert not any(
        is_loopback(host) for host in ("0.0.0.0", "::", "192.168.0.1", "example.org", "", "127.0.0.1.evil.com", "::ffff:1.2.3.4")
    )


@pytest.mark.medium
def test_a_socket_beyond_loopback_needs_a_key_and_a_taken_port_has_its_reason() -> None:
    with pytest.raises(ConfigError) as refused:
        open_socket("0.0.0.0", 0, key=None)
    assert refused.value.problems[0].code == "usage.host-without-key"
    with open_socket("127.0.0.1", 0, key=None) as opened:
        port = opened.getsockname()[1]
        assert url_of(opened, "127.0.0.1") == f"http://127.0.0.1:{port}"
        with pytest.raises(MachineError) as taken:
            open_socket("127.0.0.1", port, key=None)
        (problem,) = taken.value.problems
        assert problem.code == "machine.port-taken" and "another program" in problem.message
        free = int(problem.hint.removeprefix("--port "))
        open_socket("127.0.0.1", free, key=None).close()
    with pytest.raises(MachineError) as nowhere:
        open_socket("no.such.host.invalid", 0, key="k")
    assert nowhere.value.problems[0].code == "machine.cannot-listen"
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0, "nothing listens after an error"
