"""Weights that are all in memory: the file mapped as it lies, and a repacked copy of what computes faster so."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.architectures.base import EMBEDDING, Architecture, Block, TensorSpec, Weights, blocks_of
from edgert.engine.batch import Phase
from edgert.engine.layouts import Layouts, can_repack, repack_buffer_type
from edgert.errors import ModelFileError, OutOfMemory
from edgert.ggml.backend import Backend, Buffer
from edgert.ggml.functions import ggml
from edgert.ggml.graph import Context, Tensor
from edgert.gguf.model_file import ModelFile

_PHASES: tuple[Phase, ...] = ("prefill", "decode")


class MappedFile:
    """One part of a model in memory, read-only and shared with the page cache."""

    def __init__(self, path: str, backend: Backend) -> None:
        try:
            with open(path, "rb") as file:  # noqa: PTH123
                flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
                self._map = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ)
        except (OSError, ValueError) as error:  # ValueError: the file is empty now
            reason = error.strerror if isinstance(error, OSError) else error
            raise ModelFileError(path, f"cannot be mapped: {reason}") from error
        self._bytes: np.ndarray[tuple[int], np.dtype[np.uint8]] | None = np.frombuffer(self._map, np.uint8)
        self.address = int(self._bytes.ctypes.data)
        self.buffer = backend.wrap(self.address, len(self._map))
        self.buffer.mark_as_weights()

    def close(self) -> None:
        self.buffer.close()
        self._bytes = None
        with contextlib.suppress(BufferError):  # a view of it is alive: the map goes with that view
            self._map.close()


class ResidentWeights:
    """A WeightSource that holds every block. Memory: the file's pages, and the repacked tensors once more."""

    resident = stay = True
    n_output_parts = n_ffn_parts = 1
    experts = None
    waited_s = 0.0

    def __init__(self, backend: Backend, model: ModelFile, arch: Architecture, layouts: Layouts) -> None:
        self._backend = backend
        self._parts: list[MappedFile] = []
        self._context = Context(2 * len(model.tensors) + 8)
        self._model = model
        self._plain: dict[str, Tensor] = {}
        self._repacked: dict[str, Tensor] = {}
        self._repack_buffer: Buffer | None = None
        self.repacked_bytes = 0
        self._blocks: dict[tuple[Block, Phase], Weights] = {}
        specs = {block: [s for s in arch.specs(block) if s.name in model.tensors] for block in blocks_of(arch.hp)}
        try:
            for path in model.parts:
                self._parts.append(MappedFile(str(path), backend))
            self._map_plain(specs)
            self._repack(specs, layouts)
        except BaseException:
            self.close()
            raise
        for block, needed in specs.items():
            for phase in _PHASES:
                self._blocks[block, phase] = {s.key: self._tensor(s, phase, layouts) for s in needed}

    @property
    def pinned_bytes(self) -> int:
        return self._model.file_bytes + self.repacked_bytes

    @property
    def streamed_bytes(self) -> int:
        return 0

    def plan(self) -> dict[str, Any]:
        return {"weights": "resident", "repacked_bytes": self.repacked_bytes}

    def _map_plain(self, specs: dict[Block, list[TensorSpec]]) -> None:
        for spec in (s for needed in specs.values() for s in needed):
            if spec.name in self._plain:
                continue
            info = self._model.tensors[spec.name]
            tensor = self._context.tensor(info.type.id, spec.shape, spec.name)
            part = self._parts[info.part]
            if info.offset + info.n_bytes > part.buffer.size_bytes:
                raise ModelFileError(str(self._model.parts[info.part]), "has become shorter since its header was read",
                                     "Start again with the whole file.")
            part.buffer.place(tensor, part.address + info.offset)
            self._plain[spec.name] = tensor

    def _repack(self, specs: dict[Block, list[TensorSpec]], layouts: Layouts) -> None:
        """Copy the matrices that any phase wants repacked into one buffer, in the repacked layout."""
        wanted = [name for name in dict.fromkeys(s.name for needed in specs.values() for s in needed
                                                 if s.use == "matrix")
                  if any(layouts.of(self._plain[name].type, phase) == "repack" for phase in _PHASES)
                  and can_repack(self._backend, self._plain[name])]
        buffer_type = repack_buffer_type(self._backend.device)
        if not wanted or buffer_type is None:
            return
        base = ggml().base
        align = int(base.ggml_backend_buft_get_alignment(buffer_type))
        sizes = [-(-int(base.ggml_backend_buft_get_alloc_size(buffer_type, self._plain[n].address)) // align) * align
                 for n in wanted]
        self.repacked_bytes = sum(sizes)
        try:
            self._repack_buffer = self._backend.alloc("the repacked weights", self.repacked_bytes + align, buffer_type)
        except OutOfMemory as error:
            raise OutOfMemory(error.what, error.needed_bytes, "Use --layout plain, or close other programs.") from None
        address = -(-self._repack_buffer.base // align) * align
        for name, size in zip(wanted, sizes, strict=True):
            plain = self._plain[name]
            tensor = self._context.tensor(plain.type, self._model.tensors[name].shape, name)
            self._repack_buffer.place(tensor, address)
            base.ggml_backend_tensor_set(tensor.address, plain.data, 0, plain.n_bytes)
            self._repacked[name] = tensor
            address += size

    def _tensor(self, spec: TensorSpec, phase: Phase, layouts: Layouts) -> Tensor:
        plain = self._plain[spec.name]
        if spec.use == "matrix" and layouts.of(plain.type, phase) == "repack":
            return self._repacked.get(spec.name, plain)
        return plain

    @contextmanager
    def lease_embedding(self, token_ids: NDArray[np.int32],
                        phase: Phase) -> Iterator[tuple[Weights, NDArray[np.int32]]]:
        yield self._blocks[EMBEDDING, phase], token_ids

    @contextmanager
    def lease(self, block: Block, phase: Phase) -> Iterator[Weights]:
        yield self._blocks[block, phase]

    def close(self) -> None:
        if self._repack_buffer is not None:
            self._repack_buffer.close()
            self._repack_buffer = None
        self._context.close()
        for part in self._parts:
            part.close()
        self._parts = []
