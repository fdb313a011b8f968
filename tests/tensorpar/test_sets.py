"""Steps over a set of tokens on several devices: the leader's choice, and everybody's logits those of one device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_head import head_selector, page_selector
from ranks import Floats, open_engine, open_ranks, random_tokens, shards_of, step

from edgert.engine.engine import Engine
from edgert.engine.kv_cache import DenseKVCache
from retrieval.masked import MaskedKVCache
from retrieval.selection import Policy
from retrieval.together import FollowingEngine, LeadingEngine

TinyModel = Callable[..., Path]
FROM_TOKENS, PROMPT = 200, random_tokens(420)
POLICY = Policy(96, n_recent=16, least_mass=0.0)
SIZES = {"n_heads": 8, "n_kv_heads": 4, "head_dim": 64, "hidden_size": 256, "ffn_size": 1024, "quantisation": "F32"}


@contextmanager
def open_together(path: Path, directory: Path, weights: Sequence[float], selector: Any = head_selector) -> Any:
    """Ranks that attend to sets: the engines of `open_ranks` lend what they have opened."""
    with open_ranks(path, directory, shards_of(path, weights)) as opened:
        engines: list[Engine] = []
        for rank, one in enumerate(opened):
            assert isinstance(one.kv, DenseKVCache)
            given = one.arch, one.weights, one.kv, one.backend, one.collective
            engines.append(LeadingEngine(*given, selector(one.arch.hp, 1024), POLICY, FROM_TOKENS) if rank == 0
                           else FollowingEngine(*given))
        try:
            yield engines
        finally:
            for engine in engines:
                engine._masked_graphs.close()


def sets_of(engines: Sequence[Engine], monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """What each rank's passes over sets are over."""
    seen: list[list[Any]] = [[] for _ in engines]
    for engine, sets in zip(engines, seen, strict=True):
        def over(batch: Any, real: Any = engine._over, of: Any = engine, sets: Any = sets) -> Any:
            sets.append(of.collective.selected)
            return real(batch)

        monkeypatch.setattr(engine, "_over", over)
    return seen


@pytest.mark.parametrize("selector", [head_selector, page_selector], ids=["head", "pages"])
@pytest.mark.parametrize("weights", [[0.6, 0.4], [1.0, 1.0, 1.0, 1.0]], ids=["2 ranks", "4 ranks"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_steps_over_the_leaders_sets_give_the_logits_of_one_device_over_the_same(
        tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str,
        weights: list[float], selector: Any) -> None:
    path = tiny_model(architecture, n_layers=4, **SIZES)
    with open_together(path, tmp_path, weights, selector) as engines:
        seen = sets_of(engines, monkeypatch)
        logits = [one_step(engines, PROMPT)]
        logits += [one_step(engines, [token_id]) for token_id in range(6)]
        logits.append(one_step(engines, [9, 8, 7]))
        assert engines[0].selected_tokens == 96
    assert len(seen[0]) == 7
    assert [one is None for one in seen[0]] == [selector is page_selector, *[False] * 6], "bounds know nothing at first"
    chosen_sets = [one for one in seen[0] if one is not None]
    for sets in seen[1:]:
        assert all(np.array_equal(mine, theirs) for mine, theirs in zip(chosen_sets, sets, strict=True))
    assert len({tuple(one) for one in chosen_sets}) > 3, "they move"
    with open_engine(path, fused=False) as single:
        assert isinstance(single.kv, DenseKVCache)
        masked = MaskedKVCache(single.kv, single.arch.hp, frozenset())
        over = Engine(single.arch, single.weights, masked, single.backend, fused=False)  # type: ignore[arg-type]
        expected = [single.step(np.array(PROMPT, np.int32))[0].copy()]
        for token_ids, chosen in zip([*([one] for one in range(6)), [9, 8, 7]], seen[0], strict=True):
            masked.visible = chosen
            expected.append(over.step(np.array(token_ids, np.int32))[0].copy())
    spread = float(np.std(expected))
    assert np.abs(np.stack(logits) - np.stack(expected)).max() < 0.02 * spread


def one_step(engines: Sequence[Engine], token_ids: Sequence[int]) -> Floats:
    return step(engines, token_ids)[0]


def test_a_short_text_and_every_prompt_are_attended_whole(tiny_model: TinyModel, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    with open_together(tiny_model("llama", n_layers=4, **SIZES), tmp_path, [0.6, 0.4]) as engines:
        seen = sets_of(engines, monkeypatch)
        step(engines, PROMPT[:198])
        step(engines, [1])
        step(engines, [2])
        assert not seen[0] and engines[0].selected_tokens is None
        step(engines, [3])
        assert [len(one) for one in seen[1]] == [96]
        engines[0].refresh()
        step(engines, [4, 5])
        assert len(seen[0]) == 1, "a request's first tokens are its prompt"
        step(engines, [6])
        for engine in engines:
            engine.kv.truncate(150)
        engines[0].refresh()
        step(engines, PROMPT[150:300])
        step(engines, [7])
        assert len(seen[0]) == len(seen[1]) == 3
        assert all(one.max() < 300 for one in seen[1][2:])
