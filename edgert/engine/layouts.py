"""Which layout of a weight computes fastest: as the file holds it, or repacked for this CPU's vector registers.

ggml repacks some types (Q4_0, Q4_K and others). A repacked Q4_K is faster for one token and slower for a prompt, where
the plain type has a tiled kernel; Q4_0 gains in both. So both may be held: the file's pages for one phase and a
repacked copy for the other. What to do is measured on this machine once and kept; it never depends on the budget.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

from edgert.cache_file import read_cache, write_cache
from edgert.engine.batch import Phase
from edgert.errors import UsageError
from edgert.ggml.abi import TYPE_F32
from edgert.ggml.backend import Allocator, Backend, Buffer
from edgert.ggml.functions import ggml
from edgert.ggml.graph import Context, Graph, Tensor
from edgert.ggml.types import multipliable_types

Layout = Literal["plain", "repack"]
LayoutChoice = Literal["auto", "plain", "repack"]
# A matrix of a small model's size; 2 * n_rows * n_columns * 512 operations take some 20 ms on one slow core.
_N_COLUMNS, _N_ROWS = 1024, 1024
_N_TOKENS: dict[Phase, int] = {"decode": 1, "prefill": 256}
# A second copy of the weights has to earn its place: below this gain the file's own layout stays.
_MIN_GAIN = 1.03


@dataclass(frozen=True, slots=True)
class Layouts:
    """The layout of each tensor type (by number) in each phase. Types that are absent are plain."""

    repacked: Mapping[Phase, frozenset[int]]

    def of(self, type_id: int, phase: Phase) -> Layout:
        return "repack" if type_id in self.repacked[phase] else "plain"


@cache
def repack_buffer_type(device: int) -> int | None:
    """The CPU backend's repacking buffer type, or None where this build has none."""
    base = ggml().base
    registry = base.ggml_backend_dev_backend_reg(device)
    address = base.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return None
    function = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)
    buffer_types = function(device)
    index = 0
    while buffer_types and (handle := buffer_types[index]):
        if b"REPACK" in base.ggml_backend_buft_name(handle):
            return int(handle)
        index += 1
    return None


def can_repack(backend: Backend, weight: Tensor) -> bool:
    """Whether ggml multiplies by this matrix in the repacked layout (its type, its shape, this CPU)."""
    buffer_type = repack_buffer_type(backend.device)
    if buffer_type is None or weight.type not in multipliable_types():
        return False
    base = ggml().base
    probe = Graph(16)
    empty = base.ggml_backend_buft_alloc_buffer(buffer_type, 0)
    try:
        stand_in = probe.tensor(weight.type, weight.ne[:3] if weight.ne[2] > 1 else weight.ne[:2])
        stand_in.struct.buffer = empty
        if weight.ne[2] > 1:
            ids = probe.tensor(26, (1, 512))
            product = probe.mul_mat_id(stand_in, probe.tensor(TYPE_F32, (weight.ne[0], 1, 512)), ids)
        else:
            product = probe.mul_mat(stand_in, probe.tensor(TYPE_F32, (weight.ne[0], 512)))
        return bool(base.ggml_backend_dev_supports_op(backend.device, product.address))
    finally:
        base.ggml_backend_buffer_free(empty)
        probe.close()


def choose_layouts(choice: LayoutChoice, backend: Backend, types: frozenset[int], cache_file: Path) -> Layouts:
    """The layouts for these tensor types. `auto` measures the types that `cache_file` does not know yet."""
    if choice not in get_args(LayoutChoice):
        raise UsageError(f"--layout {choice} is unknown", f"Choose one of {', '.join(get_args(LayoutChoice))}.")
    if choice != "auto":
        chosen = types if choice == "repack" else frozenset[int]()
        return Layouts({"prefill": chosen, "decode": chosen})
    key = backend.speed_key
    known = {device: gains for device, gains in read_cache(cache_file).items() if _is_sound(gains)}
    gains = known.get(key, {})
    missing = [t for t in sorted(types) if str(t) not in gains]
    if missing:
        gains = {**gains, **{str(t): _measure(backend, t) for t in missing}}
        write_cache(cache_file, {**known, key: gains})
    phases: tuple[Phase, ...] = ("prefill", "decode")
    return Layouts({phase: frozenset(t for t in types if gains[str(t)].get(phase, 0.0) >= _MIN_GAIN)
                    for phase in phases})


def _measure(backend: Backend, type_id: int) -> dict[str, float]:
    """Speed of repacked over plain, for each phase. Empty where ggml does not repack the type."""
    context = Context(2)
    buffers: list[Buffer] = []
    try:
        weights = [context.tensor(type_id, (_N_COLUMNS, _N_ROWS)) for _ in range(2)]
        repack = repack_buffer_type(backend.device)
        if repack is None or not can_repack(backend, weights[0]):
            return {}
        raw = (ctypes.c_uint8 * weights[0].n_bytes)()
        for weight, buffer_type in zip(weights, (None, repack), strict=True):
            buffers.append(backend.alloc("calibration", weight.n_bytes + 64, buffer_type))
            buffers[-1].place(weight, buffers[-1].base)
            ggml().base.ggml_backend_tensor_set(weight.address, raw, 0, weight.n_bytes)
        return {phase: _gain(backend, weights, n) for phase, n in _N_TOKENS.items()}
    finally:
        for buffer in buffers:
            buffer.close()
        context.close()


def _gain(backend: Backend, weights: list[Tensor], n_tokens: int) -> float:
    """Plain time over repacked time: best of several, in turn, so that a busy machine slows both alike."""
    n_products = 8 if n_tokens == 1 else 1
    runs: list[Callable[[], float]] = []
    owned: list[Allocator | Graph] = []
    for weight in weights:
        graph, allocator = Graph(2 * n_products + 8), Allocator(backend)
        x = graph.input("x", TYPE_F32, (_N_COLUMNS, n_tokens))
        for _ in range(n_products):
            graph.output(graph.mul_mat(weight, x))
        allocator.alloc(graph)
        owned += [allocator, graph]
        runs.append(lambda graph=graph: _time(backend, graph))  # type: ignore[misc]
    best = [float("inf")] * 2
    for _ in range(6):
        best = [min(b, run()) for b, run in zip(best, runs, strict=True)]
    for resource in owned:
        resource.close()
    return best[0] / best[1]


def _time(backend: Backend, graph: Graph) -> float:
    start = time.perf_counter()
    backend.compute(graph)
    return time.perf_counter() - start


def _is_sound(gains: object) -> bool:
    return isinstance(gains, dict) and all(
        isinstance(by_phase, dict) and all(isinstance(gain, (int, float)) for gain in by_phase.values())
        for by_phase in gains.values())
