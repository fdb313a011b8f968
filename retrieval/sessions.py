"""Keys and values that outlive the process: a text that was computed once is not computed again.

A session is a directory: records of its tokens, a card that names them, and a lock while somebody has it open
(retrieval/session_list.py has them all). Records are appended; where a text goes another way, the card first forgets
what is then written over. So whatever moment a process dies at, what the card names is whole, and a checksum for each
record tells what the disk has done to it since.
"""

from __future__ import annotations

import logging
import os
import shutil
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgert.architectures.base import Hyperparameters
from edgert.engine.kv_cache import DenseKVCache, KVCache
from edgert.errors import KVStoreError, NoSpace, UsageError
from edgert.ggml.backend import Backend
from retrieval.cache import RetrievedKVCache
from retrieval.cold import ColdTier, DenseTier
from retrieval.record_file import RecordFile
from retrieval.records import Records, RecordShape
from retrieval.session_card import Damaged, SessionCard
from retrieval.session_list import CARD, forget_oldest, path_of, take_lock
from retrieval.staged import in_blocks, record_blocks

_SELECTOR = "selector.f32"
_log = logging.getLogger(__name__)


class Session:
    """One session, held by this process alone until `close`."""

    def __init__(self, directory: Path, name: str, fingerprint: str, model: str, hp: Hyperparameters) -> None:
        """Raises UsageError for a name that is none, another model's session, or one that is open elsewhere;
        KVStoreError."""
        self.name, self._path = name, path_of(directory, name)
        self._root, self._hp, self._fingerprint, self._model = directory, hp, fingerprint, model
        self._kinds = {"full": RecordShape.full(hp), "window": RecordShape.windowed(hp)}
        self._kinds = {kind: shape for kind, shape in self._kinds.items() if shape.layers}
        self._files: dict[str, RecordFile] = {}
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            self._lock = take_lock(self._path)
        except OSError as error:
            raise KVStoreError(str(self._path), f"cannot be opened: {error.strerror}",
                               "Set EDGERT_HOME to a directory that can be written to.") from error
        try:
            self._card = self._read_card()
            self._n_whole = self._card.n_tokens  # of them, those whose records are as they were written
        except BaseException:
            os.close(self._lock)
            raise

    def _read_card(self) -> SessionCard:
        empty = SessionCard(self._model, self._fingerprint, self._shape, np.zeros(0, np.int32),
                            {kind: np.zeros(0, np.uint32) for kind in self._kinds})
        try:
            card = SessionCard.read(self._path / CARD)
        except FileNotFoundError:
            return empty
        except Damaged as error:
            _log.warning("session %s begins anew: its card %s", self.name, error)
            return empty
        if card.fingerprint != self._fingerprint or card.shape != self._shape or {*card.checksums} != {*self._kinds}:
            raise UsageError(f"session {self.name!r} is of another model ({card.model!r})",
                             f"Name another session, or remove it: edgert rm --session {self.name}")
        return card

    @property
    def _shape(self) -> tuple[int, ...]:
        return (*(number for shape in self._kinds.values() for number in (len(shape.layers), shape.stride_bytes)),
                self._hp.kv_size)

    @property
    def conversation(self) -> dict[str, Any]:
        """What was said, as whoever saved it wrote it down."""
        return self._card.conversation

    # -- bringing back -------------------------------------------------------------------------------------------
    def restore(self, kv: KVCache, backend: Backend, *, is_exact: bool = False) -> list[int]:
        """Fill an empty cache with what is whole of the session's tokens and, with `is_exact`, does not come of steps
        over a set; their ids. The rest is computed again."""
        n_tokens = min(self._card.n_tokens, kv.context_length - 1)
        if is_exact and n_tokens > self._card.n_exact:
            _log.warning("session %s: %d of its tokens followed steps over a set, and are computed again", self.name,
                         n_tokens - self._card.n_exact)
            n_tokens = self._card.n_exact
        if n_tokens and isinstance(kv, RetrievedKVCache) and not self._restore_selector(kv):
            _log.warning("session %s is computed anew: it was kept without this retrieval head", self.name)
            n_tokens = 0
        done = 0
        try:
            with record_blocks(backend, self._hp) as blocks:
                for first in range(0, n_tokens, blocks[0].n_rows):
                    n = min(blocks[0].n_rows, n_tokens - first)
                    for records, kind in zip(blocks, self._kinds, strict=True):
                        positions = np.arange(first, first + n, dtype=np.int64)
                        self._file(kind, n_tokens).read(positions, [row.data for row in records.rows[:n]])
                    _fill(kv, blocks, first, n, n_tokens)
                    done = first + n
        except KVStoreError as error:
            _log.warning("session %s: %s; %d of its tokens are computed again", self.name, error.message,
                         n_tokens - done)
        token_ids, self._n_whole = [int(one) for one in self._card.token_ids[:done]], done
        if isinstance(kv, RetrievedKVCache):
            kv.token_ids[:] = array("i", token_ids)
            if done > self._card.n_exact:
                kv.approximate_from = self._card.n_exact
        return token_ids

    def _restore_selector(self, kv: RetrievedKVCache) -> bool:
        if not kv.selector.state_size(1):
            return True
        try:
            raw = np.fromfile(self._path / _SELECTOR, np.float32, kv.selector.state_size(self._card.n_tokens))
        except OSError:
            return False
        if self._card.selector != kv.selector.identity or zlib.crc32(raw.data) != self._card.selector_checksum:
            return False
        kv.selector.restore(raw, self._card.n_tokens)
        return True

    # -- keeping -------------------------------------------------------------------------------------------------
    def save(self, kv: KVCache, backend: Backend, token_ids: Sequence[int], conversation: dict[str, Any]) -> None:
        """Keep the cache's tokens, of which `token_ids` are the ids. Raises KVStoreError, NoSpace: what was kept before
        is then still there, as far as the text is the same."""
        ids = np.array(token_ids[:kv.length], np.int32)
        held = self._card.token_ids
        n_same = min(len(ids), len(held), self._n_whole)
        n_same = int(np.argmin([*(ids[:n_same] == held[:n_same]), False]))
        try:
            if n_same < self._card.n_tokens:
                self._replace(self._shortened(n_same))
            self._append(kv, backend, n_same, len(ids))
            card = replace(self._shortened(len(ids), ids), n_exact=self._n_exact(kv, n_same, len(ids)))
            self._replace(replace(self._keep_selector(kv, card), conversation=conversation))
            self._n_whole = len(ids)
        except OSError as error:
            raise KVStoreError(str(self._path), f"writing failed: {error.strerror}") from error
        forget_oldest(self._root, self.name)

    def _shortened(self, n: int, token_ids: Any = None) -> SessionCard:
        ids = self._card.token_ids if token_ids is None else token_ids
        checksums = {kind: (self._files[kind].checksums if kind in self._files else self._card.checksums[kind])[:n]
                     for kind in self._kinds}
        return replace(self._card, token_ids=ids[:n], checksums=checksums, selector="" if token_ids is None else
                       self._card.selector, n_exact=min(n, self._card.n_exact))

    def _n_exact(self, kv: KVCache, n_same: int, n_tokens: int) -> int:
        """Of the records: the first `n_same` are those that the card speaks of, the others are the cache's."""
        n_exact = min(n_tokens, kv.approximate_from) if isinstance(kv, RetrievedKVCache) else n_tokens
        return n_exact if n_same <= self._card.n_exact else min(n_exact, self._card.n_exact)

    def _append(self, kv: KVCache, backend: Backend, start: int, end: int) -> None:
        needed = (end - start) * sum(shape.stride_bytes for shape in self._kinds.values())
        free_bytes = shutil.disk_usage(self._path).free
        if needed > free_bytes:
            raise NoSpace(str(self._path), needed, free_bytes)
        source = _source(kv)
        with record_blocks(backend, self._hp) as blocks:
            kinds = dict(zip((id(block) for block in blocks), self._kinds, strict=True))
            for records, first, n in in_blocks(blocks, start, end):
                source.fetch(records, np.arange(n, dtype=np.int64), np.arange(first, first + n, dtype=np.int64))
                self._file(kinds[id(records)], kv.context_length).write(first, [row.data for row in records.rows[:n]])
        for file in self._files.values():
            file.sync()

    def _keep_selector(self, kv: KVCache, card: SessionCard) -> SessionCard:
        if not isinstance(kv, RetrievedKVCache) or not kv.selector.state_size(1):
            return replace(card, selector="", selector_checksum=0)
        state, partial = kv.selector.state(card.n_tokens), self._path / f"{_SELECTOR}.partial"
        with partial.open("wb") as file:
            file.write(state.tobytes())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._path / _SELECTOR)
        return replace(card, selector=kv.selector.identity, selector_checksum=zlib.crc32(state.tobytes()))

    def _replace(self, card: SessionCard) -> None:
        card.write(self._path / CARD)
        self._card = card

    def _file(self, kind: str, n_records: int) -> RecordFile:
        file = self._files.get(kind)
        if file is None or file.n_records < n_records:
            old = self._card.checksums[kind] if file is None else file.checksums
            if file is not None:
                file.close()
            stride = self._kinds[kind].stride_bytes
            file = self._files[kind] = RecordFile(self._path / f"{kind}.kv", stride, max(n_records, len(old)))
            file.checksums[:len(old)] = old
        return file

    def close(self) -> None:
        """Let another process have the session."""
        for file in self._files.values():
            file.close()
        os.close(self._lock)


def _source(kv: KVCache) -> ColdTier:
    """Who has all of the cache's tokens."""
    if isinstance(kv, RetrievedKVCache):
        return kv.holder()
    assert isinstance(kv, DenseKVCache)
    return DenseTier(kv)


def _fill(kv: KVCache, blocks: list[Records], first: int, n: int, n_tokens: int) -> None:
    if isinstance(kv, RetrievedKVCache):
        kv.fill(blocks, first, n, n_tokens)
        return
    assert isinstance(kv, DenseKVCache)
    for records in blocks:
        DenseTier(kv).write_through(records, first, n)
    kv.length = first + n
