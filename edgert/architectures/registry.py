"""Which architecture serves which file. One line for each family."""

from __future__ import annotations

import importlib

from edgert.architectures.base import Architecture, check_tensors
from edgert.errors import UnsupportedArchitecture
from edgert.ggml.types import multipliable_types, readable_types
from edgert.gguf.model_file import ModelFile

# general.architecture: (module, class)
_FAMILIES = {
    "llama": ("llama", "Llama"),
    "qwen2": ("qwen2", "Qwen2"),
    "qwen3": ("qwen3", "Qwen3"),
    "gemma3": ("gemma3", "Gemma3"),
    "qwen3moe": ("qwen3moe", "Qwen3Moe"),
    "olmoe": ("olmoe", "Olmoe"),
    "smallthinker": ("smallthinker", "SmallThinker"),
}
SUPPORTED = tuple(_FAMILIES)


def open_architecture(model: ModelFile) -> Architecture:
    """The file's architecture, with every tensor's presence, shape and type checked.

    Raises UnsupportedArchitecture for an unknown family, ModelFileError for a file that contradicts itself.
    """
    family = _FAMILIES.get(model.architecture)
    if family is None:
        raise UnsupportedArchitecture(str(model.path), model.architecture, SUPPORTED)
    module, name = family
    arch: Architecture = getattr(importlib.import_module(f"edgert.architectures.{module}"), name)(model)
    check_tensors(arch, model, multipliable_types(), readable_types())
    return arch
