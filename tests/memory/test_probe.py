"""What is left of memory, from recorded trees of /proc and /sys: machines, containers, nested limits, none."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from edgert.memory.probe import ControlGroup, MemoryProbe

GIB = 2**30
MEMINFO = """\
MemTotal:       24683596 kB
MemFree:        17021864 kB
MemAvailable:   20971520 kB
Buffers:          170772 kB
"""
STATUS = """\
Name:\tpython3
VmPeak:\t  701432 kB
VmRSS:\t  365436 kB
RssAnon:\t  300000 kB
"""
V1_UNLIMITED = "9223372036854771712\n"
# One line for each hierarchy, as Linux writes them.
V1 = "9:name=systemd:/\n7:blkio:{path}\n4:memory:{path}\n1:cpu,cpuacct:{path}\n0::/\n"
V2 = "0::{path}\n"


class Tree:
    """A root directory with /proc and /sys of a machine with 20 GiB left."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/meminfo", MEMINFO)
        self.write("proc/self/status", STATUS)
        self.probe = MemoryProbe(root)

    def write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def v1(self, group: str, limit: str, usage: int, idle: int = 0) -> None:
        directory = f"sys/fs/cgroup/memory/{group}"
        self.write(f"{directory}/memory.limit_in_bytes", limit)
        self.write(f"{directory}/memory.usage_in_bytes", f"{usage}\n")
        self.write(f"{directory}/memory.stat", f"cache 9\ninactive_file 7\ntotal_inactive_file {idle}\n")

    def v2(self, group: str, limit: str, usage: int, idle: int = 0) -> None:
        directory = f"sys/fs/cgroup/{group}"
        self.write(f"{directory}/memory.max", limit)
        self.write(f"{directory}/memory.current", f"{usage}\n")
        self.write(f"{directory}/memory.stat", f"anon 5\nfile 9\ninactive_file {idle}\nactive_file 3\n")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_a_machine_without_control_groups(tree: Tree) -> None:
    assert tree.probe.process_bytes() == 365436 * 1024
    assert tree.probe.control_group() is None
    assert tree.probe.available_bytes() == 20 * GIB


def test_a_v1_limit(tree: Tree) -> None:
    tree.write("proc/self/cgroup", V1.format(path="/small"))
    tree.v1("", V1_UNLIMITED, 9 * GIB)
    tree.v1("small", f"{2 * GIB}\n", GIB // 2)
    assert tree.probe.control_group() == ControlGroup(2 * GIB, GIB // 2)
    assert tree.probe.available_bytes() == 3 * GIB // 2


def test_a_v2_limit(tree: Tree) -> None:
    tree.write("proc/self/cgroup", V2.format(path="/user.slice/session.scope"))
    tree.v2("user.slice/session.scope", f"{2 * GIB}\n", GIB // 2)
    tree.v2("user.slice", "max\n", 5 * GIB)
    assert tree.probe.control_group() == ControlGroup(2 * GIB, GIB // 2)
    assert tree.probe.available_bytes() == 3 * GIB // 2


@pytest.mark.parametrize("version", [1, 2])
def test_a_limit_far_above_counts_too(tree: Tree, version: int) -> None:
    tree.write("proc/self/cgroup", (V1 if version == 1 else V2).format(path="/pod/container/inner"))
    make, unlimited = (tree.v1, V1_UNLIMITED) if version == 1 else (tree.v2, "max\n")
    make("pod", f"{3 * GIB}\n", GIB)
    make("pod/container", unlimited, GIB)
    make("pod/container/inner", f"{8 * GIB}\n", GIB)
    assert tree.probe.control_group() == ControlGroup(3 * GIB, GIB)
    assert tree.probe.available_bytes() == 2 * GIB


@pytest.mark.parametrize("version", [1, 2])
def test_the_group_with_least_left_decides_what_is_available(tree: Tree, version: int) -> None:
    """A wide limit that siblings have used up is tighter than a narrow one that nobody uses."""
    tree.write("proc/self/cgroup", (V1 if version == 1 else V2).format(path="/pod/mine"))
    make = tree.v1 if version == 1 else tree.v2
    make("pod", f"{8 * GIB}\n", 7 * GIB)
    make("pod/mine", f"{4 * GIB}\n", GIB // 2)
    assert tree.probe.control_group() == ControlGroup(4 * GIB, GIB // 2)
    assert tree.probe.available_bytes() == GIB


@pytest.mark.parametrize("version", [1, 2])
def test_inside_a_container_the_root_is_the_container(tree: Tree, version: int) -> None:
    """With a namespace of its own the path is "/"; without, the path exists on the host only."""
    for path in ("/", "/docker/0123abcd", "/../../machine"):
        tree.write("proc/self/cgroup", (V1 if version == 1 else V2).format(path=path))
        (tree.v1 if version == 1 else tree.v2)("", f"{GIB}\n", GIB // 4)
        assert tree.probe.control_group() == ControlGroup(GIB, GIB // 4), path
        assert tree.probe.available_bytes() == 3 * GIB // 4


@pytest.mark.parametrize("version", [1, 2])
def test_idle_cache_can_be_taken(tree: Tree, version: int) -> None:
    """A model that was just copied into a container fills its cache: that is no reason to refuse it."""
    tree.write("proc/self/cgroup", (V1 if version == 1 else V2).format(path="/small"))
    (tree.v1 if version == 1 else tree.v2)("small", f"{2 * GIB}\n", 2 * GIB, idle=GIB)
    assert tree.probe.control_group() == ControlGroup(2 * GIB, 2 * GIB, GIB)
    assert tree.probe.available_bytes() == GIB


def test_both_versions_at_once(tree: Tree) -> None:
    tree.write("proc/self/cgroup", V1.format(path="/small"))
    tree.v1("small", f"{2 * GIB}\n", GIB)
    tree.write("sys/fs/cgroup/unified/cgroup.procs", "1\n")  # v2 without controllers
    assert tree.probe.control_group() == ControlGroup(2 * GIB, GIB)


@pytest.mark.parametrize(("version", "unlimited"), [(1, V1_UNLIMITED), (2, "max\n")])
def test_groups_without_a_limit_are_none(tree: Tree, version: int, unlimited: str) -> None:
    tree.write("proc/self/cgroup", (V1 if version == 1 else V2).format(path="/all"))
    (tree.v1 if version == 1 else tree.v2)("all", unlimited, GIB)
    assert tree.probe.control_group() is None
    assert tree.probe.available_bytes() == 20 * GIB


def test_a_limit_above_the_machine_leaves_the_machine(tree: Tree) -> None:
    tree.write("proc/self/cgroup", V2.format(path="/large"))
    tree.v2("large", f"{64 * GIB}\n", GIB)
    assert tree.probe.available_bytes() == 20 * GIB


def test_a_group_over_its_limit_has_nothing_left(tree: Tree) -> None:
    tree.write("proc/self/cgroup", V2.format(path="/full"))
    tree.v2("full", f"{GIB}\n", 2 * GIB)
    assert tree.probe.available_bytes() == 0


@pytest.mark.parametrize("text", ["", "nonsense\n", "4:memory\n", "4:memory:/gone\n", "0::/gone\n", ":::\n"])
def test_what_cannot_be_understood_is_no_limit(tree: Tree, text: str) -> None:
    tree.write("proc/self/cgroup", text)
    tree.write("sys/fs/cgroup/memory/memory.limit_in_bytes", "many\n")
    assert tree.probe.control_group() is None
    assert tree.probe.available_bytes() == 20 * GIB


def test_a_system_without_proc_says_nothing(tmp_path: Path) -> None:
    probe = MemoryProbe(tmp_path)
    assert (probe.process_bytes(), probe.available_bytes(), probe.control_group()) == (0, 0, None)


def test_this_machine() -> None:
    probe, process = MemoryProbe(), psutil.Process(os.getpid())
    assert abs(probe.process_bytes() - process.memory_info().rss) < 2**20
    assert 0 < probe.available_bytes() <= psutil.virtual_memory().total


# -- stalls ------------------------------------------------------------------------------------------------------------
PSI = "some avg10={} avg60=0.10 avg300=0.00 total=1\nfull avg10=99.00 avg60=0.00 avg300=0.00 total=0\n"


def test_stalls_are_those_of_the_own_control_group(tree: Tree) -> None:
    tree.write("proc/self/cgroup", "0::/app/small\n")
    tree.write("sys/fs/cgroup/app/small/memory.pressure", PSI.format("12.50"))
    tree.write("sys/fs/cgroup/app/memory.pressure", PSI.format("77.00"))
    assert tree.probe.stalled_percent() == 12.5


@pytest.mark.parametrize(("available_kib", "expected"), [(20 * 2**20, 0.0), (2**20, 40.0)])
def test_the_machines_stalls_count_only_where_it_is_short_itself(tree: Tree, available_kib: int,
                                                                 expected: float) -> None:
    """Else it is another control group that waits, and nothing given back here would help it."""
    tree.write("proc/meminfo", f"MemTotal: {24 * 2**20} kB\nMemAvailable: {available_kib} kB\n")
    tree.write("proc/pressure/memory", PSI.format("40.00"))
    assert tree.probe.stalled_percent() == expected


@pytest.mark.parametrize("text", ["", "some\n", "some avg10=many\n", "full avg10=1.0\n", "some avg60=1.0\n"])
def test_stalls_that_cannot_be_read_are_none(tree: Tree, text: str) -> None:
    tree.write("proc/self/cgroup", "0::/\n")
    tree.write("sys/fs/cgroup/memory.pressure", text)
    assert tree.probe.stalled_percent() == 0.0


def test_mapped_files_are_named_once_and_nothing_else_is(tree: Tree) -> None:
    tree.write("proc/self/maps", "\n".join((
        "55d0a6a00000-55d0a6c00000 r--p 00000000 fe:00 1058                       /usr/bin/python3.12",
        "55d0a6c00000-55d0a6e00000 r-xp 00200000 fe:00 1058                       /usr/bin/python3.12",
        "55d0a8000000-55d0a8200000 rw-p 00000000 00:00 0                          [heap]",
        "7f00a0000000-7f00a0200000 rw-p 00000000 00:00 0 ",
        "7f00b0000000-7f00b0200000 r--p 00000000 fe:00 77                         /opt/with a space/libggml.so")))
    assert tree.probe.mapped_files() == [Path("/opt/with a space/libggml.so"), Path("/usr/bin/python3.12")]


def test_without_proc_no_file_is_mapped(tmp_path: Path) -> None:
    assert MemoryProbe(tmp_path).mapped_files() == []
