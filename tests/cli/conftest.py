"""The command in this process: `edgert("run", model, "prompt", stdin=b"...")` gives status, output and messages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import FakeStdin, Outcome

from apps.cli.main import main

Command = Callable[..., Outcome]


@pytest.fixture
def edgert(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def call(*words: object, stdin: bytes = b"", terminal: bool = False) -> Outcome:
        monkeypatch.setattr("sys.stdin", FakeStdin(stdin, terminal))
        status = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return Outcome(status, out, err)

    return call


@pytest.fixture(scope="session")
def model(tiny_model: Callable[..., Path]) -> Path:
    """A small model with a vocabulary and ChatML."""
    return tiny_model("llama")
