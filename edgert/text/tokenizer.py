"""Text to token ids and back, with the vocabulary of a GGUF file, through libllama.

Knows which ids exist, what each stands for, and what libllama must not be given. Knows no chat format (template.py)
and does not put bytes together to characters (stream.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import index
from pathlib import Path
from typing import Self, SupportsIndex

from edgert.errors import ModelFileError, UsageError
from edgert.text.libllama import KIND_BPE, KIND_NONE, Vocabulary, load_vocabulary
from edgert.text.pretokenizer import ITERATIVE, split_deeply
from edgert.text.vocabulary_check import Check, start_check
from edgert.text.vocabulary_header import no_vocabulary

# A million tokens of English are 5 MiB. libllama's work on a text with very many special tokens grows with the
# square of their number (20,000 of them: 0.7 s), so there is an end even where memory suffices.
MAX_TEXT_BYTES = 16 * 2**20


class Tokenizer:
    """A model's vocabulary. `encode` may be called from several threads; holds 17 MiB (49k tokens) to 41 MiB (262k).

    `bos_text` and `eos_text` are how the file writes the begin and end tokens, for chat templates.
    """

    def __init__(self, path: Path, vocabulary: Vocabulary) -> None:
        self._path, self._vocabulary = path, vocabulary
        self.n_tokens = vocabulary.n_tokens
        self.bos_id = _known_or_none(vocabulary.bos_id)
        self.eos_id = _known_or_none(vocabulary.eos_id)
        self.adds_bos = vocabulary.adds_bos
        self.bos_text = self._text(self.bos_id)
        self.eos_text = self._text(self.eos_id)
        self._is_bpe = vocabulary.kind == KIND_BPE
        self._recurses = self._is_bpe and vocabulary.pre_tokenizer not in ITERATIVE
        self._pieces: tuple[dict[int, bytes], dict[int, bytes]] = ({}, {})

    @classmethod
    def open(cls, path: Path, check: Check | None = None) -> Self:
        """Load the vocabulary of `path`: 80 ms for 49k tokens, 260 ms for 152k, 420 ms for 262k; other threads run.

        Waits for `check` (or starts one) first. Raises ModelNotFound, ModelFileError, and UsageError for a file
        without a vocabulary.
        """
        with check or start_check(path) as running:
            running.wait()
        vocabulary = load_vocabulary(path)
        if vocabulary is None:
            raise ModelFileError(str(path), "vocabulary: libllama cannot load it")
        if vocabulary.kind == KIND_NONE:
            vocabulary.close()
            raise no_vocabulary(str(path))
        return cls(path, vocabulary)

    def encode(self, text: str | bytes, *, add_special: bool, parse_special: bool) -> list[int]:
        """The token ids of `text`.

        `add_special` adds the begin and end tokens that the vocabulary asks for; `parse_special` takes the text of
        special tokens as such. In bytes that are not UTF-8, byte-level BPE sees U+FFFD; SentencePiece has a token
        for each byte. Raises UsageError for a text that no tokenizer can split (see pretokenizer.py).
        """
        vocabulary = self._open_vocabulary()
        raw = _as_bytes(text)
        if len(raw) > MAX_TEXT_BYTES:
            raise UsageError(f"the text has {len(raw)} bytes", f"At most {MAX_TEXT_BYTES} can be tokenized at once.")

        def tokenize() -> list[int]:
            return vocabulary.tokenize(raw, add_special=add_special, parse_special=parse_special)

        if not self._is_bpe:
            return tokenize()
        # libllama ends the process on bytes that look like a code point above U+10FFFF.
        decoded = raw.decode("utf-8", errors="replace")
        raw = decoded.encode()
        return split_deeply(decoded, tokenize) if self._recurses else tokenize()

    def piece(self, token_id: int, *, special: bool = False) -> bytes:
        """The bytes that a token stands for; control tokens are empty unless `special`. Raises UsageError."""
        pieces = self._pieces[special]
        piece = pieces.get(token_id)
        if piece is None:
            vocabulary = self._open_vocabulary()
            piece = pieces[token_id] = vocabulary.piece(self._valid(token_id), special=special)
        return piece

    def decode(self, token_ids: Iterable[int], *, special: bool = False) -> bytes:
        """The pieces of `token_ids`, joined: what a stream of them shows. With SentencePiece a text begins with the
        space that encoding put before it.
        """
        return b"".join([self.piece(token_id, special=special) for token_id in token_ids])

    def is_end_of_generation(self, token_id: int) -> bool:
        """Whether a model that says this token has finished its answer or turn. Raises UsageError for unknown ids."""
        return self._open_vocabulary().is_end_of_generation(self._valid(token_id))

    def pieces(self) -> list[bytes]:
        """`piece` of every token, in the order of ids: 150 ms and 8 MiB for 152k tokens. Not kept."""
        return self._open_vocabulary().pieces()

    def end_ids(self) -> list[int]:
        """Every token for which `is_end_of_generation` is true."""
        return self._open_vocabulary().end_ids()

    def close(self) -> None:
        """Give the vocabulary's memory back. Not while another thread encodes."""
        self._vocabulary.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_vocabulary"):
            self.close()

    def _open_vocabulary(self) -> Vocabulary:
        if self._vocabulary.closed:
            raise UsageError(f"the tokenizer of {self._path} is closed", "Open it again.")
        return self._vocabulary

    def _valid(self, token_id: int) -> int:
        if not isinstance(token_id, SupportsIndex) or not 0 <= index(token_id) < self.n_tokens:
            raise UsageError(f"token id {token_id!r} is not in the vocabulary",
                             f"Ids are whole numbers from 0 to {self.n_tokens - 1}.")
        return index(token_id)

    def _text(self, token_id: int | None) -> str:
        return "" if token_id is None else self._vocabulary.text(token_id).decode("utf-8", errors="replace")


def _known_or_none(token_id: int) -> int | None:
    return token_id if token_id >= 0 else None


def _as_bytes(text: str | bytes) -> bytes:
    if isinstance(text, bytes):
        return text
    try:
        return text.encode("utf-8", errors="surrogateescape")  # as Python reads arguments that are not UTF-8
    except UnicodeEncodeError:
        raise UsageError("the text holds half of a surrogate pair", "Send text that can be written as UTF-8.") from None
