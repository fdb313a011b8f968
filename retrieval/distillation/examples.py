"""What a head learns from, on disk: one file a sequence, written once by the teacher and read in every epoch.

Knows which tokens are asked about. A file is complete or absent, so capturing goes on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray

from retrieval.distillation.synthetic import ANSWER, N_KINDS, Piece, compose
from retrieval.distillation.targets import targets_of
from retrieval.distillation.teacher import Teacher
from retrieval.distillation.text import Document

Encode = Callable[[str], list[int]]
# Of a sequence. The teacher's attention costs the square of it, so short ones show more facts in the same time; gaps in
# the positions (training.py) stand for longer contexts.
N_TOKENS = 1024
RUN = 32  # queries are consecutive tokens, so that what the step before attended to is known
_SYNTHETIC_SHARE, _CODE_SHARE = 0.35, 0.4  # of the sequences
_FILLER_SHARE = 0.6  # of a synthetic sequence's tokens
_N_TEXT_RUNS = 24
_MAX_QUERIES = 1024
HELD_OUT_KINDS = (1, 4, 7)  # kinds of facts that only held-out sequences have


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence as a head sees it. `queries` are ascending positions t: the step that reads token t."""

    features: NDArray[np.float16]  # (n_tokens, n_features)
    roles: NDArray[np.uint8]  # (n_tokens,) TEXT, FACT or ANSWER
    queries: NDArray[np.int32]  # (n_queries,)
    tokens: NDArray[np.uint16]  # (n_queries, N_KEPT): the most attended
    mean: NDArray[np.float16]
    peak: NDArray[np.float16]

    def save(self, path: Path) -> None:
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez(file, **{f.name: getattr(self, f.name) for f in fields(self)})
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Example:
        with np.load(path, allow_pickle=False) as arrays:
            return cls(**{f.name: arrays[f.name] for f in fields(cls)})


@dataclass(frozen=True, slots=True)
class Sequences:
    """Makes the sequence of any number, the same for the same seed and texts. Held-out ones have kinds of their own."""

    documents: Sequence[Document]
    encode: Encode
    seed: int
    held_out: bool = False
    n_tokens: int = N_TOKENS

    def make(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.uint8], bool]:
        """Token ids and roles, and whether it is synthetic. Some of those held out are longer than what is learned
        from."""
        rng = Random(f"{self.seed}/{self.held_out}/{index}")
        n_tokens = 2 * self.n_tokens if self.held_out and index % 6 == 5 else self.n_tokens
        is_synthetic = (index * 7 % 20) < 20 * _SYNTHETIC_SHARE
        is_code = rng.random() < _CODE_SHARE  # whatever there is more of
        kind = [document for document in self.documents if document.is_code == is_code] or self.documents
        filler = self._filler(kind, rng, 6 * n_tokens)
        if not is_synthetic:
            return *self._encoded([Piece(filler)], n_tokens, from_end=False), False
        filler = filler[:int(len(filler) * _FILLER_SHARE * n_tokens / len(self.encode(filler)))]
        kinds = [k for k in range(N_KINDS) if (k in HELD_OUT_KINDS) == self.held_out]
        return *self._encoded(compose(filler, rng, kinds), n_tokens, from_end=True), True

    def _filler(self, documents: Sequence[Document], rng: Random, n_chars: int) -> str:
        text = ""
        while len(text) < n_chars:
            document = rng.choice(documents)
            start = rng.randrange(max(1, len(document.text) - n_chars))
            text += document.text[start:start + n_chars - len(text)] + "\n\n"
        return text

    def _encoded(self, pieces: Sequence[Piece], n_tokens: int,
                 *, from_end: bool) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        ids, roles = list[int](), list[int]()
        for piece in pieces:
            encoded = self.encode(piece.text)
            ids += encoded
            roles += [piece.role] * len(encoded)
        part = slice(-n_tokens, None) if from_end else slice(n_tokens)
        return np.array(ids[part], np.int32), np.array(roles[part], np.uint8)


def queries_of(roles: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.int32]:
    """Positions to learn from: every answer with a little before it, and runs of consecutive tokens."""
    n_tokens = len(roles)
    wanted = np.zeros(n_tokens, bool)
    answers = np.flatnonzero(roles == ANSWER)
    for back in range(4):
        wanted[np.maximum(answers - back, 0)] = True
    n_runs = _N_TEXT_RUNS if not len(answers) else _N_TEXT_RUNS // 2
    for start in rng.integers(n_tokens // 8, n_tokens - RUN, n_runs):
        wanted[start:start + RUN] = True
    wanted[:64] = False  # everything is recent there
    return np.flatnonzero(wanted)[-_MAX_QUERIES:].astype(np.int32)


def capture(teacher: Teacher, sequences: Sequences, index: int) -> Example:
    """Run one sequence through the teacher."""
    ids, roles, _ = sequences.make(index)
    queries = queries_of(roles, np.random.default_rng((sequences.seed, index)))
    seen = teacher.watch(ids, queries)
    targets = targets_of(seen, queries)
    return Example(seen.features.astype(np.float16), roles, queries, targets.tokens, targets.mean, targets.peak)
