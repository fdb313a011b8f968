"""Where GGUFs lie on this machine: edgert's own directory, the user's, and other programs' (read only).

Knows the environment variables and layouts of the hub's cache, LM Studio and llama.cpp. Does not look into the
directories: scan.py does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgert.errors import UsageError

# "repos": user/repo/file.gguf; "hub_cache": models--user--repo/snapshots/REVISION/file.gguf; "plain": anything.
Layout = Literal["repos", "hub_cache", "plain"]


@dataclass(frozen=True, slots=True)
class Place:
    """A directory that may hold models. Only the place that is `ours` is ever written to."""

    path: Path
    layout: Layout
    ours: bool = False


def places(own: Path, models_dirs: Sequence[Path], environ: Mapping[str, str]) -> list[Place]:
    """All places, the more particular ones first. Raises UsageError if one of `models_dirs` is no directory."""
    found = [Place(own, "repos", ours=True)]
    for directory in models_dirs:
        path = directory.expanduser()
        if not path.is_dir():
            raise UsageError(f"--models-dir {directory}: there is no such directory", "Create it, or correct its name.")
        found.append(Place(path, "plain"))
    # A directory that only the environment names may be on a disk that is not there today.
    listed = environ.get("EDGERT_MODELS_DIR", "").split(os.pathsep)
    found += [Place(Path(text).expanduser(), "plain") for text in listed if text]
    found += _other_programs(environ)
    return found


def _other_programs(environ: Mapping[str, str]) -> Iterator[Place]:
    home = Path(environ.get("HOME") or Path.home())
    cache = Path(environ.get("XDG_CACHE_HOME") or home / ".cache")
    yield Place(_hub_cache(environ, cache), "hub_cache")
    yield Place(home / ".lmstudio" / "models", "repos")
    yield Place(home / ".cache" / "lm-studio" / "models", "repos")
    # llama.cpp keeps the hub's layout in $LLAMA_CACHE since 2026 and flat files before.
    llama = environ.get("LLAMA_CACHE")
    for directory in [Path(llama)] if llama else [cache / "llama.cpp", home / "Library" / "Caches" / "llama.cpp"]:
        yield Place(directory, "hub_cache")
        yield Place(directory, "plain")


def _hub_cache(environ: Mapping[str, str], cache: Path) -> Path:
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environ.get(variable):
            return Path(environ[variable]).expanduser()
    if environ.get("HF_HOME"):
        return Path(environ["HF_HOME"]).expanduser() / "hub"
    return cache / "huggingface" / "hub"
