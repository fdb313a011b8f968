"""The binding describes libllama as the installed llama-cpp-python does; a new version that changes it fails here."""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path

import pytest
from llama_cpp import llama_cpp as oracle
from vocabulary_files import bpe_keys, write_vocabulary

from edgert.text import libllama
from edgert.text.libllama import FUNCTIONS, load_vocabulary


@pytest.mark.parametrize(("ours", "theirs"), [
    (libllama.ModelParams, oracle.llama_model_params),
    (libllama.ModelOverride, oracle.llama_model_kv_override),
    (libllama.TokenData, oracle.llama_token_data),
    (libllama.TokenDataArray, oracle.llama_token_data_array),
    (libllama.LogitBias, oracle.llama_logit_bias),
    (libllama.SamplerChainParams, oracle.llama_sampler_chain_params),
])
def test_structures_have_the_packages_layout(ours: type[ctypes.Structure], theirs: type[ctypes.Structure]) -> None:
    def layout(struct: type[ctypes.Structure]) -> list[tuple[int, int]]:
        return [(getattr(struct, field[0]).offset, getattr(struct, field[0]).size) for field in struct._fields_]

    assert ctypes.sizeof(ours) == ctypes.sizeof(theirs)
    assert layout(ours) == layout(theirs)


@pytest.mark.parametrize("struct", [libllama.ModelParams, libllama.TokenDataArray])
def test_fields_have_the_packages_names(struct: type[ctypes.Structure]) -> None:
    theirs = {libllama.ModelParams: oracle.llama_model_params,
              libllama.TokenDataArray: oracle.llama_token_data_array}[struct]
    assert [field[0] for field in struct._fields_] == [field[0] for field in theirs._fields_]


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_functions_take_and_give_what_the_package_says(name: str) -> None:
    def size(kind: type | None) -> int:
        return 0 if kind is None else ctypes.sizeof(kind)

    result, arguments = FUNCTIONS[name]
    function = getattr(oracle, name)
    assert [size(kind) for kind in arguments] == [size(kind) for kind in function.argtypes]
    assert size(result) == size(function.restype)


def test_messages_go_to_logging_at_debug_level_and_nowhere_else(
        tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_vocabulary(tmp_path / "model.gguf", bpe_keys())
    with caplog.at_level(logging.DEBUG, logger="edgert.libllama"):
        vocabulary = load_vocabulary(path)
        assert vocabulary is not None
        vocabulary.close()
        assert load_vocabulary(tmp_path / "missing.gguf") is None
    assert any("missing.gguf" in record.getMessage() for record in caplog.records)
    assert {record.levelno for record in caplog.records} == {logging.DEBUG}
    assert capfd.readouterr() == ("", "")


def test_a_split_models_other_parts_are_not_read(tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "model-00001-of-00003.gguf", {**bpe_keys(), "split.count": 3, "split.no": 0})
    vocabulary = load_vocabulary(path)
    assert vocabulary is not None
    assert vocabulary.n_tokens == 300
    vocabulary.close()
