"""GGUF files with nothing but a vocabulary, for tests of tokenizers: SentencePiece, and the tiny BPE one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tiny_gguf import MetaValue, write_gguf
from tiny_vocabulary import vocabulary_keys

_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
_WORDS = ("▁", "▁h", "he", "ll", "llo", "hello", "▁hello", "▁world", "wor", "ld", "or", "w", "o", "h", "e", "l", "r",
          "d")


def spm_keys(missing_byte: int | None = None) -> dict[str, MetaValue]:
    """A SentencePiece vocabulary with byte tokens, all of them or all but one."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256) if byte != missing_byte]
    tokens = ["<unk>", "<s>", "</s>", *byte_tokens, *_WORDS]
    types = [_UNKNOWN, _CONTROL, _CONTROL, *[_BYTE] * len(byte_tokens), *[_NORMAL] * len(_WORDS)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [float(len(token)) for token in tokens],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def bpe_keys() -> dict[str, MetaValue]:
    return vocabulary_keys(300)


def write_vocabulary(path: Path, keys: Mapping[str, MetaValue]) -> Path:
    """A GGUF without tensors."""
    return write_gguf(path, {"general.architecture": "llama", **keys}, [])
