"""Finds and loads the shared libraries that llama-cpp-python installs.

Knows where they lie and that ggml's version is one that `abi.py` describes. Does not import the `llama_cpp`
package: that costs 170 ms and 30 MiB which a running answer does not need.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from edgert.errors import NativeLibraryError

_SUFFIXES = {"linux": (".so.0", ".so"), "darwin": (".0.dylib", ".dylib", ".so")}
# Read by the libraries when they load; what the user has set stays.
_ENVIRONMENT = {
    "GGML_NO_BACKTRACE": "1",  # an abort must not start a debugger on a user's machine
    # OpenMP's threads wait for each other some 500 times a token. Spinning without end, they hold the core that a
    # reader or another program needs: on a busy machine a token then takes a hundred times longer. Sleeping at once
    # costs 2.7x in decode. Spinning a little, then sleeping, costs neither.
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "20000",
}
# glibc's M_MMAP_THRESHOLD, set once and for all. By itself it grows with every large block that is freed, up to 32 MiB,
# and what is then freed below that stays with the process: 30 MiB after each model that is closed.
_M_MMAP_THRESHOLD, _MAPPED_FROM_BYTES = -3, 2**20
# And its M_TRIM_THRESHOLD, which then is 128 KiB: arrays of a step would be given back and faulted in again each time
# (choosing among 8k tokens: 71 faults and 260 us instead of 92).
_M_TRIM_THRESHOLD, _KEPT_BYTES = -1, 2**22
_INSTALL = "Run `make install` in edgert's directory, or `pip install llama-cpp-python==0.3.36`."


@dataclass(frozen=True, slots=True)
class Libraries:
    """The four libraries, loaded once per process. `version` is ggml's own (for example `0.25.3`)."""

    base: ctypes.CDLL
    cpu: ctypes.CDLL
    registry: ctypes.CDLL
    llama: ctypes.CDLL
    directory: Path
    version: str


def library_directory() -> Path:
    """The directory of llama-cpp-python's libraries, found without importing the package."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise NativeLibraryError("llama-cpp-python is not installed", _INSTALL)
    return Path(spec.origin).parent / "lib"


def _open(directory: Path, name: str) -> ctypes.CDLL:
    # The wheel holds lib.so and lib.so.0 as two files. The libraries refer to each other as .so.0,
    # so opening the other name would load a second copy with state of its own.
    for suffix in _SUFFIXES[sys.platform]:
        path = directory / f"lib{name}{suffix}"
        if path.exists():
            try:
                return ctypes.CDLL(str(path))
            except OSError as error:
                raise NativeLibraryError(f"{path} cannot be loaded: {error}", _INSTALL) from error
    raise NativeLibraryError(f"lib{name} is missing in {directory}", _INSTALL)


@cache
def load_libraries() -> Libraries:
    """Load the libraries. Raises NativeLibraryError with the way to install what is missing."""
    if sys.platform not in _SUFFIXES:
        raise NativeLibraryError(f"edgert does not run on {platform.system() or sys.platform} yet",
                                 "Use Linux (x86-64 or aarch64) or macOS; on Windows, use WSL 2.")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with contextlib.suppress(AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    directory = library_directory()
    base, cpu, registry, llama = (_open(directory, name) for name in ("ggml-base", "ggml-cpu", "ggml", "llama"))
    base.ggml_version.restype = ctypes.c_char_p
    return Libraries(base, cpu, registry, llama, directory, base.ggml_version().decode())


def trim_heap() -> None:
    """Let the system have what is free in the C library's heap, between what is in use too. Some 2 ms."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def package_version() -> str:
    """The installed version of llama-cpp-python."""
    return importlib.metadata.version("llama-cpp-python")
