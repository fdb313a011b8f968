"""Checks what a header says about the vocabulary, before libllama, which ends the process on surprises, sees it.

Knows the keys and their bounds; reads no token. What only shows when the tokens are read (a token twice, bytes that
no token stands for) is found in a child process, see vocabulary_check.py.
"""

from __future__ import annotations

from edgert.errors import ModelFileError, UsageError
from edgert.gguf.model_file import ModelFile
from edgert.gguf.values import ArrayRef, ValueType
from edgert.text.pretokenizer import REFUSED

# SentencePiece and byte-level BPE: what the supported architectures are trained with. libllama knows more (t5, bert,
# rwkv, plamo2), of which some throw while a text is split, depending on the text.
TOKENIZERS = ("llama", "gpt2")
NO_VOCABULARY = ("no_vocab", "none")
MAX_TOKENS = 2**20  # four times the largest vocabulary in use; libllama takes about 200 bytes a token
MAX_MERGES = 2**22


def has_vocabulary(file: ModelFile) -> bool:
    """Whether text can be tokenized at all with this model."""
    return file.get_str("tokenizer.ggml.model", NO_VOCABULARY[0]) not in NO_VOCABULARY


def no_vocabulary(path: str) -> UsageError:
    return UsageError(f"{path}: the file has no vocabulary; give token ids",
                      "Use a model with a tokenizer, or the Python interface with token ids.")


def check_header(file: ModelFile) -> None:
    """Raise UsageError for a file without a vocabulary, ModelFileError for one whose description cannot be right."""
    if not has_vocabulary(file):
        raise no_vocabulary(str(file.path))
    tokenizer = file.get_str("tokenizer.ggml.model")
    if tokenizer not in TOKENIZERS:
        raise _problem(file, f"tokenizer {tokenizer[:40]!r} is not supported; {' and '.join(TOKENIZERS)} are")
    pre_tokenizer = file.get_str("tokenizer.ggml.pre", "")
    if pre_tokenizer in REFUSED:
        raise _problem(file, f"pre-tokenizer {pre_tokenizer!r} is not supported")
    n_tokens = _length(file, "tokenizer.ggml.tokens", MAX_TOKENS, strings=True)
    if tokenizer == "gpt2":
        _length(file, "tokenizer.ggml.merges", MAX_MERGES, strings=True)
    for key in ("tokenizer.ggml.scores", "tokenizer.ggml.token_type"):
        if file.has(key) and (count := _length(file, key, MAX_TOKENS, strings=False)) < n_tokens:
            raise _problem(file, f"{key} has {count} entries for {n_tokens} tokens")


def _length(file: ModelFile, key: str, maximum: int, *, strings: bool) -> int:
    value = file.metadata.get(key)
    holds_strings = isinstance(value, ArrayRef) and value.element_type is ValueType.STRING
    if not isinstance(value, (ArrayRef, tuple)) or holds_strings != strings:
        raise _problem(file, f"{key} is missing or no array of {'texts' if strings else 'numbers'}")
    count = value.length if isinstance(value, ArrayRef) else len(value)
    if not 0 < count <= maximum:
        raise _problem(file, f"{key} has {count} entries; 1 to {maximum} are accepted")
    return count


def _problem(file: ModelFile, text: str) -> ModelFileError:
    return ModelFileError(str(file.path), f"vocabulary: {text}")
