from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest
from trees import INTEL, ORIN_NANO, write_tree

from apps.bench import page_cache
from apps.bench.environment import commit, cpu_name, device_name, environment, model_sha256
from apps.bench.survey import disk


def test_a_device_is_named_by_its_board_or_its_product(tmp_path: Path) -> None:
    assert device_name(write_tree(tmp_path / "a", ORIN_NANO)) == "NVIDIA Jetson Orin Nano Developer Kit"
    assert device_name(write_tree(tmp_path / "b", INTEL)) == "ThinkPad X1"
    assert device_name(tmp_path / "c") is None


def test_the_environment_names_nobody(tmp_path: Path) -> None:
    write_tree(tmp_path, ORIN_NANO | {"proc/meminfo": "MemTotal:  1000 kB\n", "proc/cpuinfo": "model name\t: Fast\n",
                                      "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n"})
    told = environment(tmp_path)
    assert (told["memory_bytes"], told["huge_pages"], told["governor"]) == (1024_000, "madvise", "schedutil")
    assert told["cpu"] == "Fast" and told["ggml_version"]
    said = str(told)
    assert os.uname().nodename not in said and str(Path.home()) not in said


def test_the_processors_name_is_found_or_its_architecture(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Fast CPU @ 3 GHz\nmodel name\t: other\n")
    assert cpu_name(tmp_path / "cpuinfo") == "Fast CPU @ 3 GHz"
    assert cpu_name(tmp_path / "missing")


def test_a_commit_tells_whether_files_differ_from_it(tmp_path: Path) -> None:
    assert commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    (tmp_path / "file").write_text("1")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    clean = commit(tmp_path)
    assert clean is not None and len(clean) == 12
    (tmp_path / "file").write_text("2")
    assert commit(tmp_path) == f"{clean}-dirty"


def test_a_models_hash_is_computed_once(tmp_path: Path) -> None:
    parts = [tmp_path / "a", tmp_path / "b"]
    for part, content in zip(parts, (b"x" * 5_000_000, b"y"), strict=True):
        part.write_bytes(content)
    cache, hashed = tmp_path / "cache" / "sha256.json", list[int]()
    wanted = hashlib.sha256(b"x" * 5_000_000 + b"y").hexdigest()
    assert model_sha256(parts, cache, hashed.append) == wanted and sum(hashed) == 5_000_001
    assert model_sha256(parts, cache, hashed.append) == wanted and sum(hashed) == 5_000_001
    os.utime(parts[1], ns=(0, 7))  # perhaps another file
    assert model_sha256(parts, cache, hashed.append) == wanted and sum(hashed) == 10_000_002


def test_the_page_cache_forgets_and_remembers(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(bytes(2**20))
        os.fsync(file.fileno())
    page_cache.warm([path])
    if page_cache.cached_share([path]) is None:
        pytest.skip("this system does not tell what is cached")
    assert page_cache.cached_share([path]) == 1.0
    page_cache.forget([path])
    # A file system in memory keeps what it has.
    assert page_cache.cached_share([path]) in (0.0, 1.0)


def test_a_disk_is_told_with_every_sample(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(2**22))
    told = disk(path, 0.03)
    assert len(told["samples_bytes_s"]) == 3 and told["bytes_s"] == sorted(told["samples_bytes_s"])[1] > 0
