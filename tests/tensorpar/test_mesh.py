"""Links between workers: made by an introduction, good for sums and nothing else, and no reason to wait for ever."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.cluster_processes import DEADLINE_S, TestCluster, cluster, paths_under
from edgert.errors import ClusterError, PeerLost
from edgert.runtime import Runtime
from edgert.text.sampler import SamplingParams
from tensorpar.collectives import Abandoned, Group, MeshBroken, Network
from tensorpar.frames import BadFrame, Kind, Moment
from tensorpar.link import Link
from tensorpar.members import Membership
from tensorpar.messages import Introduced, Introduction, network_of_message
from tensorpar.workers import ClusterOptions

NETWORK = Network(1e-4, 1e9, True)
PROMPT = list(range(5, 45))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    with cluster(tmp_path_factory.mktemp("mesh"), 2, measured=False) as running:
        yield running


@pytest.fixture
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("qwen2", quantisation="F32", n_heads=8, n_kv_heads=4, head_dim=32, n_layers=4)


def load(model: Path, options: ClusterOptions | None) -> Runtime:
    return Runtime.load(model, threads=1, context=512, layout="plain", cluster=options)


def answer(runtime: Runtime) -> list[int]:
    generation = runtime.generate(PROMPT, max_tokens=16, sampling=SamplingParams(temperature=0))
    generation.result()
    return generation.token_ids


def dial_as(made: TestCluster, home: Path, target: int) -> Link:
    """A connection to a worker with the identity that lies in a home."""
    own, leader = Membership.load(paths_under(home)), Membership.load(made.leader_paths)
    assert own is not None and leader is not None
    member = leader.members[target]
    return Link(own.identity.dial(member.host, member.port, member.certificate, DEADLINE_S))


@pytest.mark.parametrize("algorithm", ["star", "one-shot", "scatter"])
def test_three_devices_sum_with_and_without_the_leader_between(model: Path, made: TestCluster, algorithm: str,
                                                               at_home: Callable[[Path], None]) -> None:
    at_home(made.leader_home)
    with load(model, None) as alone:
        expected = answer(alone)
    options = ClusterOptions("all", discovery_s=0, algorithm=algorithm)  # type: ignore[arg-type]
    with load(model, options) as runtime:
        assert answer(runtime) == expected
        plan = runtime.plan()["cluster"]
        assert len(plan["devices"]) == 3 and plan["is_mesh"] == (algorithm != "star")


def test_an_introduction_opens_no_other_door(model: Path, made: TestCluster, at_home: Callable[[Path], None]) -> None:
    at_home(made.leader_home)
    first, second = made.workers
    with load(model, ClusterOptions("all", discovery_s=0)) as runtime:
        expected = answer(runtime)
        for hello in ({"purpose": "status"}, {"purpose": "work", "session": "x"}, {"purpose": "pulse", "session": "x"},
                      {"purpose": "rank", "rank": 2, "meeting": "0" * 32}, {"purpose": "rank", "rank": 1}):
            link = dial_as(made, second.home, 0)  # rank 1 was told of rank 2
            link.send_message(Kind.HELLO, dict(hello))
            with pytest.raises(PeerLost):
                link.peek(within_s=DEADLINE_S)
            link.close()
        with pytest.raises((ClusterError, PeerLost)):  # rank 2 dials, and is dialled by nobody
            link = dial_as(made, first.home, 1)
            link.send_message(Kind.HELLO, {"purpose": "rank", "rank": 1, "meeting": "0" * 32})
            link.peek(within_s=DEADLINE_S)
        assert answer(runtime) == expected
    with pytest.raises((ClusterError, PeerLost)):  # the epoch is over, and the introduction with it
        link = dial_as(made, second.home, 0)
        link.send_message(Kind.HELLO, {"purpose": "status"})
        link.peek(within_s=DEADLINE_S)


def group(rank: int, n_links: int) -> tuple[Group, list[Link]]:
    """A rank of three, and the other ends of its links to the ranks before it."""
    ours, theirs = {}, []
    for other in range(n_links):
        a, b = socket.socketpair()
        ours[other if rank else other + 1] = Link(a, other if rank else other + 1)
        theirs.append(Link(b, rank))
    return Group(rank, 3, ours, epoch=1, network=NETWORK), theirs


def test_who_waits_for_a_worker_hears_the_leader() -> None:
    follower, (leader, other) = group(2, 2)
    follower._links[1].is_due = follower.look
    assert not follower.look()
    leader.send(Kind.PROBE, Moment(0), bytes(64))
    with pytest.raises(Abandoned):
        follower._receive(follower._links[1], Kind.PART, memoryview(bytearray(64)))
    other.send(Kind.PART, Moment(1, 5), bytes(64))  # the other one is at a later pass already
    with pytest.raises(Abandoned):
        follower._receive(follower._links[1], Kind.PART, memoryview(bytearray(64)))
    for link in (leader, other):
        link.close()


def test_who_stopped_between_telling_the_leader_and_a_worker_is_not_waited_for() -> None:
    follower, (leader, other) = group(2, 2)
    awaited = follower._links[1]
    awaited.is_due, awaited.stall_s = follower.look, 0.05
    leader.send(Kind.PART, Moment(1, 0, 1), bytes(64))  # the next sum's: it has all parts of this one
    leader.send_message(Kind.SETUP, {})  # the survivors' next epoch, which nobody sees behind it
    with pytest.raises(PeerLost) as lost:
        follower._receive(awaited, Kind.PART, memoryview(bytearray(64)))
    assert lost.value.rank == 1
    for link in (leader, other):
        link.close()


def test_a_link_between_workers_that_breaks_is_no_worker_that_is_lost() -> None:
    leads, (first, second) = group(0, 2)
    first.send_message(Kind.FAULT, {"problem": "device 2 was lost", "lost": 2})
    with pytest.raises(MeshBroken):
        leads._receive(leads._links[1], Kind.PART, memoryview(bytearray(64)))
    for link in (first, second):
        link.close()


def test_without_a_mesh_all_sums_go_through_the_leader() -> None:
    lonely = Group(1, 3, {}, network=replace(NETWORK, is_mesh=False), algorithm="one-shot")
    assert lonely.algorithm(64) == "star"
    lonely.join({}, NETWORK)
    assert lonely.algorithm(64) == "one-shot"


def test_introductions_are_doubted(made: TestCluster) -> None:
    leader = Membership.load(made.leader_paths)
    assert leader is not None
    sound = Introduction("0" * 32, (Introduced(2, "10.0.0.2", 7440, leader.members[0].certificate),)).to_dict()
    assert Introduction.of_message({**sound, "others": list(sound["others"])}).others[0].host == "10.0.0.2"
    (other,) = sound["others"]
    for lie in ({}, {**sound, "meeting": "x"}, {**sound, "others": 5}, {**sound, "others": [5]},
                *({**sound, "others": [{**other, key: value}]} for key, value in (
                    ("rank", 0), ("rank", True), ("port", 0), ("certificate", "x"), ("certificate", None)))):
        with pytest.raises(BadFrame):
            Introduction.of_message(lie)
    with pytest.raises(BadFrame):
        network_of_message({"latency_s": -1, "bytes_per_s": 1e9})
