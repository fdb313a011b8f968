"""Who is not paired is refused while an answer goes on undisturbed; and what a paired leader may say has bounds too."""

from __future__ import annotations

import argparse
import json
import random
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import edgert
from apps.cli.arguments import cluster_options
from apps.cli.main import main
from apps.cluster.doctor import _examine_device
from benchmarks.cluster_processes import DEADLINE_S, TestCluster, WorkerProcess, cluster, pair
from edgert.errors import ClusterError
from edgert.runtime import Runtime
from edgert.text.sampler import SamplingParams
from tensorpar.frames import Kind, Moment, pack
from tensorpar.identity import Identity
from tensorpar.link import Link
from tensorpar.members import Membership
from tensorpar.workers import ClusterOptions

GREEDY = SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    with cluster(tmp_path_factory.mktemp("cluster"), 1, measured=False) as running:
        yield running


def dial(worker: WorkerProcess) -> socket.socket:
    return socket.create_connection(("127.0.0.1", worker.port), DEADLINE_S)


def paired(made: TestCluster, hello: dict[str, object]) -> Link:
    membership = Membership.load(made.leader_paths)
    assert membership is not None
    member = membership.members[0]
    link = Link(membership.identity.dial(member.host, member.port, member.certificate, DEADLINE_S))
    link.send_message(Kind.HELLO, hello)
    return link


def test_an_answer_goes_on_while_strangers_knock(made: TestCluster, tiny_model: Callable[..., Path], tmp_path: Path,
                                                 at_home: Callable[[Path], None]) -> None:
    model = tiny_model("llama", quantisation="F32", n_heads=8, n_kv_heads=4)
    at_home(made.leader_home)
    worker, rng = made.workers[0], random.Random(0)
    stranger = Identity.load_or_create(tmp_path / "stranger", "leader")
    certificate = Membership.load(made.leader_paths).members[0].certificate  # type: ignore[union-attr]
    idle = []
    with Runtime.load(model, threads=1, context=512, cluster=ClusterOptions("all", discovery_s=0)) as runtime:
        expected = runtime.generate(list(range(40)), max_tokens=30, sampling=GREEDY)
        expected.result()
        generation, n_pieces = runtime.generate(list(range(40)), max_tokens=30, sampling=GREEDY), 0
        for n_pieces, _ in enumerate(generation, start=1):
            with suppress(OSError), dial(worker) as plain:
                plain.sendall(rng.choice((b"GET / HTTP/1.1\r\n\r\n", rng.randbytes(200),
                                          pack(Kind.HELLO, Moment(0), 2**18))))
            with suppress(ClusterError, OSError), stranger.dial("127.0.0.1", worker.port, certificate, 5.0) as tls:
                assert tls.recv(10) == b""
            if n_pieces <= 10:
                idle.append(dial(worker))  # says nothing, and stays
        assert n_pieces >= 30 and generation.token_ids == expected.token_ids
        assert len(runtime.plan()["cluster"]["devices"]) == 2
    for one in idle:
        one.close()
    assert 1 <= worker.log().count("was refused") <= 4  # a line in ten seconds, not one for each


@pytest.mark.parametrize("hello", [{}, {"purpose": "rule"}, {"purpose": "pulse", "session": "of nobody"},
                                   {"purpose": ["work"]}])
def test_a_paired_client_with_an_unknown_wish_is_shown_out(made: TestCluster, hello: dict[str, object]) -> None:
    link = paired(made, hello)
    with pytest.raises(ClusterError):
        link.peek(within_s=DEADLINE_S)
    link.close()


def test_a_leader_without_heartbeats_or_with_senseless_plans_is_dropped(made: TestCluster) -> None:
    link = paired(made, {"purpose": "work", "session": "x"})
    link.receive_message(Kind.READY)
    link.send_message(Kind.SETUP, {"epoch": 1, "rank": 7})
    with pytest.raises(ClusterError, match=r"closed|broke"):
        link.peek(within_s=DEADLINE_S)
    link.close()


def test_status_names_devices_and_what_they_do(made: TestCluster, at_home: Callable[[Path], None],
                                               capsys: pytest.CaptureFixture[str]) -> None:
    at_home(made.leader_home)
    assert main(["cluster", "status", "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["name"], status["role"]) == ("leader", "leader")
    device, = status["devices"]
    assert device["name"] == "worker1" and device["session"] is None and device["rtt_ms"] > 0
    assert main(["cluster", "status"]) == 0
    shown = capsys.readouterr().out
    assert "leader leads; 1 other devices" in shown and "worker1" in shown and "waits" in shown


def test_the_doctor_sees_another_version(made: TestCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    membership = Membership.load(made.leader_paths)
    assert membership is not None
    member = membership.members[0]
    for version, failed in ((edgert.__version__, []), ("99.1", ["worker1: version"])):
        monkeypatch.setattr("edgert.__version__", version)
        found = list(_examine_device(membership, member, [(member.host, member.port)]))
        assert [one.what for one in found if not one.is_well] == failed
        assert len(found) == 4 and all("99.1" in one.remedy for one in found if not one.is_well)


def test_plan_predicts_every_set_of_devices(made: TestCluster, at_home: Callable[[Path], None],
                                            tiny_model: Callable[..., Path],
                                            capsys: pytest.CaptureFixture[str]) -> None:
    at_home(made.leader_home)
    model = tiny_model("llama", n_heads=8, n_kv_heads=4)
    assert main(["cluster", "plan", str(model), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {tuple(one["devices"]) for one in plan["predictions"]} == {("leader",), ("leader", "worker1")}
    assert plan["predictions"][0]["tokens_per_s"] >= plan["predictions"][1]["tokens_per_s"]
    assert main(["cluster", "plan", str(model)]) == 0
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "said"), [
    (("cluster", "invite"), "leads no cluster"), (("cluster", "up"), "in no cluster"),
    (("cluster", "status"), "in no cluster"), (("cluster", "forget", "pi"), "in no cluster"),
    (("serve", "--port", "0", "--cluster"), "leads no cluster"), (("chat", "--cluster"), "leads no cluster"),
    (("cluster", "join", "7-otter-lamp", "--peer", "127.0.0.1:1"), "does not answer"),
])
def test_what_cannot_be_done_is_said_with_the_next_step(tmp_path: Path, at_home: Callable[[Path], None],
                                                        capsys: pytest.CaptureFixture[str], words: tuple[str, ...],
                                                        said: str) -> None:
    at_home(tmp_path)
    assert main(list(words)) == ClusterError.exit_code
    assert said in capsys.readouterr().err


def test_missing_packages_are_named(tmp_path: Path, at_home: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    at_home(tmp_path)
    monkeypatch.setattr("apps.cluster.extra._PACKAGES", ("cryptography", "not_installed_anywhere"))
    assert main(["cluster", "init"]) == ClusterError.exit_code
    said = capsys.readouterr().err
    assert "needs not_installed_anywhere" in said and "edgert[cluster]" in said
    with pytest.raises(ClusterError, match="not_installed_anywhere"):  # `run --cluster` too
        cluster_options(argparse.Namespace(cluster=True))
    assert cluster_options(argparse.Namespace(cluster=False)) is None


def test_a_device_is_forgotten(tmp_path: Path, at_home: Callable[[Path], None],
                               capsys: pytest.CaptureFixture[str]) -> None:
    pair(tmp_path, tmp_path / "worker", "pi", "127.0.0.1", 1)
    at_home(tmp_path)
    assert main(["cluster", "forget", "pi"]) == 0
    assert main(["cluster", "status"]) == 0
    assert "0 other devices" in capsys.readouterr().out
