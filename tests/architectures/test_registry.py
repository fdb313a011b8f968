"""A file is computed by its own family, or refused before a weight is touched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_architectures import ARCHITECTURES

from edgert.architectures.base import blocks_of
from edgert.architectures.registry import SUPPORTED, open_architecture
from edgert.errors import ModelFileError, UnsupportedArchitecture
from edgert.gguf.model_file import ModelFile
from edgert.gguf.types import TENSOR_TYPES_BY_NAME

TinyModel = Callable[..., Path]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, tiny_model: TinyModel) -> ModelFile:
    return ModelFile.open(tiny_model(request.param))


def without(model: ModelFile, name: str) -> ModelFile:
    return replace(model, tensors={key: info for key, info in model.tensors.items() if key != name})


def with_tensor(model: ModelFile, name: str, **changes: object) -> ModelFile:
    return replace(model, tensors={**model.tensors, name: replace(model.tensors[name], **changes)})  # type: ignore[arg-type]


def test_every_family_with_a_tiny_model_is_supported() -> None:
    assert set(SUPPORTED) == set(ARCHITECTURES)


def test_an_unknown_family_is_refused_with_the_names_of_the_supported_ones(model: ModelFile) -> None:
    unknown = replace(model, metadata={**model.metadata, "general.architecture": "mamba"})
    with pytest.raises(UnsupportedArchitecture) as caught:
        open_architecture(unknown)
    assert caught.value.architecture == "mamba"
    assert all(name in caught.value.next_step for name in ARCHITECTURES)


def test_every_tensor_of_the_file_belongs_to_a_block(model: ModelFile) -> None:
    arch = open_architecture(model)
    names = [spec.name for block in blocks_of(arch.hp) for spec in arch.specs(block)]
    assert set(names) >= set(model.tensors)


def test_a_missing_tensor_is_named(model: ModelFile) -> None:
    optional = {"output.weight", *(name for name in model.tensors if name.endswith(".bias"))}
    for name in set(model.tensors) - optional:
        with pytest.raises(ModelFileError, match=name.replace(".", r"\.")):
            open_architecture(without(model, name))


def test_a_file_without_a_head_uses_its_embedding(model: ModelFile) -> None:
    arch = open_architecture(without(model, "output.weight"))
    output = next(block for block in blocks_of(arch.hp) if block.kind == "output")
    assert "token_embd.weight" in {spec.name for spec in arch.specs(output)}


@pytest.mark.parametrize("change", ["wider", "longer", "flat", "deeper"])
def test_a_tensor_of_another_shape_is_named(model: ModelFile, change: str) -> None:
    for name, info in model.tensors.items():
        first, *others = info.shape
        shape = {"wider": (first + 32, *others), "longer": (*info.shape[:-1], info.shape[-1] + 1),
                 "flat": (info.n_elements,), "deeper": (*info.shape, 2)}[change]
        # The embedding's rows are the vocabulary's size, whatever they are: then the head is the one that does not fit.
        if shape == info.shape or (name == "token_embd.weight" and change == "longer"):
            continue
        with pytest.raises(ModelFileError, match=r"token_embd|is .*expected"):
            open_architecture(with_tensor(model, name, shape=shape))


def test_a_type_without_arithmetic_is_named(model: ModelFile) -> None:
    for name in model.tensors:
        for type_name in ("Q8_K", "I32", "F64"):
            with pytest.raises(ModelFileError, match=f"{name} has type {type_name}"):
                open_architecture(with_tensor(model, name, type=TENSOR_TYPES_BY_NAME[type_name]))


def test_a_norm_must_be_float32(model: ModelFile) -> None:
    with pytest.raises(ModelFileError, match=r"output_norm\.weight has type F16"):
        open_architecture(with_tensor(model, "output_norm.weight", type=TENSOR_TYPES_BY_NAME["F16"]))


@pytest.mark.parametrize("name", ["blk.2.attn_q.weight", "blk.0.attn_q.scale", "blk.0.ffn_up_shexp.weight",
                                  "cls.weight"])
def test_a_tensor_that_would_be_ignored_is_refused(model: ModelFile, name: str) -> None:
    extra = replace(model, tensors={**model.tensors, name: model.tensors["blk.0.attn_q.weight"]})
    with pytest.raises(ModelFileError, match=name.replace(".", r"\.")):
        open_architecture(extra)
