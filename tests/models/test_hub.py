"""The hub's client against a hub that drops, lies, refuses and changes its mind."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

import pytest
from fake_hub import (
    FakeHub,
    Request,
    announce,
    drop_after,
    endless,
    gate,
    ignore_the_range_start,
    running,
    status,
)
from recorder import Recorder

from edgert.errors import ChecksumMismatch, DownloadError, UsageError
from edgert.models.http import HttpClient
from edgert.models.hub import Hub, HubFile, HubSettings
from edgert.models.partial import partial_path, sidecar_path
from edgert.models.retry import MAX_ATTEMPTS

REPO = "user/repo"
CONTENT = bytes(i * 7 % 251 for i in range(50_000))
NAME = "m-Q4_K_M.gguf"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "models" / REPO / NAME


@pytest.fixture
def served(hub_server: FakeHub) -> FakeHub:
    hub_server.repos[REPO] = {NAME: CONTENT}
    return hub_server


def fetch(hub: Hub, target: Path, progress: Recorder) -> None:
    (file,) = hub.files(REPO, progress)
    hub.fetch(REPO, file, target, progress, [file.path])


def files_left(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir())


def begin(server: FakeHub, hub: Hub, target: Path, n_bytes: int) -> None:
    """Leave a partial file of `n_bytes`: the server drops the connection, then refuses."""
    server.faults.extend([drop_after(n_bytes), status(400)])
    with pytest.raises(DownloadError):
        fetch(hub, target, Recorder())
    assert partial_path(target).stat().st_size == n_bytes
    server.requests.clear()
    server.served_bytes = 0


def test_the_list_tells_path_size_and_hash_of_ggufs_only(hub: Hub, served: FakeHub, progress: Recorder) -> None:
    served.repos[REPO]["README.md"] = b"text"
    assert hub.files(REPO, progress) == [HubFile(NAME, len(CONTENT), hashlib.sha256(CONTENT).hexdigest())]


def test_a_list_of_several_pages_is_followed(hub: Hub, served: FakeHub, progress: Recorder) -> None:
    served.page_size = 2
    served.repos[REPO] = {f"m-{n}.gguf": b"x" for n in range(5)}
    assert [file.path for file in hub.files(REPO, progress)] == [f"m-{n}.gguf" for n in range(5)]


def test_a_list_without_end_is_an_error(hub: Hub, served: FakeHub, progress: Recorder) -> None:
    served.page_size = 1
    served.repos[REPO] = {f"m-{n}.gguf": b"x" for n in range(40)}
    with pytest.raises(DownloadError, match="no end"):
        hub.files(REPO, progress)


def test_a_list_of_too_many_bytes_is_an_error(hub: Hub, served: FakeHub, progress: Recorder,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgert.models.hub.MAX_PAGE_BYTES", 100)
    with pytest.raises(DownloadError, match="too long"):
        hub.files(REPO, progress)


@pytest.mark.parametrize("lie", [
    {"path": "../../evil.gguf"}, {"path": "/tmp/evil.gguf"}, {"path": "a/../../evil.gguf"}, {"path": ["evil.gguf"]},
    {"size": -1, "lfs": None}, {"size": "12", "lfs": None}, {"size": 2**60, "lfs": None}, {"size": True, "lfs": None},
    {"type": "directory"}, {"lfs": {"size": 1.5}},
])
def test_hostile_entries_are_left_out(hub: Hub, served: FakeHub, progress: Recorder, lie: dict[str, object]) -> None:
    served.listing = [{**served.entry(NAME, CONTENT), **lie}, served.entry("good.gguf", CONTENT), "no entry", None]
    assert [file.path for file in hub.files(REPO, progress)] == ["good.gguf"]


@pytest.mark.parametrize("oid", [None, 12, "short", "g" * 64])
def test_what_is_no_hash_is_not_taken_for_one(hub: Hub, served: FakeHub, progress: Recorder, oid: object) -> None:
    served.listing = [{"type": "file", "path": NAME, "size": 5, "lfs": {"oid": oid, "size": 5}}]
    assert hub.files(REPO, progress) == [HubFile(NAME, 5, None)]


def test_a_list_that_is_no_list_is_an_error(hub: Hub, served: FakeHub, progress: Recorder) -> None:
    served.listing = {"error": "x"}
    with pytest.raises(DownloadError, match="no list"):
        hub.files(REPO, progress)


def test_a_deeply_nested_list_is_an_error(hub: Hub, served: FakeHub, progress: Recorder,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "dumps", lambda value: "[" * 200_000)
    with pytest.raises(DownloadError, match="damaged"):
        hub.files(REPO, progress)


def test_a_file_arrives_whole_and_nothing_else_is_left(hub: Hub, served: FakeHub, target: Path,
                                                       progress: Recorder) -> None:
    fetch(hub, target, progress)
    assert target.read_bytes() == CONTENT
    assert files_left(target) == [NAME]
    assert progress.here_bytes == len(CONTENT)


def test_redirects_to_another_port_are_followed_without_the_token(
        served: FakeHub, cdn_server: FakeHub, target: Path, progress: Recorder) -> None:
    served.token = "hf_secret"
    fetch(Hub(HubSettings(served.url, token="hf_secret")), target, progress)
    assert target.read_bytes() == CONTENT
    assert all(request.headers["authorization"] == "Bearer hf_secret" for request in served.requests)
    assert cdn_server.requests
    assert not any("authorization" in request.headers for request in cdn_server.requests)


def test_a_dropped_connection_goes_on_where_it_was(hub: Hub, served: FakeHub, target: Path, progress: Recorder,
                                                   waits: list[float]) -> None:
    served.faults.extend([drop_after(20_000), drop_after(10_000)])
    fetch(hub, target, progress)
    assert target.read_bytes() == CONTENT
    assert [request.headers.get("range") for request in served.file_requests] == [None, "bytes=20000-", "bytes=30000-"]
    assert served.served_bytes == len(CONTENT)
    assert waits == [1.0, 2.0]
    assert progress.here_bytes == len(CONTENT)


def test_a_connection_that_never_gets_anywhere_is_given_up(hub: Hub, served: FakeHub, target: Path,
                                                           progress: Recorder, waits: list[float]) -> None:
    served.faults.extend([drop_after(0)] * 20)
    with pytest.raises(DownloadError, match="too early"):
        fetch(hub, target, progress)
    assert waits == [1.0, 2.0, 4.0, 8.0]


def test_attempts_are_counted_anew_while_bytes_arrive(hub: Hub, served: FakeHub, target: Path, progress: Recorder,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgert.models.retry.PROGRESS_BYTES", 1000)
    served.faults.extend([drop_after(4000)] * 12)
    fetch(hub, target, progress)
    assert len(served.file_requests) == 13 > MAX_ATTEMPTS
    assert served.served_bytes == len(CONTENT)


def test_a_later_run_fetches_only_what_is_missing(hub: Hub, served: FakeHub, target: Path, progress: Recorder) -> None:
    begin(served, hub, target, 30_000)
    fetch(hub, target, progress)
    assert target.read_bytes() == CONTENT
    assert served.served_bytes == len(CONTENT) - 30_000
    assert progress.said("going on after 29.3 KiB")
    assert progress.here_bytes == len(CONTENT)
    assert files_left(target) == [NAME]


def test_a_later_run_resumes_behind_a_redirect(hub: Hub, served: FakeHub, cdn_server: FakeHub, target: Path,
                                               progress: Recorder) -> None:
    cdn_server.faults.extend([drop_after(30_000), status(400)])
    with pytest.raises(DownloadError):
        fetch(hub, target, Recorder())
    cdn_server.etag = "another-one-at-every-server"  # the hub's X-Linked-Etag is the identity
    fetch(hub, target, progress)
    assert cdn_server.served_bytes == len(CONTENT)


def test_a_changed_etag_starts_over(hub: Hub, served: FakeHub, target: Path, progress: Recorder) -> None:
    begin(served, hub, target, 30_000)
    served.etag = "changed"
    fetch(hub, target, progress)
    assert target.read_bytes() == CONTENT
    assert progress.said("starting over")
    assert [request.headers.get("range") for request in served.file_requests] == ["bytes=30000-", None]
    assert progress.here_bytes == len(CONTENT)


def test_a_file_of_another_size_starts_over(hub: Hub, served: FakeHub, target: Path, progress: Recorder) -> None:
    begin(served, hub, target, 30_000)
    served.repos[REPO][NAME] = new = CONTENT[::-1] + b"longer"
    fetch(hub, target, progress)
    assert target.read_bytes() == new
    assert served.file_requests[0].headers.get("range") is None


def test_bytes_that_nobody_knows_the_origin_of_are_thrown_away(hub: Hub, served: FakeHub, target: Path,
                                                               progress: Recorder) -> None:
    begin(served, hub, target, 30_000)
    sidecar_path(target).write_text('{"url": 1, "etag": [')
    fetch(hub, target, progress)
    assert target.read_bytes() == CONTENT
    assert served.served_bytes == len(CONTENT)


def test_a_server_without_ranges_starts_over(hub: Hub, served: FakeHub, target: Path, progress: Recorder) -> None:
    begin(served, hub, target, 30_000)
    served.ranges = False
    fetch(hub, target, progress)
    assert target.read_bytes() == CONTENT
    assert len(served.file_requests) == 1
    assert progress.here_bytes == len(CONTENT)


def test_416_starts_over(hub: Hub, served: FakeHub, target: Path, progress: Recorder) -> None:
    begin(served, hub, target, 30_000)
    served.faults.append(status(416))
    fetch(hub, target, progress)
    assert target.read_bytes() == CONTENT
    assert served.file_requests[1].headers.get("range") is None


def test_416_without_a_range_is_an_error(hub: Hub, served: FakeHub, target: Path, progress: Recorder) -> None:
    served.faults.extend([status(416)] * 3)
    with pytest.raises(DownloadError, match="other bytes"):
        fetch(hub, target, progress)


def test_a_range_that_begins_elsewhere_is_not_appended(hub: Hub, served: FakeHub, target: Path,
                                                       progress: Recorder) -> None:
    begin(served, hub, target, 30_000)
    served.faults.append(ignore_the_range_start)
    fetch(hub, target, progress)
    assert target.read_bytes() == CONTENT


def test_a_file_that_was_all_but_renamed_needs_no_request(hub: Hub, served: FakeHub, target: Path,
                                                          progress: Recorder) -> None:
    begin(served, hub, target, 30_000)
    partial_path(target).write_bytes(CONTENT)
    fetch(hub, target, progress)
    assert target.read_bytes() == CONTENT
    assert served.file_requests == []


def test_a_wrong_hash_removes_the_file(hub: Hub, served: FakeHub, target: Path, progress: Recorder) -> None:
    served.sha256[NAME] = "0" * 64
    served.etag = "plain"
    with pytest.raises(ChecksumMismatch) as caught:
        fetch(hub, target, progress)
    assert caught.value.expected == "0" * 64
    assert files_left(target) == []


def test_a_damaged_partial_is_found_by_its_hash(hub: Hub, served: FakeHub, target: Path, progress: Recorder) -> None:
    begin(served, hub, target, 30_000)
    partial_path(target).write_bytes(b"\0" * 30_000)
    with pytest.raises(ChecksumMismatch):
        fetch(hub, target, progress)
    assert files_left(target) == []


def test_a_file_that_changed_since_the_list_is_not_fetched(hub: Hub, served: FakeHub, cdn_server: FakeHub,
                                                           target: Path, progress: Recorder) -> None:
    served.sha256[NAME] = "0" * 64  # the X-Linked-Etag of the redirect tells the true hash
    with pytest.raises(DownloadError, match="another file than it listed"):
        fetch(hub, target, progress)
    assert partial_path(target).exists() is False


def test_without_a_published_hash_the_size_is_checked_and_said(hub: Hub, served: FakeHub, target: Path,
                                                               progress: Recorder) -> None:
    served.sha256[NAME] = "none"
    fetch(hub, target, progress)
    assert target.read_bytes() == CONTENT
    assert progress.said("no SHA-256")


@pytest.mark.parametrize("extra_bytes", [-1000, 1000])
def test_a_lying_content_length_is_tried_again(hub: Hub, served: FakeHub, target: Path, progress: Recorder,
                                               extra_bytes: int) -> None:
    served.faults.append(announce(extra_bytes))
    fetch(hub, target, progress)
    assert target.read_bytes() == CONTENT
    assert progress.said(f"announces {len(CONTENT) + extra_bytes} bytes")


def test_a_content_length_that_always_lies_is_an_error(hub: Hub, served: FakeHub, target: Path,
                                                       progress: Recorder) -> None:
    served.faults.extend([announce(5)] * 10)
    with pytest.raises(DownloadError, match="announces 50005 bytes"):
        fetch(hub, target, progress)
    assert files_left(target) == []


def test_a_listed_size_that_lies_is_an_error(hub: Hub, served: FakeHub, target: Path, progress: Recorder) -> None:
    served.size_bytes[NAME] = len(CONTENT) - 10
    with pytest.raises(DownloadError, match="announces 50000 bytes"):
        fetch(hub, target, progress)


def test_a_body_without_end_is_cut_at_the_listed_size(hub: Hub, served: FakeHub, target: Path,
                                                      progress: Recorder) -> None:
    served.faults.append(endless)
    fetch(hub, target, progress)
    assert target.read_bytes() == CONTENT


def test_a_silent_server_is_asked_again(served: FakeHub, target: Path, progress: Recorder, waits: list[float]) -> None:
    go_on = threading.Event()
    served.faults.append(gate(20_000, threading.Event(), go_on))
    client = HttpClient(served.url, read_timeout_s=0.05)
    try:
        fetch(Hub(HubSettings(served.url), waits.append, client), target, progress)
    finally:
        go_on.set()
    assert target.read_bytes() == CONTENT
    assert served.file_requests[1].headers["range"] == "bytes=20000-"
    assert progress.said("timed out")


@pytest.mark.parametrize("code", [429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again(hub: Hub, served: FakeHub, target: Path, progress: Recorder, code: int,
                                      waits: list[float]) -> None:
    served.listing_status.append((code, {}))
    served.faults.append(status(code, {"Retry-After": "17"}))
    fetch(hub, target, progress)
    assert target.read_bytes() == CONTENT
    assert waits == [1.0, 17.0]


def test_a_server_that_asks_for_a_long_wait_is_obeyed_by_stopping(hub: Hub, served: FakeHub, target: Path,
                                                                  progress: Recorder, waits: list[float]) -> None:
    served.listing_status.append((429, {"Retry-After": "3000"}))
    with pytest.raises(DownloadError, match="in 3000 s"):
        fetch(hub, target, progress)
    assert waits == []


@pytest.mark.parametrize("code", [401, 403])
def test_a_refusal_speaks_of_token_and_licence(hub: Hub, served: FakeHub, progress: Recorder, code: int,
                                               waits: list[float]) -> None:
    served.listing_status.append((code, {}))
    with pytest.raises(DownloadError) as caught:
        hub.files(REPO, progress)
    assert REPO in caught.value.message
    assert "HF_TOKEN" in caught.value.next_step and "licence" in caught.value.next_step
    assert waits == []


def test_a_refused_file_speaks_of_token_and_licence(hub: Hub, served: FakeHub, target: Path,
                                                    progress: Recorder) -> None:
    served.faults.append(status(403))
    with pytest.raises(DownloadError, match="HF_TOKEN"):
        fetch(hub, target, progress)
    assert files_left(target) == []


def test_the_token_is_never_in_a_message(served: FakeHub, progress: Recorder) -> None:
    served.token = "hf_other"
    with pytest.raises(DownloadError) as caught:
        Hub(HubSettings(served.url, token="hf_secret")).files(REPO, progress)
    assert "hf_secret" not in str(caught.value)


def test_an_unknown_repository_is_named(hub: Hub, served: FakeHub, progress: Recorder) -> None:
    with pytest.raises(DownloadError, match="no repository user/other"):
        hub.files("user/other", progress)


def test_a_file_that_is_gone_names_those_that_exist(hub: Hub, served: FakeHub, target: Path,
                                                    progress: Recorder) -> None:
    (file,) = hub.files(REPO, progress)
    served.repos[REPO] = {}
    with pytest.raises(DownloadError) as caught:
        hub.fetch(REPO, file, target, progress, ["a.gguf", "b.gguf"])
    assert f"{REPO} has no file {NAME}" in caught.value.message
    assert "a.gguf, b.gguf" in caught.value.next_step


def test_offline_nothing_is_asked(served: FakeHub, target: Path, progress: Recorder) -> None:
    hub = Hub(HubSettings(served.url, offline=True))
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE"):
        hub.files(REPO, progress)
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE"):
        hub.fetch(REPO, HubFile(NAME, 1, None), target, progress)
    assert served.requests == []


def test_nobody_at_the_endpoint_is_an_error_after_some_attempts(progress: Recorder, waits: list[float]) -> None:
    with running(FakeHub()) as gone:
        url = gone.url
    with pytest.raises(DownloadError, match="refused"):
        Hub(HubSettings(url), waits.append).files(REPO, progress)
    assert waits == [1.0, 2.0, 4.0, 8.0]


class Redirecting(FakeHub):
    """Redirects everything to one address."""

    def __init__(self, location: str) -> None:
        super().__init__()
        self.listing_status.extend([(302, {"Location": location})] * 20)


@pytest.mark.parametrize(("location", "problem"), [
    ("/api/models/user/repo/tree/main", "more than 5 redirects"),
    ("ftp://127.0.0.1/x", "no address"),
    ("http://model.example/x", "without encryption"),
    ("https://" + "a" * 9000 + "/", "no address"),
    ("http://[broken/", "no address"),
    ("", "more than 5 redirects"),
])
def test_bad_redirects_are_not_followed(location: str, problem: str, progress: Recorder) -> None:
    with running(Redirecting(location)) as server, pytest.raises(DownloadError, match=problem):
        Hub(HubSettings(server.url)).files(REPO, progress)


def test_a_remote_hub_cannot_send_the_client_to_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    client = HttpClient("https://hub.example")
    with pytest.raises(DownloadError, match="this very machine"):
        client._allowed("http://127.0.0.1:8080/admin")
    with pytest.raises(DownloadError, match="without encryption"):
        client._allowed("http://hub.example/x")
    assert client._allowed("https://cdn.example/x").hostname == "cdn.example"


@pytest.mark.parametrize("endpoint", ["", "hub.example", "ftp://hub.example", "http://", "http://host:port"])
def test_an_endpoint_that_is_no_address_is_refused(endpoint: str) -> None:
    with pytest.raises(UsageError, match="HF_ENDPOINT"):
        HttpClient(endpoint)


@pytest.mark.parametrize("token", ["two\nlines", "x" * 600, "tökén"])
def test_a_token_that_cannot_be_a_header_is_refused(token: str) -> None:
    with pytest.raises(UsageError, match="HF_TOKEN"):
        HttpClient("https://hub.example", token)


@pytest.mark.parametrize(("value", "offline"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_settings_are_read_from_the_environment(value: str, offline: bool) -> None:
    environ = {"HF_ENDPOINT": "http://mirror", "HF_TOKEN": " hf_x\n", "HF_HUB_OFFLINE": value}
    assert HubSettings.from_environ(environ) == HubSettings("http://mirror", "hf_x", offline)
    assert HubSettings.from_environ({}) == HubSettings("https://huggingface.co", None, False)


def test_spaces_and_accents_in_names_are_quoted(hub: Hub, served: FakeHub, target: Path, progress: Recorder) -> None:
    served.repos[REPO] = {"Q4 K/modèle #1.gguf": CONTENT}
    fetch(hub, target, progress)
    assert target.read_bytes() == CONTENT
    assert isinstance(served.file_requests[0], Request)
    assert served.file_requests[0].path.endswith("/Q4%20K/mod%C3%A8le%20%231.gguf")
