"""The test suite's own floor: tests keep away from the user's files, and strict mode leaves nothing out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgert.paths import Paths


def test_tests_have_a_home_of_their_own(users_models: Path) -> None:
    paths = Paths.of_user()
    assert users_models not in (paths.models, *paths.models.parents)
    assert not paths.models.is_relative_to(Path.home())


def test_what_is_missing_skips_or_fails_in_strict_mode(require: Callable[[object, str], None],
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    require(True, "never said")
    monkeypatch.setenv("EDGERT_TEST_STRICT", "0")
    with pytest.raises(pytest.skip.Exception, match="needs root"):
        require(False, "needs root")
    monkeypatch.setenv("EDGERT_TEST_STRICT", "1")
    with pytest.raises(pytest.fail.Exception, match="needs root"):
        require(False, "needs root")


def test_a_tiny_model_is_written_once_per_choice(tiny_model: Callable[..., Path]) -> None:
    assert tiny_model("llama") == tiny_model("llama")
    assert tiny_model("llama") != tiny_model("llama", seed=1)
    assert tiny_model("llama", seed=1).read_bytes() != tiny_model("llama").read_bytes()
