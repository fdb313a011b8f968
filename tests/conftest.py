"""What all tests share: tiny models, real models, and a home of their own so that nobody's files are touched.

A test asks for a real model, for root or for a browser with `real_model` and `require`; where that is missing the
test is skipped with the reason, or fails when EDGERT_TEST_STRICT=1 (the project's own machines).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before anything loads ggml, the oracle included: threads that spin without end make a busy machine crawl.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import pytest
from hypothesis import settings
from tiny_models import write_tiny_model

from edgert.paths import Paths

# The same cases in every run: a failure can be had again. Deadlines would measure the machine.
settings.register_profile("edgert", derandomize=True, deadline=None)
settings.load_profile("edgert")

REAL_MODELS = {
    "smollm2-135m": "SmolLM2-135M-Instruct.Q4_1.gguf",
    "gemma3-270m": "gemma-3-270m-q4_k_m.gguf",
    "qwen2.5-coder-0.5b": "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    "qwen2.5-coder-1.5b": "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
}


@pytest.fixture(scope="session", autouse=True)
def users_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's own models directory, looked up before EDGERT_HOME moves to a temporary directory."""
    models = Paths.of_user().models
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("EDGERT_HOME", str(tmp_path_factory.mktemp("edgert-home")))
        yield models


@pytest.fixture(autouse=True)
def nobody_disturbs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test measures is not measured again because other programs computed meanwhile: tests do themselves."""
    monkeypatch.setattr("edgert.neighbours._MOST_SHARE", 1.0)


@pytest.fixture(scope="session")
def require() -> Callable[[object, str], None]:
    """`require(condition, reason)`: skip the test when the condition is false, or fail it in strict mode."""

    def check(condition: object, reason: str) -> None:
        if condition:
            return
        if os.environ.get("EDGERT_TEST_STRICT") == "1":
            pytest.fail(f"EDGERT_TEST_STRICT=1 and {reason}", pytrace=False)
        pytest.skip(reason)

    return check


@pytest.fixture(scope="session")
def real_model(users_models: Path, require: Callable[[object, str], None]) -> Callable[[str], Path]:
    """`real_model("smollm2-135m")`: the path of a real model's file, wherever it lies (see REAL_MODELS)."""
    named = os.environ.get("EDGERT_TEST_MODELS")
    directories = [*([Path(named).expanduser()] if named else []), Path("~/.cache/edgert-test-models").expanduser(),
                   users_models]

    def find(name: str) -> Path:
        file_name = REAL_MODELS[name]
        for directory in directories:
            if (direct := directory / file_name).is_file():
                return direct
            if (below := next(directory.rglob(file_name), None)) is not None:
                return below
        require(False, f"{file_name} is in none of {', '.join(map(str, directories))}")
        raise AssertionError("require() has ended the test")

    return find


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model("llama", quantisation="Q4_K", ...)`: write_tiny_model's file, written once per session."""
    directory = tmp_path_factory.mktemp("tiny-models")
    written: dict[str, Path] = {}

    def write(architecture: str, **options: Any) -> Path:
        key = repr((architecture, sorted(options.items())))
        if key not in written:
            name = f"{architecture}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
            written[key] = write_tiny_model(directory / f"{name}.gguf", architecture, **options)
        return written[key]

    return write
