"""RoPE as files ask for it. That llama.cpp rotates by the same angles is shown in tests/engine/test_exact.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgert.architectures.rope import read_rope
from edgert.architectures.rounding import inverse_sqrt
from edgert.ggml.graph import ROPE_NEOX, Rope
from edgert.gguf.model_file import ModelFile
from edgert.gguf.values import Value


def rope_of(tiny_model: Callable[..., Path], **keys: Value) -> Rope:
    model = ModelFile.open(tiny_model("qwen3"))
    added = {f"qwen3.rope.{key.replace('__', '.')}": value for key, value in keys.items()}
    return read_rope(replace(model, metadata={**model.metadata, **added}), ROPE_NEOX, 32, 2048)


def test_a_file_that_asks_for_nothing_gets_the_published_rotation(tiny_model: Callable[..., Path]) -> None:
    assert rope_of(tiny_model) == Rope(32, ROPE_NEOX, 2048, 10000.0, 1.0, 0.0, 1.0)


def test_linear_scaling_divides_positions(tiny_model: Callable[..., Path]) -> None:
    assert rope_of(tiny_model, scaling__type="linear", scaling__factor=8.0).freq_scale == 0.125
    assert rope_of(tiny_model, scaling__factor=8.0).freq_scale == 0.125  # linear is what an old file means
    assert rope_of(tiny_model, scale_linear=4.0).freq_scale == 0.25
    assert rope_of(tiny_model, scaling__type="none", scaling__factor=8.0).freq_scale == 1.0
    assert rope_of(tiny_model, scaling__type="linear", scaling__factor=0.0).freq_scale == 1.0


def test_yarn_keeps_the_original_length(tiny_model: Callable[..., Path]) -> None:
    rope = rope_of(tiny_model, scaling__type="yarn", scaling__factor=4.0, scaling__original_context_length=512)
    assert (rope.original_context, rope.freq_scale, rope.ext_factor) == (512, 0.25, 1.0)
    assert rope_of(tiny_model, scaling__type="yarn", scaling__factor=4.0).original_context == 2048


@pytest.mark.parametrize(("factor", "n_bits"), [(1.0, 0), (4.0, 0), (5.5, 1), (12.0, 1), (32.0, 0)])
def test_yarns_attention_factor_is_one_but_for_the_last_bit(tiny_model: Callable[..., Path], factor: float,
                                                            n_bits: int) -> None:
    found = rope_of(tiny_model, scaling__type="yarn", scaling__factor=factor).attn_factor
    assert found == 1.0 - n_bits * np.finfo(np.float32).epsneg


def test_an_attention_factor_of_the_files_own_counts(tiny_model: Callable[..., Path]) -> None:
    assert rope_of(tiny_model, scaling__attn_factor=0.5).attn_factor == 0.5
    assert rope_of(tiny_model, scaling__type="yarn", scaling__factor=4.0,
                   scaling__attn_factor=0.5).attn_factor == pytest.approx(0.5)


@pytest.mark.parametrize("n", [32, 80, 96, 128, 160, 256])
def test_the_attention_scale_is_rounded_as_in_c(n: int) -> None:
    assert inverse_sqrt(n) == np.float32(1) / np.sqrt(np.float32(n))
