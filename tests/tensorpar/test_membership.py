"""Who is in the cluster: kept in private files, checked when read; TLS lets in exactly those."""

from __future__ import annotations

import json
import socket
import ssl
import stat
import threading
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from benchmarks.cluster_processes import paths_under
from edgert.errors import ClusterError
from tensorpar import identity
from tensorpar.identity import Identity
from tensorpar.members import MAX_MEMBERS, Member, Membership, parse_address

DEADLINE_S = 60.0


@pytest.fixture
def leader(tmp_path: Path) -> Membership:
    return Membership.create(paths_under(tmp_path / "leader"), "leader", "laptop")


@pytest.fixture
def worker(tmp_path: Path) -> Membership:
    return Membership.create(paths_under(tmp_path / "worker"), "worker", "pi")


def test_keys_and_members_are_the_users_alone(leader: Membership, worker: Membership) -> None:
    leader.with_member(Member("pi", worker.identity.certificate))
    _ = leader.identity
    files = list(leader.directory.iterdir())
    assert {one.name for one in files} == {"key.pem", "certificate.pem", "members.json"}
    assert {stat.S_IMODE(one.stat().st_mode) for one in files} == {0o600}


def test_members_are_kept_replaced_renamed_and_forgotten(tmp_path: Path, leader: Membership,
                                                         worker: Membership) -> None:
    other = Identity.load_or_create(tmp_path / "other", "pi")
    changed = leader.with_member(Member("pi", worker.identity.certificate, "10.0.0.1", 1))
    changed = changed.with_member(Member("pi", worker.identity.certificate, "10.0.0.2", 2))
    changed = changed.with_member(Member("pi", other.certificate, "10.0.0.3", 3))
    assert Membership.load(paths_under(tmp_path / "leader")) == changed
    assert [(one.name, one.host) for one in changed.members] == [("pi", "10.0.0.2"), ("pi-2", "10.0.0.3")]
    assert [one.name for one in changed.without("pi").members] == ["pi-2"]
    with pytest.raises(ClusterError, match="no device is called"):
        changed.without("x")


def test_a_device_has_one_role(tmp_path: Path, leader: Membership) -> None:
    assert Membership.create(paths_under(tmp_path / "leader"), "leader") == leader
    with pytest.raises(ClusterError, match="is a leader already"):
        Membership.create(paths_under(tmp_path / "leader"), "worker")


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"name": "a", "role": "king", "members": []}',
                                  '{"name": "a", "role": "leader", "members": [{}]}',
                                  '{"name": "", "role": "leader", "members": []}', "[" * 10000])
def test_a_damaged_file_is_named(tmp_path: Path, leader: Membership, text: str) -> None:
    (leader.directory / "members.json").write_text(text)
    with pytest.raises(ClusterError, match="damaged"):
        Membership.load(paths_under(tmp_path / "leader"))


def test_a_cluster_has_a_largest_size(leader: Membership, worker: Membership) -> None:
    full = replace(leader, members=tuple(Member(str(n), str(n)) for n in range(MAX_MEMBERS)))
    with pytest.raises(ClusterError, match="63 devices already"):
        full.with_member(Member("pi", worker.identity.certificate))


@pytest.mark.parametrize(("text", "address"), [
    ("pi", ("pi", 7440)), ("10.0.0.1:99", ("10.0.0.1", 99)), ("[fd00::1]:99", ("fd00::1", 99)),
    ("fd00::1", ("fd00::1", 7440))])
def test_addresses_as_people_write_them(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", ":7440", "pi:", "pi:0", "pi:99999", "pi:x"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ClusterError):
        parse_address(text)


class Server:
    """Answers one client by TLS, and says `hello` to whom it lets in."""

    def __init__(self, own: Identity, certificates: list[str]) -> None:
        self.socket, self._own, self._certificates = socket.create_server(("127.0.0.1", 0)), own, certificates
        self.port = self.socket.getsockname()[1]
        self.refusal = ""
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        connection, _ = self.socket.accept()
        connection.settimeout(DEADLINE_S)
        try:
            with self._own.answer(connection, self._certificates) as tls:
                tls.sendall(b"hello")
        except ClusterError as error:
            self.refusal = error.message

    def close(self) -> str:
        self._thread.join(DEADLINE_S)
        self.socket.close()
        return self.refusal


def heard(sock: socket.socket) -> bytes:
    sock.settimeout(DEADLINE_S)
    with sock:
        try:
            return sock.recv(100)
        except OSError:
            return b""


def test_paired_devices_speak_tls_1_3(leader: Membership, worker: Membership) -> None:
    server = Server(worker.identity, [leader.identity.certificate])
    tls = leader.identity.dial("127.0.0.1", server.port, worker.identity.certificate, DEADLINE_S)
    assert tls.version() == "TLSv1.3"
    assert heard(tls) == b"hello" and server.close() == ""


def test_a_foreign_client_hears_nothing(tmp_path: Path, leader: Membership, worker: Membership) -> None:
    stranger = Identity.load_or_create(tmp_path / "stranger", "laptop")
    for certificates in ([leader.identity.certificate], []):
        server = Server(worker.identity, certificates)
        try:
            tls = stranger.dial("127.0.0.1", server.port, worker.identity.certificate, DEADLINE_S)
        except ClusterError:
            pass
        else:
            assert heard(tls) == b""
        assert server.close()


def test_a_client_without_a_certificate_an_old_one_and_a_plain_one_hear_nothing(leader: Membership,
                                                                                worker: Membership) -> None:
    def certificate_less(port: int) -> bytes:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        try:
            return heard(context.wrap_socket(socket.create_connection(("127.0.0.1", port))))
        except OSError:
            return b""

    def plain(port: int) -> bytes:
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
        return heard(connection)[:0]  # a TLS alert may come, which says nothing

    for client in (certificate_less, plain):
        server = Server(worker.identity, [leader.identity.certificate])
        assert client(server.port) == b""
        assert server.close()


def test_an_expired_certificate_is_refused(tmp_path: Path, worker: Membership, monkeypatch: pytest.MonkeyPatch) -> None:
    own = worker.identity
    monkeypatch.setattr(identity, "_VALID_FOR", timedelta(seconds=-1))
    old = Identity.load_or_create(tmp_path / "old", "laptop")
    server = Server(own, [old.certificate])
    tls = old.dial("127.0.0.1", server.port, own.certificate, DEADLINE_S)
    assert heard(tls) == b"" and "expired" in server.close()


def test_a_server_that_is_somebody_else_is_not_spoken_to(tmp_path: Path, leader: Membership,
                                                        worker: Membership) -> None:
    stranger = Identity.load_or_create(tmp_path / "stranger", "pi")
    server = Server(stranger, [leader.identity.certificate])
    with pytest.raises(ClusterError, match="not the device that was paired"):
        leader.identity.dial("127.0.0.1", server.port, worker.identity.certificate, DEADLINE_S)
    assert server.close()


def test_a_certificate_that_a_paired_one_has_signed_is_not_the_paired_one(leader: Membership,
                                                                         worker: Membership) -> None:
    files = json.dumps([leader.identity.certificate, worker.identity.certificate])
    assert files  # both exist; what is compared is the certificate itself, to the byte
    with pytest.raises(ssl.SSLError, match="not the pinned one"):
        identity._check_pinned(_Peer(worker.identity.certificate), [leader.identity.certificate])
    identity._check_pinned(_Peer(leader.identity.certificate), [leader.identity.certificate])


class _Peer:
    def __init__(self, certificate: str) -> None:
        self._certificate = certificate

    def getpeercert(self, binary_form: bool) -> bytes:
        return ssl.PEM_cert_to_DER_cert(self._certificate)
