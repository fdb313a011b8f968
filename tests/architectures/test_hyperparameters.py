"""Sizes that a file claims: the impossible ones end in a typed error that names the key, never in an allocation."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
from tiny_architectures import ARCHITECTURES, EXPERT_ARCHITECTURES

from edgert.architectures.registry import open_architecture
from edgert.errors import ModelFileError
from edgert.gguf.model_file import ModelFile

TinyModel = Callable[..., Path]

NO_SIZE = (0, -1, 2**31, 2**63, 2.5, nan, "128", True, (1, 2))
IMPOSSIBLE: Mapping[str, tuple[Any, ...]] = {
    "block_count": (*NO_SIZE, 3, 1025),
    "context_length": NO_SIZE,
    "embedding_length": (*NO_SIZE, 96, 2**20),
    "attention.head_count": (*NO_SIZE, 3, 5, 1025),
    "attention.head_count_kv": (*NO_SIZE, 3, 5, 1025),
    "attention.key_length": (*NO_SIZE, 31, 2**20),
    "attention.value_length": (*NO_SIZE, 31),
    "attention.layer_norm_rms_epsilon": (0, -1e-6, 1.0, nan, inf, "1e-6", True),
    "rope.dimension_count": (0, -2, 31, 33, 64, 2.0, nan),
    "rope.freq_base": (0.0, -1.0, nan, inf, 1e30, "10000"),
    "rope.scaling.type": ("longrope", "", 1, None),
    "rope.scaling.factor": (-1.0, 1e-9, 1e9, nan, inf, "2"),
    "rope.scaling.attn_factor": (0.0, -1.0, nan, inf, 1e9),
    "rope.scaling.original_context_length": (-1, 2**40, 0.5),
    "expert_count": (-1, 1025, 2**40, 1.0),
}
WITH_EXPERTS: Mapping[str, tuple[Any, ...]] = {
    "expert_count": (0, 1, 7, 9),
    "expert_used_count": (*NO_SIZE, 9, None),
    "expert_group_count": (2, -1, 2**40),
}
OF_ONE_FAMILY: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "llama": {"feed_forward_length": (*NO_SIZE, None, 255)},
    "qwen3moe": {"expert_feed_forward_length": (*NO_SIZE, 255)},
    "smallthinker": {"expert_feed_forward_length": (*NO_SIZE, 255), "expert_gating_func": (0, 4, -1, 2**40, None, 1.0),
                     "attention.sliding_window": (-1, 2**40, 2.0, "4096")},
    "gemma3": {"attention.sliding_window": (-1, 2**40, 2.0, "32"),
               "attention.sliding_window_pattern": (-1, 2**40, "2", (True,) * 3, (2.0, 1.0), ()),
               "rope.freq_base_swa": (0.0, -1.0, nan, inf), "final_logit_softcapping": (-1.0, nan, inf, 1e9)},
}


def changed(model: ModelFile, key: str, value: Any) -> ModelFile:
    """The model with another value of a key; None removes it."""
    metadata = {**model.metadata, f"{model.architecture}.{key}": value}
    return replace(model, metadata={k: v for k, v in metadata.items() if v is not None})


def assert_refused(model: ModelFile, table: Mapping[str, tuple[Any, ...]]) -> None:
    for key, values in table.items():
        for value in values:
            if value is None and not model.has(f"{{arch}}.{key}"):
                continue
            with pytest.raises(ModelFileError):
                open_architecture(changed(model, key, value))
                pytest.fail(f"{key} = {value!r} was accepted")


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, tiny_model: TinyModel) -> ModelFile:
    return ModelFile.open(tiny_model(request.param))


def test_impossible_values_are_refused(model: ModelFile) -> None:
    assert_refused(model, IMPOSSIBLE if model.architecture != "gemma3" else  # which may turn a part of each head
                   IMPOSSIBLE | {"rope.dimension_count": (0, -2, 31, 64, 2.0)})
    assert_refused(model, OF_ONE_FAMILY.get(model.architecture, {}))
    assert_refused(model, WITH_EXPERTS if model.architecture in EXPERT_ARCHITECTURES else {})


def test_an_error_names_the_key_and_the_file(tiny_model: TinyModel) -> None:
    model = ModelFile.open(tiny_model("qwen3"))
    with pytest.raises(ModelFileError, match=r"qwen3\.attention\.head_count'? is 0") as caught:
        open_architecture(changed(model, "attention.head_count", 0))
    assert caught.value.path == str(model.path)


@pytest.mark.parametrize("key", ["attention.head_count_kv", "attention.key_length", "attention.value_length",
                                 "rope.dimension_count", "rope.freq_base"])
def test_what_llama_cpp_does_not_need_may_be_missing(tiny_model: TinyModel, key: str) -> None:
    for architecture in ARCHITECTURES:
        model = ModelFile.open(tiny_model(architecture, n_kv_heads=4))
        hp = open_architecture(changed(model, key, None)).hp
        assert (hp.n_kv_heads, hp.head_dim, hp.rope.n_dims) == (4, 32, 32)


def test_experts_of_qwen3moe_share_the_width_that_the_file_gives_for_all(tiny_model: TinyModel) -> None:
    model = changed(ModelFile.open(tiny_model("qwen3moe")), "expert_feed_forward_length", None)
    assert open_architecture(changed(model, "feed_forward_length", 512)).hp.expert_ffn_size == 256  # 2 are used


def test_random_claims_never_end_in_another_error(model: ModelFile) -> None:
    rng = random.Random(model.architecture)
    keys = [key for key in model.metadata if key.startswith(f"{model.architecture}.")]
    values = (0, 1, 2, 3, 7, 31, 32, 64, 2**16, 2**31 - 1, 2**32, 2**64 - 1, -1, 0.0, 0.5, -0.0, 1e38, nan, inf, -inf,
              "", "x", True, False, (), (0,), (1, 0), (True, False), 1e-45)
    n_opened = 0
    for _ in range(400):
        metadata = {**model.metadata, **{rng.choice(keys): rng.choice(values) for _ in range(rng.randint(1, 3))}}
        try:
            arch = open_architecture(replace(model, metadata=metadata))
        except ModelFileError:
            continue
        n_opened += 1
        assert arch.hp.n_layers == 2 and arch.hp.hidden_size == 128
    assert n_opened > 5  # a context length or an epsilon may be anything sensible
