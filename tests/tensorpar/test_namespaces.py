"""The user's own commands on hosts of their own: found over mDNS, paired by a code, and a cable that is cut."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.cluster_processes import DEADLINE_S, WorkerProcess, as_if_measured, pair
from benchmarks.namespaces import Family, Host, hosts, problem

_SERVE = "import socket; s = socket.create_server(('', 7450)); print('up', flush=True); s.accept()[0].recv(1)"
_WAIT = """
import socket, sys
from tensorpar.mesh import _notice_silence
sock = socket.create_connection((sys.argv[1], 7450))
_notice_silence(sock)
print("waits", flush=True)
sock.recv(1)
"""
# As patient as the leaders within this process (conftest.py).
_START = "import sys; from tensorpar import pace; pace._SLOW = 1e9; from apps.cli.main import main; sys.exit(main())"


@pytest.fixture(scope="module", autouse=True)
def namespaces_are_possible(require: Callable[[object, str], None]) -> None:
    why_not = problem()
    require(not why_not, why_not)


@pytest.fixture
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("qwen2", quantisation="F32", n_heads=8, n_kv_heads=4, head_dim=32, n_layers=4)


def start(host: Host, home: Path, *words: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*host.prefix, sys.executable, "-c", _START, *map(str, words)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**os.environ, "EDGERT_HOME": str(home)})


def run(host: Host, home: Path, *words: object) -> tuple[int, str, str]:
    process = start(host, home, *words)
    out, err = process.communicate(timeout=DEADLINE_S)
    return process.returncode, out.decode(), err.decode()


@pytest.fixture
def pairs_of_hosts() -> Iterator[Callable[..., list[Host]]]:
    opened = []

    def make(family: Family = "IPv4", n: int = 2) -> list[Host]:
        context = hosts(n, family)
        opened.append(context)
        return context.__enter__()

    yield make
    for one in opened:
        one.__exit__(None, None, None)


@pytest.mark.parametrize("family", ["IPv4", "IPv6"])
def test_invite_join_up_run_without_an_address(model: Path, tmp_path: Path, family: Family,
                                               pairs_of_hosts: Callable[[Family], list[Host]]) -> None:
    laptop, pi = pairs_of_hosts(family)
    home, other = tmp_path / "laptop", tmp_path / "pi"
    for one in (home, other):
        as_if_measured(one)
    assert run(laptop, home, "cluster", "init", "--name", "laptop")[0] == 0
    inviting = start(laptop, home, "cluster", "invite", "--json")
    assert inviting.stdout is not None
    code = json.loads(inviting.stdout.readline())["code"]
    status, out, err = run(pi, other, "cluster", "join", code, "--name", "pi")
    assert (status, out) == (0, "Joined laptop. Now `edgert cluster up`.\n"), err
    assert json.loads(inviting.communicate(timeout=DEADLINE_S)[0]) == {"joined": "pi"}
    if family == "IPv6":
        return
    members = home / "config" / "cluster" / "members.json"
    forgotten = json.loads(members.read_text())
    forgotten["members"][0]["host"] = ""  # so that only mDNS knows where it is
    members.write_text(json.dumps(forgotten))
    worker = WorkerProcess("pi", other, 7440, prefix=pi.prefix).start()
    try:
        command = ("run", model, "hello", "--raw", "--temp", 0, "--max-tokens", 8, "--json", "--threads", 1)
        alone = json.loads(run(laptop, home, *command)[1])
        status, out, err = run(laptop, home, *command, "--cluster", "--devices", "all")
        together = json.loads(out)
        assert [one["name"] for one in together["plan"]["cluster"]["devices"]] == ["laptop", "pi"], err
        assert together["token_ids"] == alone["token_ids"]
    finally:
        worker.kill()


def said_while(happen: Callable[[], None], leader: Host, home: Path, model: Path) -> bytes:
    """What an answer of all devices says on standard error when this happens in its middle. Its text is the leader's
    alone."""
    command = ("run", model, "hello", "--raw", "--temp", 0, "--max-tokens", 400, "--threads", 1, "--context", 512)
    _, expected, _ = run(leader, home, *command)
    process = start(leader, home, *command, "--cluster", "--devices", "all")
    assert process.stdout is not None
    begun = os.read(process.stdout.fileno(), 4)
    happen()
    rest, err = process.communicate(timeout=DEADLINE_S)
    assert begun + rest == expected.encode() and process.returncode == 0
    return bytes(err)


def test_a_cable_that_is_cut_in_an_answer(model: Path, tmp_path: Path,
                                          pairs_of_hosts: Callable[[Family], list[Host]]) -> None:
    laptop, pi = pairs_of_hosts("IPv4")
    home = tmp_path / "laptop"
    pair(home, tmp_path / "pi", "pi", pi.address, 7440)
    for one in (home, tmp_path / "pi"):
        as_if_measured(one)
    worker = WorkerProcess("pi", tmp_path / "pi", 7440, ("--no-mdns",), pi.prefix).start()
    try:
        assert b"pi was lost" in said_while(pi.cut, laptop, home, model)
    finally:
        worker.kill()


def test_workers_that_lose_each_other_and_not_the_leader(model: Path, tmp_path: Path,
                                                         pairs_of_hosts: Callable[..., list[Host]]) -> None:
    laptop, *others = pairs_of_hosts("IPv4", 3)
    home, workers = tmp_path / "laptop", []
    as_if_measured(home)
    for number, host in enumerate(others, start=1):
        own = tmp_path / f"worker{number}"
        pair(home, own, own.name, host.address, 7440)
        as_if_measured(own)
        workers.append(WorkerProcess(own.name, own, 7440, ("--no-mdns",), host.prefix).start())

    def part() -> None:
        for host, other in (others, others[::-1]):
            host.lose(other)

    try:
        err = said_while(part, laptop, home, model)
        assert b"sums go through this device" in err and b"was lost (" not in err
    finally:
        for worker in workers:
            worker.kill()


def test_who_only_waits_for_another_worker_notices_a_dead_cable(pairs_of_hosts: Callable[..., list[Host]]) -> None:
    one, other = pairs_of_hosts()
    with subprocess.Popen([*other.prefix, sys.executable, "-c", _SERVE], stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None and server.stdout.readline() == b"up\n"
            with subprocess.Popen([*one.prefix, sys.executable, "-c", _WAIT, other.address], stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE) as waiting:
                try:
                    assert waiting.stdout is not None and waiting.stdout.readline() == b"waits\n"
                    other.cut()
                    assert b"TimeoutError" in waiting.communicate(timeout=DEADLINE_S)[1]
                finally:
                    waiting.kill()
        finally:
            server.kill()


def test_the_doctor_names_what_is_wrong(tmp_path: Path, pairs_of_hosts: Callable[[Family], list[Host]]) -> None:
    laptop, pi = pairs_of_hosts("IPv4")
    home = tmp_path / "laptop"
    pair(home, tmp_path / "pi", "pi", pi.address, 7440)
    for one in (home, tmp_path / "pi"):
        as_if_measured(one)
    as_if_measured(tmp_path / "pi")
    worker = WorkerProcess("pi", tmp_path / "pi", 7440, (), pi.prefix).start()
    try:
        status, out, _ = run(laptop, home, "cluster", "doctor")
        assert status == 0 and "FAIL" not in out, out
        for what in ("interfaces", "multicast here", *(f"pi: {one}" for one in ("mDNS", "port", "certificate",
                                                                                  "version", "clock"))):
            assert f"ok    {what}" in out
        for one in (laptop, pi):
            one.keep_multicast_back()
        pair(home, tmp_path / "ghost", "ghost", pi.address, 7441)
        pair(home, tmp_path / "other", "other", pi.address, 7440)  # it has forgotten this one, or was set up anew
        status, out, _ = run(laptop, home, "cluster", "doctor")
        failed = {": ".join(line.removeprefix("FAIL  ").split(": ")[:2]) for line in out.splitlines()
                  if line.startswith("FAIL")}
        assert status == 12
        assert failed == {"pi: mDNS", "ghost: mDNS", "ghost: port", "other: mDNS", "other: certificate"}, out
    finally:
        worker.kill()


_ASK_SPEED = """
import sys
from pathlib import Path
from benchmarks.cluster_processes import paths_under
from tensorpar.members import Membership
from tensorpar.workers import ClusterOptions, Workers
workers = Workers(Membership.load(paths_under(Path(sys.argv[1]))), ClusterOptions("all", discovery_s=0), lambda: None)
assert not workers.connect()
print(workers.connected[0].bytes_per_s)
workers.close()
"""


def test_a_narrow_cable_is_measured(tmp_path: Path, pairs_of_hosts: Callable[[Family], list[Host]]) -> None:
    laptop, pi = pairs_of_hosts("IPv4")
    pair(tmp_path / "laptop", tmp_path / "pi", "pi", pi.address, 7440)
    as_if_measured(tmp_path / "pi")
    worker = WorkerProcess("pi", tmp_path / "pi", 7440, ("--no-mdns",), pi.prefix).start()
    try:
        pi.limit(80)
        asked = subprocess.run([*laptop.prefix, sys.executable, "-c", _ASK_SPEED, tmp_path / "laptop"],
                               capture_output=True, timeout=DEADLINE_S, check=True)
        assert 2e6 < float(asked.stdout) < 1.2e7  # 80 Mbit/s are 10 MB/s
    finally:
        worker.kill()
