"""A cluster of processes on loopback: the right answer, weights sent once, and losses that nobody notices but by a
pause."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from command_line import start
from ranks import random_tokens

from benchmarks.cluster_processes import DEADLINE_S, WorkerProcess, cluster
from edgert.generation import Generation
from edgert.ggml.backend import Cancelled
from edgert.runtime import Runtime
from edgert.text.sampler import SamplingParams
from tensorpar.leader import ClusterEngine
from tensorpar.pace import Pace
from tensorpar.profile import Profile
from tensorpar.workers import ClusterOptions

TinyModel = Callable[..., Path]
AtHome = Callable[[Path], None]
PROMPT = list(range(5, 45))
GREEDY = SamplingParams(temperature=0)
ALL = ClusterOptions("all", discovery_s=0)


@pytest.fixture
def model(tiny_model: TinyModel) -> Path:
    # Without quantisation, the order in which parts are added moves no token.
    return tiny_model("qwen2", quantisation="F32", n_heads=8, n_kv_heads=4, head_dim=32, n_layers=4)


@contextmanager
def loaded(model: Path, options: ClusterOptions | None = ALL) -> Iterator[Runtime]:
    with Runtime.load(model, threads=1, context=512, layout="plain", cluster=options) as runtime:
        yield runtime


def answer(runtime: Runtime, n_tokens: int = 24) -> Generation:
    return runtime.generate(PROMPT, max_tokens=n_tokens, sampling=GREEDY)


def alone(model: Path, n_tokens: int = 24) -> list[int]:
    with loaded(model, None) as runtime:
        generation = answer(runtime, n_tokens)
        generation.result()
        return generation.token_ids


def names(runtime: Runtime) -> list[str]:
    return [one["name"] for one in runtime.plan()["cluster"]["devices"]]


def wait_until(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_an_answer_and_weights_that_are_sent_once(model: Path, tmp_path: Path, at_home: AtHome) -> None:
    expected = alone(model)
    with cluster(tmp_path, 2, measured=False) as made:
        at_home(made.leader_home)
        for is_first in (True, False):
            with loaded(model) as runtime:
                generation = answer(runtime)
                generation.result()
                assert generation.token_ids == expected
                sent = runtime.plan()["cluster"]["sent_slice_bytes"]
                assert set(sent) == {"worker1", "worker2"}
                assert all(n_bytes > 10_000 if is_first else n_bytes == 0 for n_bytes in sent.values())
                collective = runtime.engine.collective
                n_passes, n_layers = 24, 4
                assert collective.n_broadcasts == n_passes
                assert collective.n_all_reduces == n_passes * (2 * n_layers - 1)
                assert collective.n_reduces == n_passes
        assert len(list((made.leader_home / "cache" / "slices").iterdir())) == 1


def test_a_long_text_is_looked_at_in_part_and_goes_on_without_a_lost_device(
        model: Path, tmp_path: Path, at_home: AtHome, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets of as many tokens as there are give the answer of full attention; smaller ones an answer too."""
    monkeypatch.setattr("retrieval.opening.FROM_TOKENS", 64)
    prompt, expected = random_tokens(150), list[int]()
    with loaded(model, None) as runtime:
        generation = runtime.generate(prompt, max_tokens=24, sampling=GREEDY)
        generation.result()
        expected = generation.token_ids
    with cluster(tmp_path, 2, measured=False) as made:
        at_home(made.leader_home)
        for budget, wanted in ((180, expected), (64, None)):
            with Runtime.load(model, threads=1, context=512, layout="plain", cluster=ALL, kv_budget=budget) as runtime:
                attended, generation = list[int | None](), runtime.generate(prompt, max_tokens=24, sampling=GREEDY)
                for _ in generation:
                    attended.append(runtime.engine.selected_tokens)
                    if len(attended) == 8 and wanted is None:
                        lose(made.workers[0], "killed")
                if wanted is not None:
                    assert generation.token_ids == wanted
                    continue
                assert len(generation.token_ids) >= 20 and names(runtime) == ["leader", "worker2"]
                sizes = [one for one in attended if one is not None]
                assert len(sizes) > 10 and {*sizes} <= {*range(64, 81)}


def lose(worker: WorkerProcess, how: str) -> None:
    worker.signal(signal.SIGKILL if how == "killed" else signal.SIGSTOP)


@pytest.mark.parametrize(("n_workers", "how"), [(1, "killed"), (2, "killed"), (2, "stopped")])
def test_a_lost_worker_costs_a_pause_and_no_token(model: Path, tmp_path: Path, at_home: AtHome, n_workers: int,
                                                  how: str, caplog: pytest.LogCaptureFixture) -> None:
    expected = alone(model)
    with cluster(tmp_path, n_workers, measured=False) as made, caplog.at_level(logging.WARNING):
        at_home(made.leader_home)
        with loaded(model) as runtime:
            got = []
            for piece in answer(runtime):
                got.append(piece.token_id)
                if len(got) == 8:
                    lose(made.workers[0], how)
            assert got == expected
            assert names(runtime) == ["leader", "worker2"][:n_workers]
            assert "worker1 was lost" in caplog.text
            second = answer(runtime)
            second.result()
            assert second.token_ids == expected


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_workers_rows_of_the_head_are_the_leaders(model: Path, tmp_path: Path, at_home: AtHome, lost: int,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensorpar.planner._gather_s", lambda *_: 0.0)  # it always pays
    expected = alone(model)
    with cluster(tmp_path, 2, measured=False) as made:
        at_home(made.leader_home)
        with loaded(model) as runtime:
            rows = [one["head_rows"] for one in runtime.plan()["cluster"]["devices"]]
            assert rows == [((0, 128),), ((128, 256),), ((256, 320),)]
            got = []
            for piece in answer(runtime):
                got.append(piece.token_id)
                if len(got) == 8:
                    lose(made.workers[lost], "killed")
            assert got == expected
            kept = runtime.plan()["cluster"]["devices"]
            assert len(kept) == 2 and kept[0]["head_rows"] == [((0, 256),), ((0, 128), (256, 320))][lost]


def test_a_worker_lost_in_prefill(model: Path, tmp_path: Path, at_home: AtHome) -> None:
    expected = alone(model)
    with cluster(tmp_path, 1, measured=False) as made:
        at_home(made.leader_home)
        with loaded(model) as runtime:
            lose(made.workers[0], "killed")
            generation = answer(runtime)
            generation.result()
            assert generation.token_ids == expected


def test_a_worker_that_comes_back_is_used_again(model: Path, tmp_path: Path, at_home: AtHome,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensorpar.leader._LOOK_AGAIN_S", 0.0)
    expected = alone(model)
    with cluster(tmp_path, 1, measured=False) as made:
        at_home(made.leader_home)
        with loaded(model) as runtime:
            made.workers[0].kill()
            assert answer(runtime).result() is not None
            assert names(runtime) == ["leader"]
            made.workers[0].start()
            generation = answer(runtime)
            generation.result()
            assert names(runtime) == ["leader", "worker1"]
            assert generation.token_ids == expected


def test_guesses_are_verified_in_one_pass_of_as_many_sums(model: Path, tmp_path: Path, at_home: AtHome,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgert.speculation.DraftLength.choose", lambda _, match_length, n_most: min(3, n_most))
    monkeypatch.setattr("tensorpar.leader._FAR_S", 0.0)
    copied = PROMPT[:6] * 5
    with loaded(model, None) as runtime:
        expected = runtime.generate(copied, max_tokens=24, sampling=GREEDY)
        expected.result()
    with cluster(tmp_path, 1, measured=False) as made:
        at_home(made.leader_home)
        with loaded(model) as runtime:
            generation = runtime.generate(copied, max_tokens=24, sampling=GREEDY)
            generation.result()
            assert generation.token_ids == expected.token_ids
            assert generation.timings.draft_n > 0
            collective = runtime.engine.collective
            assert collective.n_all_reduces == collective.n_broadcasts * (2 * 4 - 1)


def test_a_worker_that_becomes_slow_is_left_behind(model: Path, tmp_path: Path, at_home: AtHome,
                                                   monkeypatch: pytest.MonkeyPatch,
                                                   caplog: pytest.LogCaptureFixture) -> None:
    expected = alone(model)
    with cluster(tmp_path, 2, measured=False) as made, caplog.at_level(logging.WARNING):
        at_home(made.leader_home)
        with loaded(model) as runtime:
            times_s = iter([0.001] * 11 + [60.0] * 12)
            passed = Pace.passed
            monkeypatch.setattr("tensorpar.pace._SLOW", 2.0)
            monkeypatch.setattr(Pace, "passed", lambda self, _, waited_s: passed(
                self, (seconds := next(times_s)), dict.fromkeys(waited_s, 0.0) | {2: seconds * 0.9}))
            generation = answer(runtime)
            generation.result()
            assert generation.token_ids == expected
            assert names(runtime) == ["leader", "worker1"] and "become slow" in caplog.text


def test_a_cancelled_answer_leaves_the_cluster_in_step(model: Path, tmp_path: Path, at_home: AtHome) -> None:
    expected = alone(model)
    with cluster(tmp_path, 2, measured=False) as made:
        at_home(made.leader_home)
        with loaded(model) as runtime:
            for n_done in (1, 5):
                generation = answer(runtime)
                for number, _ in enumerate(generation, start=1):
                    if number == n_done:
                        generation.cancel()
                assert generation.finish_reason == "cancelled"
                again = answer(runtime)
                again.result()
                assert again.token_ids == expected


def test_a_prompt_that_was_stopped_halfway_goes_on_from_there(model: Path, tmp_path: Path, at_home: AtHome,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = np.array(random_tokens(64), np.int32)
    with loaded(model, None) as runtime:
        expected = runtime.engine.step(prompt)[0].copy()
    with cluster(tmp_path, 1, measured=False) as made:
        at_home(made.leader_home)
        with Runtime.load(model, threads=1, context=512, layout="plain", batch=16,
                          cluster=ClusterOptions(1, discovery_s=0)) as runtime:
            engine = runtime.engine
            commit = engine.kv.commit
            monkeypatch.setattr(engine.kv, "commit", lambda batch: (commit(batch), engine.cancel()))
            with pytest.raises(Cancelled):
                engine.step(prompt)
            monkeypatch.undo()
            engine.resume()
            n_done = engine.kv.length
            assert 0 < n_done < 64
            assert np.abs(engine.step(prompt[n_done:])[0] - expected).max() < 0.1
            assert engine.kv.length == 64


def test_what_could_not_be_opened_after_a_loss_is_with_the_next_step_and_has_the_text_so_far(
        model: Path, tmp_path: Path, at_home: AtHome) -> None:
    prompt = np.array(random_tokens(40), np.int32)
    with loaded(model, None) as runtime:
        runtime.engine.step(prompt)
        expected = runtime.engine.step(np.array([7], np.int32))[0].copy()
    with cluster(tmp_path, 1, measured=False) as made:
        at_home(made.leader_home)
        with loaded(model, ClusterOptions(1, discovery_s=0)) as runtime:
            engine = runtime.engine
            assert isinstance(engine, ClusterEngine)
            engine.step(prompt)
            lost, engine._inner = engine._inner, None
            assert lost is not None
            lost.close()
            assert np.abs(engine.step(np.array([7], np.int32))[0] - expected).max() < 0.1
            assert engine.kv.length == 41


def holds_a_slice(worker: WorkerProcess) -> bool:
    assert worker.process is not None
    return any("slices" in one.path for one in psutil.Process(worker.process.pid).memory_maps())


def test_workers_wait_again_when_their_leader_is_gone(model: Path, tmp_path: Path, at_home: AtHome) -> None:
    with cluster(tmp_path, 1, measured=False) as made:
        at_home(made.leader_home)
        worker = made.workers[0]
        with loaded(model) as runtime:
            assert answer(runtime, 2).result() is not None
            engine = runtime.engine
            assert isinstance(engine, ClusterEngine)
            assert holds_a_slice(worker)
        wait_until(lambda: "the leader has gone" in worker.log())
        assert not holds_a_slice(worker)
        with loaded(model) as runtime:
            assert names(runtime) == ["leader", "worker1"]
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_workers_wait_again_when_their_leader_dies_in_an_answer(model: Path, tmp_path: Path, at_home: AtHome,
                                                                how: str) -> None:
    with cluster(tmp_path, 2, measured=False) as made:
        at_home(made.leader_home)
        command = ("run", model, "hello", "--raw", "--temp", 0, "--max-tokens", 400, "--threads", 1, "--context", 512,
                   "--cluster", "--devices", "all")
        with start([str(one) for one in command], env={**os.environ, "EDGERT_HOME": str(made.leader_home)}) as leader:
            assert leader.stdin is not None and leader.stdout is not None
            leader.stdin.close()  # else it waits for more of the prompt
            assert leader.stdout.read(1)
            assert all(holds_a_slice(one) for one in made.workers)
            leader.send_signal(signal.SIGKILL if how == "killed" else signal.SIGSTOP)
            wait_until(lambda: all("the leader has gone" in one.log() for one in made.workers))
            assert not any(holds_a_slice(one) for one in made.workers)
            leader.kill()
        with loaded(model) as runtime:
            assert names(runtime) == ["leader", "worker1", "worker2"]


def test_a_small_model_is_faster_alone_and_the_plan_says_so(model: Path, tmp_path: Path, at_home: AtHome) -> None:
    with cluster(tmp_path, 1, measured=False) as made:
        at_home(made.leader_home)
        with loaded(model, ClusterOptions(discovery_s=0)) as runtime:
            plan = runtime.plan()["cluster"]
            assert [one["name"] for one in plan["devices"]] == ["leader"]
            assert "this device alone" in plan["reason"] and "worker1" in plan["reason"]


def test_a_worker_streams_within_its_own_budget(tiny_model: TinyModel, tmp_path: Path, at_home: AtHome,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    # A leader with room would take it all; with as little as the worker has, each gets a half.
    small = Profile({0: 1e-10}, 1e-10, 1e9, 2**20, 1)
    monkeypatch.setattr("edgert.runtime.cluster_profile", lambda *_: small)
    model = tiny_model("llama", quantisation="F32", hidden_size=512, n_layers=6, ffn_size=4096, n_heads=8,
                       n_kv_heads=4)
    expected = alone(model, 6)
    with cluster(tmp_path, 1, ("--memory", "120M"), measured=False) as made:
        at_home(made.leader_home)
        with loaded(model) as runtime:
            generation = answer(runtime, 6)
            generation.result()
            assert generation.token_ids == expected
        streamed = re.search(r"streamed_per_pass ([0-9.]+) MiB", made.workers[0].log())
        assert streamed is not None and float(streamed[1]) > 1


def test_a_leader_whose_memory_its_own_part_fills_goes_on_alone(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama", quantisation="F32", hidden_size=512, n_layers=12, ffn_size=4096, n_heads=8,
                       n_kv_heads=4)  # 340 MiB
    with cluster(tmp_path, 1, measured=False) as made:
        command = ["run", str(model), "hello", "--raw", "--temp", "0", "--max-tokens", "48", "--threads", "1",
                   "--context", "512", "--memory", "240M"]
        texts = []
        for more in ([], ["--cluster", "--devices", "all"]):
            with start([*command, *more], env={**os.environ, "EDGERT_HOME": str(made.leader_home)}) as leader:
                assert leader.stdin is not None and leader.stdout is not None
                leader.stdin.close()
                text = leader.stdout.read(1)
                if more:
                    lose(made.workers[0], "killed")
                leader.stdin = None
                rest, said = leader.communicate(timeout=DEADLINE_S)
                assert leader.returncode == 0, said
                texts.append(text + rest)
        assert b"worker1 was lost" in said and texts[1] == texts[0]


@pytest.mark.parametrize("architecture", ["qwen3moe", "smallthinker"])
def test_every_rank_streams_its_part_of_each_expert_within_its_own_budget(tiny_model: TinyModel, tmp_path: Path,
                                                                          architecture: str) -> None:
    model = tiny_model(architecture, quantisation="F32", hidden_size=512, n_layers=2, ffn_size=768, n_heads=8,
                       n_kv_heads=4, n_experts=16)  # 144 MiB
    with cluster(tmp_path, 1, ("--memory", "120M"), measured=False) as made:
        words = ("run", str(model), "hello", "--raw", "--temp", "0", "--max-tokens", "8", "--json", "--threads", "1",
                 "--context", "512", "--layout", "plain")

        def answered(*more: str) -> dict[str, Any]:
            process = start([*words, *more], env={**os.environ, "EDGERT_HOME": str(made.leader_home)})
            out, said = process.communicate(timeout=DEADLINE_S)
            assert process.returncode == 0, said
            told: dict[str, Any] = json.loads(out)
            return told

        expected = answered()
        together = answered("--memory", "130M", "--cluster", "--devices", "all")
        assert together["token_ids"] == expected["token_ids"]
        parts = [one["ffn"] for one in together["plan"]["cluster"]["devices"]]
        assert sum(end - first for one in parts for first, end in one) == 768 and len(parts) == 2
        assert together["plan"]["expert_misses"] > 0 and together["memory"]["streamed_bytes"] > 2**20
        experts = re.search(r"experts ([0-9.]+) MiB", made.workers[0].log())  # what the worker has room for
        assert experts is not None and 0 < float(experts[1]) < 70
