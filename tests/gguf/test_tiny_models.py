"""The tiny models are models: llama.cpp loads each, its logits are finite and spread, and every option counts."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_architectures import ARCHITECTURES
from tiny_models import QUANTISABLE, write_tiny_model
from tiny_vocabulary import CHATML_TEMPLATE

from edgert.gguf.model_file import ModelFile
from edgert.gguf.values import ArrayRef

PROMPT = [(37 * position + 11) % 300 for position in range(60)]  # longer than gemma3's window of 32
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    *((name, {}) for name in ARCHITECTURES),
    *((name, {"quantisation": "MIXED", "n_layers": 3}) for name in ARCHITECTURES),
    ("llama", {"rope_scaling": "llama3"}), ("llama", {"rope_scaling": "yarn"}), ("llama", {"rope_scaling": "linear"}),
    ("llama", {"tied": True, "n_heads": 8}), ("llama", {"n_experts": 4, "hidden_size": 64, "ffn_size": 64}),
    ("qwen2", {"vocabulary": False}), ("qwen3", {"split_parts": 3}), ("qwen3", {"hidden_size": 64, "head_dim": 32}),
    ("gemma3", {"tied": False, "head_dim": 64, "n_kv_heads": 1}), ("gemma3", {"sliding_window": 0}),
    ("qwen3moe", {"n_experts": 64, "n_experts_used": 8, "ffn_size": 64}),
    ("smallthinker", {"sliding_window": 4096, "n_layers": 5}),
)


@llama.llama_log_callback  # type: ignore[untyped-decorator]
def quiet(_level: int, _text: bytes, _data: object) -> None:
    """llama.cpp reports every tensor; its errors come back as null pointers anyway."""


class Oracle:
    """One model in llama.cpp, single-threaded, with a context of 256 tokens."""

    def __init__(self, model: Any, context: Any) -> None:
        self._context = context
        self.vocabulary = llama.llama_model_get_vocab(model)
        self.template = llama.llama_model_chat_template(model, None)

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """The logits after `token_ids`, which continue what was there: (vocab_size,) float32."""
        batch = (llama.llama_token * len(token_ids))(*token_ids)
        assert llama.llama_decode(self._context, llama.llama_batch_get_one(batch, len(token_ids))) == 0
        n_vocab = llama.llama_vocab_n_tokens(self.vocabulary)
        return np.ctypeslib.as_array(llama.llama_get_logits_ith(self._context, -1), (n_vocab,)).copy()

    def tokenize(self, text: str) -> list[int]:
        raw, buffer = text.encode(), (llama.llama_token * 256)()
        count = llama.llama_tokenize(self.vocabulary, raw, len(raw), buffer, len(buffer), False, True)
        return list(buffer[:count])

    def detokenize(self, token_ids: Sequence[int]) -> str:
        ids, buffer = (llama.llama_token * len(token_ids))(*token_ids), ctypes.create_string_buffer(1024)
        count = llama.llama_detokenize(self.vocabulary, ids, len(ids), buffer, len(buffer), False, True)
        return buffer.raw[:count].decode()


@contextmanager
def oracle(path: Path) -> Iterator[Oracle]:
    llama.llama_log_set(quiet, None)
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    assert model, f"llama.cpp does not load {path}"
    parameters = llama.llama_context_default_params()
    parameters.n_ctx, parameters.n_threads, parameters.n_threads_batch = 256, 1, 1
    context = llama.llama_init_from_model(model, parameters)
    assert context
    try:
        yield Oracle(model, context)
    finally:
        llama.llama_free(context)
        llama.llama_model_free(model)


def logits_of(path: Path, token_ids: Sequence[int] = PROMPT) -> NDArray[np.float32]:
    with oracle(path) as loaded:
        return loaded.logits(token_ids)


@pytest.mark.parametrize(("architecture", "options"), VARIANTS, ids=str)
def test_llama_cpp_runs_it_and_its_tokens_vary(tiny_model: Callable[..., Path], architecture: str,
                                               options: dict[str, Any]) -> None:
    with oracle(tiny_model(architecture, **options)) as loaded:
        logits, token_ids = loaded.logits(PROMPT), []
        for _ in range(32):
            assert np.isfinite(logits).all()
            assert 1.5 < logits.std() < 6
            token_ids.append(int(logits.argmax()))
            logits = loaded.logits(token_ids[-1:])
    assert len(set(token_ids)) >= 8, token_ids


@pytest.mark.parametrize("quantisation", QUANTISABLE)
def test_every_type_of_weight_is_written_as_ggml_reads_it(tiny_model: Callable[..., Path], quantisation: str) -> None:
    # One narrow layer: ggml needs seconds to search the grids of the smallest IQ types.
    path = tiny_model("llama", quantisation=quantisation, n_layers=1, hidden_size=256, n_kv_heads=1, ffn_size=256,
                      tied=True)
    assert {info.type.name for info in ModelFile.open(path).tensors.values()} == {"F32", quantisation}
    logits = logits_of(path, PROMPT[:16])
    assert np.isfinite(logits).all() and logits.std() > 1


def test_two_quantisations_of_a_seed_are_one_model(tiny_model: Callable[..., Path]) -> None:
    reference = logits_of(tiny_model("llama", quantisation="F32"))
    for quantisation, tolerance in (("F16", 0.02), ("Q8_0", 0.2)):
        assert np.abs(logits_of(tiny_model("llama", quantisation=quantisation)) - reference).std() < tolerance
    assert np.abs(logits_of(tiny_model("llama", quantisation="F32", seed=1)) - reference).std() > 2


def test_the_same_choice_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write_tiny_model(tmp_path / name, "qwen3moe", quantisation="Q4_K", n_layers=1) for name in "ab")
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("rope_scaling", ["linear", "yarn", "llama3"])
def test_rope_scaling_changes_the_answer(tiny_model: Callable[..., Path], rope_scaling: str) -> None:
    difference = logits_of(tiny_model("llama", rope_scaling=rope_scaling)) - logits_of(tiny_model("llama"))
    assert np.abs(difference).std() > 0.1


def test_a_window_counts_for_prompts_longer_than_it_only(tiny_model: Callable[..., Path]) -> None:
    # The same RoPE base for local layers, or turning the window off would change that too.
    options = {"quantisation": "F32", "metadata": {"gemma3.rope.freq_base_swa": 1e6}}
    windowed, whole = tiny_model("gemma3", **options), tiny_model("gemma3", sliding_window=0, **options)
    assert np.abs(logits_of(windowed, PROMPT[:30]) - logits_of(whole, PROMPT[:30])).max() < 1e-3
    assert np.abs(logits_of(windowed) - logits_of(whole)).std() > 0.1


def test_a_split_model_is_the_whole_model(tiny_model: Callable[..., Path]) -> None:
    split, whole = tiny_model("qwen2", split_parts=4), tiny_model("qwen2")
    assert len(ModelFile.open(split).parts) == 4
    assert ModelFile.open(split).tensors.keys() == ModelFile.open(whole).tensors.keys()
    np.testing.assert_array_equal(logits_of(split), logits_of(whole))


def test_any_text_can_be_written_with_its_vocabulary(tiny_model: Callable[..., Path]) -> None:
    text = "the end, and then the other thing: Käse ✓ 漢字\n<|im_end|>\n"
    with oracle(tiny_model("llama")) as loaded:
        token_ids = loaded.tokenize(text)
        assert loaded.detokenize(token_ids) == text
        assert len(token_ids) < len(text.encode()), "no merge was applied"
        end, start = loaded.tokenize("<|im_end|>"), loaded.tokenize("<|im_start|>")
        assert end == [llama.llama_vocab_eos(loaded.vocabulary)] and len(start) == 1
        assert loaded.template.decode() == CHATML_TEMPLATE


@pytest.mark.parametrize("vocab_size", [259, 320, 512])
def test_the_vocabulary_has_the_size_that_was_asked_for(tiny_model: Callable[..., Path], vocab_size: int) -> None:
    path = tiny_model("llama", vocab_size=vocab_size, n_layers=1)
    ref = ModelFile.open(path).metadata["tokenizer.ggml.tokens"]
    assert isinstance(ref, ArrayRef)
    tokens = ref.read_strings(path)
    assert len(tokens) == len(set(tokens)) == vocab_size
    with oracle(path) as loaded:
        assert llama.llama_vocab_n_tokens(loaded.vocabulary) == vocab_size
