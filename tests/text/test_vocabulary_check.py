"""Hostile vocabularies end in ModelFileError in a child process; sound ones are checked once."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_gguf import MetaValue
from vocabulary_files import bpe_keys, spm_keys, write_vocabulary

from edgert.errors import ModelFileError, NativeLibraryError, UsageError
from edgert.gguf.model_file import ModelFile
from edgert.paths import Paths
from edgert.text import vocabulary_check, vocabulary_header
from edgert.text.tokenizer import Tokenizer
from edgert.text.vocabulary_check import start_check
from edgert.text.vocabulary_header import check_header, has_vocabulary


@pytest.fixture
def n_started(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """One entry for every process that a check starts."""
    started: list[object] = []
    start = subprocess.Popen

    def count(*args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
        started.append(args)
        return start(*args, **kwargs)

    monkeypatch.setattr(vocabulary_check.subprocess, "Popen", count)
    return started


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGERT_HOME", str(tmp_path / "home"))
    return Paths.of_user().cache


def without(keys: dict[str, MetaValue], *names: str) -> dict[str, MetaValue]:
    return {key: value for key, value in keys.items() if key not in {f"tokenizer.ggml.{name}" for name in names}}


def duplicated() -> dict[str, MetaValue]:
    keys = bpe_keys()
    tokens = list(keys["tokenizer.ggml.tokens"])  # type: ignore[arg-type]
    return {**keys, "tokenizer.ggml.tokens": [*tokens[:-1], tokens[0]]}


@pytest.mark.parametrize(("keys", "said"), [
    (duplicated(), "SIGABRT"),
    (spm_keys(missing_byte=0xC3), "no token stands for byte 0xc3"),
    ({**without(bpe_keys(), "bos_token_id"), "tokenizer.ggml.pre": "glm4", "tokenizer.ggml.add_bos_token": True},
     "asks for a begin token and has none"),
    ({**bpe_keys(), "tokenizer.ggml.pre": "nobody-knows"}, "unknown pre-tokenizer"),
    ({**bpe_keys(), "tokenizer.ggml.bos_token_id": "one"}, "wrong type"),
], ids=["duplicated token", "missing byte", "no begin token", "unknown pre-tokenizer", "text for an id"])
def test_what_libllama_does_not_survive_is_a_model_file_error(
        tmp_path: Path, keys: dict[str, MetaValue], said: str) -> None:
    path = write_vocabulary(tmp_path / "model.gguf", keys)
    for _ in range(2):  # a refused file is not remembered as sound
        with pytest.raises(ModelFileError, match="vocabulary: ") as caught:
            Tokenizer.open(path)
        assert said in caught.value.problem


@pytest.mark.parametrize(("keys", "said"), [
    ({**bpe_keys(), "tokenizer.ggml.model": "t5"}, "not supported"),
    ({**bpe_keys(), "tokenizer.ggml.model": 7}, "a text is needed"),
    ({**bpe_keys(), "tokenizer.ggml.pre": "whitespace"}, "not supported"),
    (without(bpe_keys(), "tokens"), "tokenizer.ggml.tokens is missing"),
    (without(bpe_keys(), "merges"), "tokenizer.ggml.merges is missing"),
    ({**bpe_keys(), "tokenizer.ggml.tokens": [1, 2, 3]}, "no array of texts"),
    ({**bpe_keys(), "tokenizer.ggml.tokens": list[str]()}, "tokens"),
    ({**bpe_keys(), "tokenizer.ggml.token_type": [1] * 299}, "299 entries for 300 tokens"),
    ({**bpe_keys(), "tokenizer.ggml.scores": [0.5] * 10}, "10 entries for 300 tokens"),
    ({**bpe_keys(), "tokenizer.ggml.scores": "none"}, "no array of numbers"),
], ids=lambda value: "" if isinstance(value, dict) else value)
def test_headers_that_cannot_be_right_are_refused_without_a_process(
        tmp_path: Path, keys: dict[str, MetaValue], said: str, n_started: list[object]) -> None:
    with pytest.raises(ModelFileError, match=said):
        start_check(write_vocabulary(tmp_path / "model.gguf", keys))
    assert not n_started


def test_more_tokens_than_the_bound_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary_header, "MAX_TOKENS", 299)
    with pytest.raises(ModelFileError, match="1 to 299 are accepted"):
        check_header(ModelFile.open(write_vocabulary(tmp_path / "model.gguf", bpe_keys())))


@pytest.mark.parametrize("model", ["no_vocab", "none", None])
def test_a_file_without_vocabulary_is_told_apart(tmp_path: Path, model: str | None) -> None:
    keys: dict[str, MetaValue] = {} if model is None else {"tokenizer.ggml.model": model}
    path = write_vocabulary(tmp_path / "model.gguf", keys)
    assert not has_vocabulary(ModelFile.open(path))
    with pytest.raises(UsageError, match="give token ids"):
        start_check(path)


def test_a_sound_file_is_checked_once_and_again_when_it_changes(tmp_path: Path, n_started: list[object]) -> None:
    path = write_vocabulary(tmp_path / "model.gguf", bpe_keys())
    for expected in (1, 1):
        with start_check(path) as check:
            check.wait()
        assert len(n_started) == expected
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(1, 1))
    with start_check(path) as check:
        check.wait()
    assert len(n_started) == 2


def test_the_default_model_needs_no_process(real_model: Callable[[str], Path], n_started: list[object]) -> None:
    start_check(real_model("smollm2-135m")).wait()
    assert not n_started


def test_a_cache_that_cannot_be_written_costs_a_check_and_nothing_else(
        tmp_path: Path, own_cache: Path, n_started: list[object]) -> None:
    own_cache.parent.mkdir(parents=True)
    own_cache.write_text("a file where the directory should be")
    path = write_vocabulary(tmp_path / "model.gguf", bpe_keys())
    for _ in range(2):
        with start_check(path) as check:
            check.wait()
    assert len(n_started) == 2


def test_the_cache_does_not_grow_without_bound(
        tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary_check, "_MAX_REMEMBERED", 3)
    for number in range(8):
        vocabulary_check._remember(own_cache / "vocabularies" / str(number))
    assert len(list((own_cache / "vocabularies").iterdir())) <= 3


def test_a_check_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary_check, "DEADLINE_S", 0.0)
    check = start_check(write_vocabulary(tmp_path / "model.gguf", bpe_keys()))
    process = check._process
    with pytest.raises(ModelFileError, match="takes more than"):
        check.wait()
    assert process is not None and process.returncode is not None


def test_closing_early_ends_the_process(tmp_path: Path) -> None:
    check = start_check(write_vocabulary(tmp_path / "model.gguf", bpe_keys()))
    process = check._process
    check.close()
    check.close()
    assert process is not None and process.returncode is not None


def test_a_check_that_cannot_run_does_not_blame_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_vocabulary(tmp_path / "model.gguf", bpe_keys())
    monkeypatch.setattr(vocabulary_check, "_PROBE_MODULE", "edgert.text.no_such_module")
    with start_check(path) as check, pytest.raises(NativeLibraryError):
        check.wait()


def test_a_module_in_the_current_directory_is_not_run(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = tmp_path / "edgert"
    hostile.mkdir()
    (hostile / "__init__.py").write_text("raise SystemExit(0)")
    monkeypatch.chdir(tmp_path)
    path = write_vocabulary(tmp_path / "model.gguf", duplicated())
    with start_check(path) as check, pytest.raises(ModelFileError):
        check.wait()
