"""Tokenizer gives llama.cpp's own ids and bytes, and refuses what would end the process inside of libllama."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from llama_cpp import llama_cpp as oracle
from vocabulary_files import bpe_keys, spm_keys, write_vocabulary

from edgert.errors import ModelFileError, ModelNotFound, UsageError
from edgert.text.pretokenizer import MAX_RUN_CHARS, longest_run
from edgert.text.tokenizer import MAX_TEXT_BYTES, Tokenizer

TEXTS = (
    "", " ", "Hello world", "  two  spaces and\ttabs\n\n", "don't I'll we've", "naïve café über 北京 かな 😀👍🏽",
    "<|im_start|>user\nhi<|im_end|>\n<start_of_turn></s><bos>", "1234567890 3.14", "def f(x):\n    return x**2\n",
    "\x00a",
)


class Oracle:
    """The llama_cpp package's own view of a vocabulary."""

    def __init__(self, path: Path) -> None:
        params = oracle.llama_model_default_params()
        params.vocab_only = True
        self.model = oracle.llama_model_load_from_file(str(path).encode(), params)
        self.vocab = oracle.llama_model_get_vocab(self.model)

    def tokenize(self, text: bytes, add_special: bool, parse_special: bool) -> list[int]:
        tokens = (oracle.llama_token * (len(text) + 8))()
        count = oracle.llama_tokenize(self.vocab, text, len(text), tokens, len(tokens), add_special, parse_special)
        return list(tokens[:count])

    def close(self) -> None:
        oracle.llama_model_free(self.model)


@pytest.fixture(scope="module", params=["bpe", "spm"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    keys = bpe_keys() if request.param == "bpe" else spm_keys()
    path = write_vocabulary(tmp_path_factory.mktemp("vocabulary") / f"{request.param}.gguf", keys)
    with Tokenizer.open(path) as tokenizer:
        yield tokenizer


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-coder-0.5b", "gemma3-270m"])
def test_ids_equal_the_packages_for_real_vocabularies(name: str, real_model: Callable[[str], Path]) -> None:
    path = real_model(name)
    reference = Oracle(path)
    with Tokenizer.open(path) as tokenizer:
        assert tokenizer.n_tokens == oracle.llama_vocab_n_tokens(reference.vocab)
        assert tokenizer.bos_id == oracle.llama_vocab_bos(reference.vocab)
        assert tokenizer.eos_id == oracle.llama_vocab_eos(reference.vocab)
        assert tokenizer.is_end_of_generation(tokenizer.eos_id or 0)
        assert tokenizer.piece(tokenizer.eos_id or 0) == b""
        assert tokenizer.piece(tokenizer.eos_id or 0, special=True) == tokenizer.eos_text.encode()
        for text in TEXTS:
            for flags in ((False, False), (True, False), (True, True)):
                ids = tokenizer.encode(text, add_special=flags[0], parse_special=flags[1])
                assert ids == reference.tokenize(text.encode(), *flags), (text, flags)
    reference.close()


def test_special_tokens_are_text_unless_they_are_parsed(small: Tokenizer) -> None:
    text = f"a{small.eos_text}b"
    assert small.eos_id not in small.encode(text, add_special=False, parse_special=False)
    assert small.eos_id in small.encode(text, add_special=False, parse_special=True)


def test_a_tiny_models_tokens_are_read_back(tiny_model: Callable[..., Path]) -> None:
    with Tokenizer.open(tiny_model("llama")) as tokenizer:
        ids = tokenizer.encode("the sea and the sand", add_special=True, parse_special=True)
        assert tokenizer.decode(ids) == b"the sea and the sand"
        assert tokenizer.decode([*ids, tokenizer.eos_id or 0]) == b"the sea and the sand"
        assert tokenizer.decode([tokenizer.eos_id or 0], special=True) == b"<|im_end|>"


@given(st.text(max_size=40))
@example("a\x00b\u3000\u200d\U0001f469\u200d\U0001f680")
@settings(max_examples=150, deadline=None)
def test_every_text_survives_the_way_there_and_back(small: Tokenizer, text: str) -> None:
    decoded = small.decode(small.encode(text, add_special=False, parse_special=False)).decode()
    assert decoded in (text, " " + text)  # SentencePiece puts a space before the text


@given(st.binary(max_size=24))
@example(b"\xf7\xbf\xbf\xbf")  # as a code point above U+10FFFF these two end the process inside of libllama
@example(b"ok \xf4\x90\x80\x80")
@example(b"\xed\xa0\x80\xff")
@settings(max_examples=150, deadline=None)
def test_bytes_that_are_no_utf8_are_tokenized(small: Tokenizer, data: bytes) -> None:
    ids = small.encode(data, add_special=True, parse_special=True)
    assert all(0 <= token_id < small.n_tokens for token_id in ids)


def test_bytes_from_the_command_line_that_are_no_utf8_are_taken_as_they_are(small: Tokenizer) -> None:
    escaped = b"caf\xe9".decode("utf-8", errors="surrogateescape")
    flags = {"add_special": False, "parse_special": False}
    assert small.encode(escaped, **flags) == small.encode(b"caf\xe9", **flags)
    with pytest.raises(UsageError):
        small.encode("\ud800", **flags)


@pytest.mark.parametrize("token_id", [-1, 2**31, 10**6, 1.5, "a", None])
def test_unknown_ids_are_refused(small: Tokenizer, token_id: Any) -> None:
    for use in (small.piece, small.is_end_of_generation, lambda one: small.decode([one])):
        with pytest.raises(UsageError, match="not in the vocabulary"):
            use(token_id)


def test_a_text_beyond_the_bound_is_refused(small: Tokenizer) -> None:
    with pytest.raises(UsageError):
        small.encode(b"x" * (MAX_TEXT_BYTES + 1), add_special=False, parse_special=False)


def test_a_file_without_vocabulary_asks_for_ids(tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="no vocabulary; give token ids"):
        Tokenizer.open(tiny_model("llama", vocabulary=False))


def test_missing_and_damaged_files_are_typed_errors(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        Tokenizer.open(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("not a model at all, by no means")
    with pytest.raises(ModelFileError):
        Tokenizer.open(tmp_path / "text.gguf")


def test_a_closed_tokenizer_says_so(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(write_vocabulary(tmp_path / "model.gguf", bpe_keys()))
    tokenizer.close()
    tokenizer.close()
    flags: dict[str, Any] = {"add_special": False, "parse_special": False}
    for use in (lambda: tokenizer.encode("a", **flags), lambda: tokenizer.piece(1),
                lambda: tokenizer.is_end_of_generation(1)):
        with pytest.raises(UsageError, match="closed"):
            use()


@pytest.fixture(scope="module")
def recursive_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary whose pre-tokenizer recurses in libllama for every character of a match."""
    keys = {**bpe_keys(), "tokenizer.ggml.pre": "tekken"}
    return write_vocabulary(tmp_path_factory.mktemp("vocabulary") / "recursive.gguf", keys)


def test_long_runs_do_not_end_the_process(recursive_path: Path) -> None:
    # In a process of its own: without the deep stack it dies of SIGSEGV.
    program = ("import sys; from pathlib import Path; from edgert.text.tokenizer import Tokenizer\n"
               "tokenizer = Tokenizer.open(Path(sys.argv[1]))\n"
               "for text in ('!' * 60000, ' ' * 60000, 'x' * 60000 + '\\n' * 60000):\n"
               "    ids = tokenizer.encode(text, add_special=False, parse_special=False)\n"
               "    assert tokenizer.decode(ids).decode() == text\n")
    assert subprocess.run([sys.executable, "-c", program, recursive_path], check=False).returncode == 0


def test_runs_beyond_the_bound_are_refused_where_libllama_recurses_and_only_there(
        recursive_path: Path, small: Tokenizer) -> None:
    text = "\N{CJK UNIFIED IDEOGRAPH-4E00}" * (MAX_RUN_CHARS + 1)
    with Tokenizer.open(recursive_path) as tokenizer, pytest.raises(UsageError, match="break the text into lines"):
        tokenizer.encode(text, add_special=False, parse_special=False)
    assert small.encode(text, add_special=False, parse_special=False)


def test_a_deep_stack_leaves_the_size_for_other_threads_as_it_was(recursive_path: Path) -> None:
    before = threading.stack_size()
    with Tokenizer.open(recursive_path) as tokenizer:
        tokenizer.encode("!" * 10_000, add_special=False, parse_special=False)
    assert threading.stack_size() == before
    assert not any(thread.name == "edgert-tokenize" for thread in threading.enumerate())


@pytest.mark.parametrize(("text", "length"), [("", 0), ("abc", 3), ("a bcd e", 3), ("a     b", 5), ("\n\n\n\n", 4)])
def test_the_longest_run_is_of_spaces_or_of_other_characters(text: str, length: int) -> None:
    assert longest_run(text) == length
