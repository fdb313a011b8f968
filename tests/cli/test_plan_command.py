"""`edgert plan`: what it prints, and what it refuses, before a weight is read."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Outcome

from apps.cli.main import main
from edgert.engine import calibration
from edgert.engine.resident import ResidentWeights
from offload import rehearsal
from offload.window import WindowWeights

TinyModel = Callable[..., Path]


def once(run: Callable[[], object]) -> float:
    """A pass that always takes as long, however busy the machine is."""
    run()
    return 0.01


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planning opens no weights; and measures little, for speeds are not what is tested here."""
    for source in (ResidentWeights, WindowWeights):
        monkeypatch.setattr(source, "__init__", lambda *_, **__: pytest.fail("weights were opened"))
    for name, value in {"_SET_BYTES": 2**16, "_COPY_BYTES": 2**20, "_N_CACHED": 256, "_LEAST_RUNS": 1,
                        "_RUNS_S": 0.0, "_N_ROWS": 64}.items():
        monkeypatch.setattr(calibration, name, value)
    for name, other in {"_LEAST_RING_BYTES": 2**20, "_MOST_RING_BYTES": 2**20, "_typical": once}.items():
        monkeypatch.setattr(rehearsal, name, other)
    monkeypatch.setattr("edgert.device._DISK_S", 0.01)


@pytest.fixture
def edgert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
           capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs the command line with a home of its own."""
    monkeypatch.setenv("EDGERT_HOME", str(tmp_path / "edgert"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    for variable in ("EDGERT_MODELS_DIR", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "LLAMA_CACHE",
                     "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)

    def run(*words: object) -> Outcome:
        status = main([*map(str, words)])
        return Outcome(status, *capsys.readouterr())

    return run


Edgert = Callable[..., Outcome]


def planned(edgert: Edgert, *words: object) -> dict[str, Any]:
    outcome = edgert("plan", *words, "--json")
    assert outcome.status == 0, outcome.err
    (line,) = outcome.out.splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


def test_a_plan_says_where_memory_goes_and_how_fast_it_will_be(edgert: Edgert, tiny_model: TinyModel) -> None:
    path = tiny_model("llama")
    plan = planned(edgert, path, "--memory", "2G", "--context", "512")
    assert (plan["weights"], plan["context_length"], plan["budget_bytes"]) == ("resident", 512, 2**31)
    assert sum(plan["memory"].values()) == plan["peak_bytes"] <= 2**31
    assert plan["memory"]["weights, mapped"] == plan["file_bytes"] == path.stat().st_size
    assert plan["predicted_tok_s_empty"] >= plan["predicted_tok_s"] >= plan["predicted_tok_s_full"] > 0
    assert plan["predicted_time_to_first_token_s"] > 0
    assert plan["limit"] in ("disk", "memory bandwidth", "compute")
    assert plan["tok_s_with_another_gib"] >= plan["predicted_tok_s"]
    assert plan["smallest_budget_bytes"] <= plan["peak_bytes"] + 2**20, "a start may take a little more"


def test_the_table_fits_80_columns(edgert: Edgert, tiny_model: TinyModel) -> None:
    outcome = edgert("plan", tiny_model("llama"), "--memory", "2G", "--target-tok-s", "1e-3")
    assert outcome.status == 0
    assert max(map(len, outcome.out.splitlines())) <= 80
    for said in ("weights", "KV cache", "memory at the most", "2.00 GiB", "smallest that works", "tokens per second",
                 "limited by", "with another GiB", "first token after", "0.001 tokens/s is reached"):
        assert said in outcome.out
    assert "measuring this device" in outcome.err


def test_the_table_says_how_many_tokens_are_attended(edgert: Edgert, tiny_model: TinyModel) -> None:
    outcome = edgert("plan", tiny_model("llama"), "--memory", "2G", "--context", "4096", "--kv-budget", "128")
    assert "4096 tokens; 128 attended from 2048 on" in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 80


def test_the_second_plan_measures_nothing(edgert: Edgert, tiny_model: TinyModel,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_model("llama")
    first = planned(edgert, path, "--memory", "2G")
    monkeypatch.setattr(calibration, "_time", lambda run: pytest.fail("measured again"))
    monkeypatch.setattr("offload.disk_speed.measure_disk", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(rehearsal, "rehearse", lambda *_: pytest.fail("rehearsed again"))
    second = planned(edgert, path, "--memory", "2G")
    assert second["predicted_tok_s"] == first["predicted_tok_s"]


def test_an_impossible_budget_is_refused_with_the_smallest_that_works(edgert: Edgert, tiny_model: TinyModel) -> None:
    outcome = edgert("plan", tiny_model("llama"), "--memory", "1M")
    assert outcome.status == 5
    assert "the smallest that works is" in outcome.err
    assert outcome.out == ""


def test_a_target_out_of_reach_says_so(edgert: Edgert, tiny_model: TinyModel) -> None:
    path = tiny_model("llama")
    plan = planned(edgert, path, "--memory", "2G", "--target-tok-s", "999999")
    assert plan["target"] == {"tok_s": 999999, "is_reached": False, "smallest_budget_bytes": None}
    outcome = edgert("plan", path, "--memory", "2G", "--target-tok-s", "999999")
    assert "is not reached" in outcome.out and "no memory is enough" in outcome.out


def test_all_models_are_ranked_and_those_that_cannot_run_say_why(edgert: Edgert, tiny_model: TinyModel,
                                                                 tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    shutil.copy(tiny_model("llama"), models / "small.gguf")
    shutil.copy(tiny_model("qwen2", n_layers=6), models / "large.gguf")
    (models / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    ranking = planned(edgert, "--all", "--models-dir", models)
    names = [one["model"] for one in ranking["models"]]
    assert sorted(names) == ["large", "small"]
    speeds = [one["predicted_tok_s"] for one in ranking["models"]]
    assert speeds == sorted(speeds, reverse=True)
    assert list(ranking["refused"]) == ["broken"]
    outcome = edgert("plan", "--all", "--models-dir", models)
    assert "small" in outcome.out and "broken" in outcome.out
    assert max(len(line) for line in outcome.out.splitlines() if "broken" not in line) <= 80


@pytest.mark.parametrize(("words", "said"), [
    ((), "MODEL, or --all"), (("x.gguf", "--all"), "MODEL, or --all"), (("--all", "--plot", "a.svg"), "one model"),
    (("x.gguf", "--plot", "a.jpg"), ".svg or .png"), (("x.gguf", "--plot", "/no/such/dir/a.svg"), "no such directory"),
    *((("x.gguf", "--target-tok-s", text), "tokens per second") for text in ("0", "nan", "-1", "fast")),
    (("x.gguf", "--prompt-tokens", "0"), "whole number")], ids=str)
def test_slips_are_usage_errors(edgert: Edgert, words: tuple[str, ...], said: str) -> None:
    outcome = edgert("plan", *words)
    assert outcome.status == 2
    assert said in outcome.err


@pytest.mark.parametrize("name", ["plan.svg", "plan.png"])
def test_a_plot_is_drawn(edgert: Edgert, tiny_model: TinyModel, tmp_path: Path, require: Callable[[object, str], None],
                         name: str) -> None:
    require(importlib.util.find_spec("matplotlib"), "matplotlib is not installed")
    planned(edgert, tiny_model("llama"), "--memory", "2G", "--plot", tmp_path / name)
    content = (tmp_path / name).read_bytes()
    assert content.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")
    if name.endswith("svg"):
        assert b"tokens in the context" in content or len(content) > 10_000


def test_a_plot_without_matplotlib_says_what_to_install(edgert: Edgert, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apps.cli.plan_plot.find_spec", lambda name: None)
    outcome = edgert("plan", "x.gguf", "--plot", "plan.svg")
    assert outcome.status == 2
    assert "edgert[plot]" in outcome.err
