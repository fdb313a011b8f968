"""The libraries are found, are the version that is bound, and lay out their structures as described, or say so."""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from edgert.errors import NativeLibraryError
from edgert.ggml import abi, functions, library
from edgert.ggml.library import load_libraries, package_version

_OFFSET_OF_NAME = [name for name, _ in abi.TensorStruct._fields_].index("name")


def test_the_installed_version_is_the_one_that_is_bound() -> None:
    assert load_libraries().version.startswith("0.25.")
    assert package_version() == "0.3.36"
    assert load_libraries() is load_libraries()


def test_the_layout_of_the_installed_library_is_as_described() -> None:
    abi.check_layout(functions.ggml())


@pytest.mark.parametrize("position", range(_OFFSET_OF_NAME + 1))
def test_a_field_more_anywhere_before_the_name_is_noticed(position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = list(abi.TensorStruct._fields_)
    fields.insert(position, ("new_in_another_ggml", ctypes.c_int64))
    monkeypatch.setattr(abi, "TensorStruct", type("Changed", (ctypes.Structure,), {"_fields_": tuple(fields)}))
    with pytest.raises(NativeLibraryError, match="lays out its tensors differently") as raised:
        abi.check_layout(functions.ggml())
    assert "pip install llama-cpp-python==" in raised.value.next_step


@pytest.mark.parametrize(("first", "second"), [("ne", "nb"), ("view_src", "view_offs"), ("view_src", "data"),
                                              ("view_offs", "data"), ("src", "name")])
def test_fields_in_another_order_are_noticed(first: str, second: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = list(abi.TensorStruct._fields_)
    names = [name for name, _ in fields]
    i, j = names.index(first), names.index(second)
    fields[i], fields[j] = fields[j], fields[i]
    monkeypatch.setattr(abi, "TensorStruct", type("Changed", (ctypes.Structure,), {"_fields_": tuple(fields)}))
    with pytest.raises(NativeLibraryError):
        abi.check_layout(functions.ggml())


def test_a_function_that_the_library_lacks_is_named() -> None:
    with pytest.raises(NativeLibraryError, match="ggml has no function ggml_of_tomorrow"):
        functions._declare(load_libraries().base, {"ggml_of_tomorrow": (None, [])})


def test_without_the_package_the_way_to_install_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NativeLibraryError, match="not installed") as raised:
        library.load_libraries.__wrapped__()
    assert "make install" in raised.value.next_step


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "library_directory", lambda: tmp_path)
    with pytest.raises(NativeLibraryError, match="libggml-base is missing"):
        library.load_libraries.__wrapped__()


def test_a_damaged_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suffix = library._SUFFIXES[sys.platform][0]
    (tmp_path / f"libggml-base{suffix}").write_bytes(b"no library")
    monkeypatch.setattr(library, "library_directory", lambda: tmp_path)
    with pytest.raises(NativeLibraryError, match="cannot be loaded"):
        library.load_libraries.__wrapped__()


def test_an_unknown_platform_is_told_where_edgert_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(NativeLibraryError, match="does not run on") as raised:
        library.load_libraries.__wrapped__()
    assert "WSL" in raised.value.next_step


_FREED = """
import ctypes, psutil
from edgert.ggml.library import load_libraries
load_libraries()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def block(n_bytes):
    address = libc.malloc(n_bytes)
    ctypes.memset(address, 1, n_bytes)
    return address
libc.free(block(24 << 20))  # glibc now takes blocks of this size for ordinary ones, unless told otherwise
large, small = block(16 << 20), block(4096)
before = psutil.Process().memory_info().rss
libc.free(large)
print(before - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_large_blocks_that_are_freed_go_back_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", _FREED], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) > 12 << 20


_TAKEN_AGAIN = """
import resource
import numpy as np
from edgert.ggml.library import load_libraries
load_libraries()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    return len([np.ones(32 * 1024) for _ in range(12)])
step()
before = faults()
for _ in range(100):
    step()
print(faults() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_what_a_step_frees_stays_for_the_next_one() -> None:
    done = subprocess.run([sys.executable, "-c", _TAKEN_AGAIN], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) < 500, "pages are faulted in with every step"
