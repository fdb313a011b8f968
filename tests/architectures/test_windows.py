"""Which layers have a sliding window, by period and by list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from edgert.architectures.windows import window_layers
from edgert.errors import ModelFileError
from edgert.gguf.model_file import ModelFile
from edgert.gguf.values import Value

KEY = "gemma3.attention.sliding_window_pattern"


def model_with(tiny_model: Callable[..., Path], pattern: Value | None) -> ModelFile:
    model = ModelFile.open(tiny_model("gemma3"))
    metadata = {key: value for key, value in model.metadata.items() if key != KEY}
    return replace(model, metadata=metadata if pattern is None else {**metadata, KEY: pattern})


@pytest.mark.parametrize(("pattern", "period", "full_first", "windowed"), [
    (None, 6, False, {0, 1, 2, 3, 4, 6}),  # Gemma 3: five, then one that sees everything
    (None, 4, True, {1, 2, 3, 5, 6}),  # SmallThinker: one that sees everything, then three
    (2, 6, False, {0, 2, 4, 6}),  # the file's own period counts
    (1, 6, False, set()),
    (1, 6, True, set()),
    (0, 6, False, {0, 1, 2, 3, 4, 5, 6}),
    (0, 6, True, {0, 1, 2, 3, 4, 5, 6}),
    ((True, False, False, True, True, False, False), 6, False, {0, 3, 4}),
    ((1, 0, 0, 1, 1, 0, 0), 6, True, {0, 3, 4}),
])
def test_layers_with_a_window(tiny_model: Callable[..., Path], pattern: Value | None, period: int, full_first: bool,
                              windowed: set[int]) -> None:
    assert window_layers(model_with(tiny_model, pattern), 7, period, full_first=full_first) == windowed


def test_a_list_names_every_layer(tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(ModelFileError, match="3 entries for 7 layers"):
        window_layers(model_with(tiny_model, (True, False, True)), 7, 6)
