"""Every architecture computes llama.cpp's logits, bit for bit: same layout, same batches, same threads.

Tiny models with random weights; the prompt needs two batches and is longer than every window. Real models are in
test_exact_real.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import assert_same_answer, open_engine, open_oracle, random_tokens
from tiny_architectures import ARCHITECTURES
from tiny_models import QUANTISABLE

from edgert.engine.layouts import LayoutChoice

TinyModel = Callable[..., Path]
Variant = tuple[str, dict[str, Any]]

N_PROMPT, N_DECODE = 600, 16
# Types that some CPU repacks, types that none repacks, and one file with eight types.
TYPES = ("F16", "Q4_0", "MIXED")
_SMALL_EXPERTS = {"hidden_size": 64, "ffn_size": 64}
SHAPES: tuple[Variant, ...] = (
    ("llama", {"quantisation": "Q4_K", "n_experts": 4}),
    ("llama", {"n_experts": 4, "n_experts_used": 1, **_SMALL_EXPERTS}),
    ("llama", {"tied": True, "n_heads": 8}),
    ("llama", {"hidden_size": 160, "n_heads": 2, "n_kv_heads": 1, "ffn_size": 96}),  # 1/sqrt(80) is not exact
    ("qwen2", {"tied": True, "n_layers": 5}),
    ("qwen3", {"hidden_size": 64, "head_dim": 32}),
    ("qwen3", {"head_dim": 96, "tied": True}),
    ("gemma3", {"sliding_window": 0}),
    ("gemma3", {"sliding_window": 100, "sliding_window_pattern": 3, "n_layers": 4}),
    ("gemma3", {"sliding_window": 513, "n_layers": 7, "sliding_window_pattern": 6}),
    ("gemma3", {"n_layers": 3, "metadata": {"gemma3.attention.sliding_window_pattern": [True, False, True]}}),
    ("gemma3", {"n_layers": 1, "sliding_window_pattern": 6}),  # no layer sees everything
    ("gemma3", {"tied": False, "head_dim": 64, "n_kv_heads": 1}),
    ("gemma3", {"metadata": {"gemma3.final_logit_softcapping": 2.5, "gemma3.rope.freq_base_swa": 5000.0}}),
    ("qwen3moe", {"n_experts": 64, "n_experts_used": 8, **_SMALL_EXPERTS}),
    ("olmoe", {"n_experts": 16, "n_experts_used": 16, **_SMALL_EXPERTS}),
    ("smallthinker", {"sliding_window": 4096, "n_layers": 5}),
    ("smallthinker", {"sliding_window": 4096, "n_layers": 4}),  # llama.cpp has no NoPE layer here
    *(("smallthinker", {"n_experts": 32, "n_experts_used": 4, **_SMALL_EXPERTS,
                        "metadata": {"smallthinker.expert_gating_func": gating}}) for gating in (1, 2, 3)),
)
# YaRN's attention factor is 1 for 4, one bit less for 5.5 and 12, and by another formula below 1.
ROPES: tuple[Variant, ...] = (
    *((name, {"rope_scaling": "linear", "rope_factor": 8.0}) for name in ("llama", "gemma3")),
    *(("qwen3", {"rope_scaling": "yarn", "rope_factor": factor}) for factor in (0.5, 4.0, 5.5, 12.0)),
    *((name, {"rope_scaling": "yarn"}) for name in ("llama", "gemma3", "qwen3moe")),
    ("qwen2", {"rope_scaling": "yarn", "metadata": {"qwen2.rope.scaling.attn_factor": 0.8}}),
    ("llama", {"rope_scaling": "llama3"}),
    ("smallthinker", {"rope_scaling": "linear", "rope_factor": 8.0, "sliding_window": 4096, "n_layers": 5,
                      "metadata": {"smallthinker.rope.scaling.type": "none"}}),
)
ALL = (*((name, {"quantisation": type_name}) for name in ARCHITECTURES for type_name in TYPES), *SHAPES, *ROPES)


@pytest.mark.parametrize("layout", ["plain", "repack"])
@pytest.mark.parametrize(("architecture", "options"), ALL, ids=str)
def test_logits_are_llama_cpps(tiny_model: TinyModel, architecture: str, options: dict[str, Any],
                               layout: LayoutChoice) -> None:
    path = tiny_model(architecture, **options)
    with open_oracle(path, repack=layout == "repack") as oracle, open_engine(path, layout=layout) as engine:
        if layout == "repack" and not engine.weights.repacked_bytes:
            return  # nothing repacks on this machine: the plain case has shown it
        assert_same_answer(oracle, engine, random_tokens(N_PROMPT), N_DECODE)


@pytest.mark.parametrize("quantisation", QUANTISABLE)
def test_every_type_of_weight_is_computed_as_llama_cpp_does(tiny_model: TinyModel, quantisation: str) -> None:
    path = tiny_model("llama", quantisation=quantisation, n_layers=1, hidden_size=256, n_kv_heads=1, ffn_size=256,
                      tied=True)
    with open_oracle(path) as oracle, open_engine(path) as engine:
        assert_same_answer(oracle, engine, random_tokens(40), 4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_8_bit_cache_holds_what_llama_cpps_holds(tiny_model: TinyModel, architecture: str) -> None:
    path = tiny_model(architecture, quantisation="MIXED")  # heads of 64: keys and values are rotated
    with (open_oracle(path, kv_type="q8_0") as oracle, open_engine(path, kv_type="q8_0") as engine):
        assert_same_answer(oracle, engine, random_tokens(N_PROMPT), N_DECODE)


@pytest.mark.parametrize("architecture", ["gemma3", "qwen3moe"])
def test_two_threads_divide_the_work_as_llama_cpp_does(tiny_model: TinyModel, architecture: str) -> None:
    path = tiny_model(architecture, quantisation="MIXED")
    with open_oracle(path, n_threads=2) as oracle, open_engine(path, n_threads=2) as engine:
        assert_same_answer(oracle, engine, random_tokens(N_PROMPT), N_DECODE)


def test_a_window_of_4096_tokens_ends_where_llama_cpps_ends(tiny_model: TinyModel) -> None:
    path = tiny_model("smallthinker", sliding_window=4096, hidden_size=64, n_heads=2, n_kv_heads=1, ffn_size=32,
                      n_experts=4, n_layers=2, context_length=8192)
    with open_oracle(path, context_length=4608) as oracle, open_engine(path, context_length=4608) as engine:
        assert_same_answer(oracle, engine, random_tokens(4300), N_DECODE)


@pytest.mark.parametrize(("architecture", "options"), ALL, ids=str)
def test_block_by_block_is_fused(tiny_model: TinyModel, architecture: str, options: dict[str, Any]) -> None:
    path, steps = tiny_model(architecture, **options), [random_tokens(N_PROMPT), *([t] for t in random_tokens(4))]
    with open_engine(path, fused=True) as whole, open_engine(path, fused=False) as blocks:
        for step in steps:
            token_ids = np.array(step, np.int32)
            np.testing.assert_array_equal(whole.step(token_ids), blocks.step(token_ids))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_several_rows_of_logits_are_llama_cpps(tiny_model: TinyModel, architecture: str, fused: bool) -> None:
    path = tiny_model(architecture, quantisation="MIXED")
    with open_oracle(path) as oracle, open_engine(path, fused=fused) as engine:
        for n_tokens, n_outputs in ((100, 7), (3, 3), (1, 1), (40, 40)):
            token_ids = random_tokens(n_tokens, seed=n_outputs)
            np.testing.assert_array_equal(engine.step(np.array(token_ids, np.int32), n_outputs),
                                          oracle.last_logits(token_ids, n_outputs))
        oracle.step(token_ids := random_tokens(500))  # of 600 tokens, the 100 that give logits are a batch of their own
        np.testing.assert_array_equal(engine.step(np.array([*token_ids, *random_tokens(100)], np.int32), 100),
                                      oracle.last_logits(random_tokens(100), 100))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_another_text_after_a_common_beginning(tiny_model: TinyModel, architecture: str, fused: bool) -> None:
    path = tiny_model(architecture, quantisation="MIXED")
    with open_oracle(path) as oracle, open_engine(path, fused=fused) as engine:
        assert_same_answer(oracle, engine, random_tokens(N_PROMPT), 3)
        for n_kept in (270, 0):
            oracle.truncate(n_kept)
            engine.kv.truncate(n_kept)
            assert engine.kv.length == n_kept
            assert_same_answer(oracle, engine, random_tokens(300, seed=n_kept), 3)


@pytest.mark.parametrize("architecture", ["llama", "qwen3moe", "olmoe", "smallthinker"])
def test_experts_compute_in_the_repacked_layout(tiny_model: TinyModel, architecture: str) -> None:
    path = tiny_model(architecture, quantisation="Q4_0", n_experts=8)
    expert_bytes = 2 * 3 * 8 * 128 * 256 * 18 // 32  # layers, matrices, experts, Q4_0's 18 bytes for 32 values
    token_ids = np.array(random_tokens(60), np.int32)
    with open_engine(path) as plain, open_engine(path, layout="repack") as repacked:
        if not repacked.weights.repacked_bytes:
            return  # this machine's ggml repacks nothing
        assert repacked.weights.repacked_bytes > expert_bytes
        assert not np.array_equal(plain.step(token_ids), repacked.step(token_ids))


def test_llama_cpps_small_cache_for_windows_gives_the_same(tiny_model: TinyModel) -> None:
    # It has 768 cells here. Once they wrap around, its sums round in another order; ours keeps all cells and masks
    # them. Without quantisation that moves logits by too little to change a token.
    path = tiny_model("gemma3", quantisation="F32", n_layers=3)
    with open_oracle(path, swa_full=False) as oracle, open_engine(path) as engine:
        assert_same_answer(oracle, engine, random_tokens(N_PROMPT), N_DECODE)
    prompt = random_tokens(900)
    with open_oracle(path, swa_full=False) as small, open_oracle(path) as full:
        assert not np.array_equal(small.step(prompt), full.step(prompt))
        small.reset()
        full.reset()
        assert small.greedy(prompt, 32) == full.greedy(prompt, 32)
