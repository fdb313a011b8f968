"""`edgert distill`: the head that it leaves is the one that the model then uses; what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import write_tiny_model

pytest.importorskip("torch", reason="needs torch: pip install 'edgert[distill]'")

from apps.cli.main import main
from edgert.architectures.registry import open_architecture
from edgert.gguf.model_file import ModelFile
from edgert.kv_tiers import head_of
from edgert.paths import Paths


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGERT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "80")
    return write_tiny_model(tmp_path / "tiny.gguf", "llama", n_layers=3)


def test_the_head_is_found_by_the_model_that_it_was_made_from(model: Path, tmp_path: Path,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for index in range(30):
        lines = (f"Sentence {n * index} is about {n} things.\n" for n in range(100))
        (texts / f"{index}.md").write_text("".join(lines))
    sizes = ["--examples", "2", "--epochs", "1", "--dim", "16", "--threads", "1"]
    assert main(["distill", str(model), "--text", str(texts), *sizes]) == 0
    out, err = capsys.readouterr()
    directory = Path(out.strip())
    card = json.loads((directory / "card.json").read_text())
    assert card["seed"] == 7 and card["recipe"]["dim"] == 16 and card["data"]["examples"] == 2
    assert "epoch 1: loss" in err and "coverage_at_128" in err
    file = ModelFile.open(model)
    head = head_of(file, open_architecture(file), Paths.of_user())
    assert head is not None and head.dim == 16 and head.feature_layers == (1,)


@pytest.mark.parametrize(("words", "problem"), [
    (["--text", "/nowhere"], "no directory"), (["--feature-layers", "1", "2"], "cannot see the layers [1, 2]"),
    (["--minutes", "0"], "minutes"), (["--minutes", "nan"], "minutes")])
def test_what_makes_no_sense_is_refused(model: Path, words: list[str], problem: str,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", str(model), *words]) == 2
    assert problem in capsys.readouterr().err


def test_without_torch_it_says_what_to_install(model: Path, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    for name in [name for name in sys.modules if name.startswith("retrieval.distillation")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["distill", str(model)]) == 2
    assert "edgert[distill]" in capsys.readouterr().err
