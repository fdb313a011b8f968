from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from served import Served

HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}


@pytest.mark.parametrize(("host", "status"), [
    ("127.0.0.1", 200), ("localhost:1234", 200), ("[::1]:7441", 200), ("127.0.0.1:80", 200),
    ("evil.example", 403), ("evil.example:7441", 403), ("127.0.0.1.evil.example", 403), ("192.168.1.4", 403),
    ("", 403)])
def test_only_this_machines_names_are_answered(host: str, status: int, served: Served) -> None:
    assert served.ask("GET", "/edgert/state", headers={"Host": host})[0] == status


@pytest.mark.parametrize(("origin", "status"), [
    ("http://127.0.0.1:{port}", 200), ("https://evil.example", 403), ("null", 403), ("http://127.0.0.1:1", 403)])
def test_other_sites_pages_are_refused(origin: str, status: int, served: Served) -> None:
    headers = {"Origin": origin.format(port=served.port)}
    assert served.ask("POST", "/v1/chat/completions", HELLO, headers)[0] == status
    reply = served.open("OPTIONS", "/v1/chat/completions", headers=headers)
    reply.read()
    assert "access-control-allow-origin" not in reply.headers


def test_replies_tell_browsers_to_do_no_more_than_they_are_told(served: Served) -> None:
    for path in ("/", "/edgert/state", "/nosuch", "/static/app.js"):
        reply = served.open("GET", path)
        reply.read()
        policy = reply.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "script-src 'self'" in policy
        assert reply.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["/static/../part.py", "/static/%2e%2e/part.py", "/static//etc/passwd",
                                  "/static/..%2f..%2fcli/main.py", "/edgert/chats/..%2f..%2fetc"])
def test_no_path_leads_out_of_the_pages_directory(path: str, served: Served) -> None:
    status, body = served.ask("GET", path)
    assert status == 404 and "import" not in str(body)


def test_large_bodies_are_refused_announced_or_not(served: Served) -> None:
    reply = served.open("POST", "/v1/chat/completions", headers={"Content-Length": str(2**30)})
    assert reply.status == 413
    assert served.ask("POST", "/v1/chat/completions", b" " * (17 * 2**20))[0] == 413


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Served]:
    """A server on every address of this machine, which only loopback reaches here."""
    words = ("--host", "0.0.0.0", "--allow-host", "box.lan", "--cors-origin", "https://ours.example")
    with Served(tmp_path_factory.mktemp("keyed"), tiny, *words) as server:
        yield server


def test_beyond_loopback_a_key_is_made_once_and_required(keyed: Served, tiny: Path) -> None:
    key = keyed.said.partition("): ")[2].split()[0]
    assert len(key) >= 24
    path = keyed.home / "config" / "api-key"
    assert path.read_text().strip() == key and stat.S_IMODE(path.stat().st_mode) == 0o600
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {key}"},
                    {"Cookie": "edgert-key=x"}):
        status, body = keyed.ask("GET", "/v1/models", headers=headers)
        assert (status, body["error"]["code"]) == (401, "invalid_api_key")
    assert keyed.ask("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})[0] == 200
    for path_ in ("/health", "/", "/static/app.js"):
        assert keyed.ask("GET", path_)[0] == 200
    assert keyed.ask("GET", "/staticx")[0] == 401
    assert keyed.ask("POST", "/edgert/session", {}, {"Authorization": "Bearer wrong"})[0] == 401
    reply = keyed.open("POST", "/edgert/session", {}, {"Authorization": f"Bearer {key}"})
    reply.read()
    cookie = reply.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie
    assert keyed.ask("GET", "/v1/models", headers={"Cookie": cookie.partition(";")[0]})[0] == 200


def test_a_second_start_does_not_show_the_key_again(keyed: Served, tiny: Path) -> None:
    key = (keyed.home / "config" / "api-key").read_text().strip()
    with Served(keyed.home, tiny, "--host", "0.0.0.0") as again:
        assert key not in again.said and "api-key" in again.said
        assert again.ask("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})[0] == 200
    with Served(keyed.home, tiny, "--host", "0.0.0.0", "--insecure") as insecure:
        assert insecure.ask("GET", "/v1/models")[0] == 200


def test_names_and_origins_can_be_allowed(keyed: Served) -> None:
    key = {"Authorization": f"Bearer {(keyed.home / 'config' / 'api-key').read_text().strip()}"}
    assert keyed.ask("GET", "/v1/models", headers={"Host": "box.lan", **key})[0] == 200
    assert keyed.ask("GET", "/v1/models", headers={"Host": "192.168.1.4:7441", **key})[0] == 200
    assert keyed.ask("GET", "/v1/models", headers={"Host": "evil.example", **key})[0] == 403
    reply = keyed.open("OPTIONS", "/v1/models", headers={"Origin": "https://ours.example"})
    reply.read()
    assert reply.status == 204 and reply.headers["access-control-allow-origin"] == "https://ours.example"
    assert keyed.ask("GET", "/v1/models", headers={"Origin": "https://evil.example", **key})[0] == 403
