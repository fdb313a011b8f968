"""The environment block: what a figure was measured with and on. No names of people, hosts or directories."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from apps.bench import thermal
from edgert.cache_file import read_cache, write_cache
from edgert.cpu import cpu_model
from edgert.version import VERSION

_GIT_DEADLINE_S = 5.0
_CHUNK_BYTES = 4 * 2**20
_MAX_HASHES = 1000
_MAX_TEXT = 200


def environment(root: Path = Path("/")) -> dict[str, Any]:
    """Versions, processor, governor, kernel and memory of this device; None for what it does not tell."""
    from edgert.ggml.library import load_libraries, package_version

    return {
        "edgert_version": VERSION, "edgert_commit": commit(Path(__file__).parents[2]),
        "ggml_version": load_libraries().version, "llama_cpp_python_version": package_version(),
        "python": platform.python_version(), "kernel": platform.release(), "machine": platform.machine(),
        "device": device_name(root), "cpu": cpu_name(root / "proc/cpuinfo"), "n_cpus": os.cpu_count(),
        "memory_bytes": _memory_bytes(root), "governor": thermal.governor(root), "power_mode": thermal.power_mode(),
        "huge_pages": _chosen(_text(root / "sys/kernel/mm/transparent_hugepage/enabled")),
    }


def commit(repository: Path) -> str | None:
    """The commit that runs, with `-dirty` where files differ from it; None outside a repository."""
    if not (repository / ".git").exists():
        return None
    command = ["git", "-C", str(repository), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_DEADLINE_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip()[:_MAX_TEXT] or None


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, or its architecture where the system does not tell it."""
    return cpu_model(cpuinfo) or platform.machine()


def device_name(root: Path = Path("/")) -> str | None:
    """The board (`NVIDIA Jetson Orin Nano`, `Raspberry Pi 5 Model B`) or the product."""
    for place in ("proc/device-tree/model", "sys/class/dmi/id/product_name"):
        name = _text(root / place).strip("\0 ")
        if name:
            return name[:_MAX_TEXT]
    return None


def model_sha256(paths: Sequence[Path], cache: Path, advance: Callable[[int], None] = lambda n_bytes: None) -> str:
    """SHA-256 of a model's file, or of its parts' one after the other. Known files, by path, size and time, are not
    read again. `advance` is told how many bytes were hashed."""
    known = read_cache(cache)
    stats = [path.stat() for path in paths]
    key = "|".join(f"{path.absolute()}:{stat.st_size}:{stat.st_mtime_ns}"
                   for path, stat in zip(paths, stats, strict=True))
    if isinstance(known.get(key), str):
        return str(known[key])
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                advance(len(chunk))
    write_cache(cache, dict([*known.items(), (key, digest.hexdigest())][-_MAX_HASHES:]))
    return digest.hexdigest()


def _memory_bytes(root: Path) -> int | None:
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return None


def _chosen(text: str) -> str | None:
    """`madvise` of `always [madvise] never`."""
    return text.partition("[")[2].partition("]")[0] or None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
