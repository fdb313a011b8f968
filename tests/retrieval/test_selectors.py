"""Scores for the next step: from a head's projections, and from bounds on pages of keys."""

from __future__ import annotations

import numpy as np
import pytest

from edgert.engine.retrieval_head import Floats, Positions, features_of
from retrieval.graph import Observation
from retrieval.selectors import PAGE_TOKENS, HeadSelector, PageSelector

HEAD_DIM, N_KV_HEADS, N_HEADS = 8, 2, 4


class Echo:
    """A head of one group whose keys and queries are the first features, so that like finds like."""

    feature_layers = (1, 2)
    dim, n_groups = 4, 1

    def project_queries(self, features: Floats, positions: Positions) -> Floats:
        return features[:, None, :4]

    def project_keys(self, features: Floats, positions: Positions) -> Floats:
        return features[:, None, :4]

    def scores(self, query: Floats, keys: Floats) -> Floats:
        return keys @ query


def streams(n: int, seed: int) -> list[Floats]:
    return [np.random.default_rng((seed, i)).standard_normal((n, 6), dtype=np.float32) for i in range(3)]


def test_features_are_the_streams_over_their_root_mean_squares() -> None:
    given = streams(5, 0)
    features = features_of([10 * given[0], given[1], given[2]])
    assert features.shape == (5, 18)
    assert np.sqrt((features.reshape(5, 3, 6) ** 2).mean(2)) == pytest.approx(1, abs=1e-5)
    assert features == pytest.approx(features_of(given), abs=1e-4)


def test_a_heads_scores_are_for_the_step_after_the_last_token_by_that_tokens_query() -> None:
    selector, all_streams = HeadSelector(Echo(), 64, 6), streams(20, 1)
    selector.add_features(0, [s[:12] for s in all_streams])
    selector.add_features(12, [s[12:] for s in all_streams])
    keys = features_of(all_streams)[:, :4]
    assert selector.scores(20) == pytest.approx(keys @ keys[19], abs=1e-5)


def test_after_wrong_guesses_the_query_is_the_last_right_tokens() -> None:
    selector, all_streams = HeadSelector(Echo(), 64, 6), streams(20, 1)
    selector.add_features(0, all_streams)
    keys = features_of(all_streams)[:18, :4]
    assert selector.scores(18) == pytest.approx(keys @ keys[17], abs=1e-5)
    assert selector.scores(2) is None, "its query is forgotten"


def keys_of(n: int, seed: int) -> Floats:
    return np.random.default_rng(seed).standard_normal((n, N_KV_HEADS, HEAD_DIM), dtype=np.float32)


def observation(queries: Floats, layer: int = 3) -> Observation:
    return Observation(layer, np.zeros((N_HEADS, 1), np.float32), queries, 1.0)


def best_logits(queries: Floats, keys: Floats) -> Floats:
    """(n_heads, n): what each head gives each key."""
    grouped = queries.reshape(N_KV_HEADS, -1, HEAD_DIM)
    return np.concatenate([grouped[i] @ keys[:, i].T for i in range(N_KV_HEADS)])


def test_the_page_with_the_key_that_a_head_looks_for_scores_highest() -> None:
    selector, keys = PageSelector(frozenset({3}), N_KV_HEADS, HEAD_DIM, 256), 0.2 * keys_of(100, 0)
    queries = np.random.default_rng(5).standard_normal((N_HEADS, HEAD_DIM), dtype=np.float32)
    keys[41, 1] = 3 * queries[3]
    for start in range(0, 100, 7):  # as tokens come: pages are filled in parts
        selector.add_keys(start, {3: keys[start:start + 7].astype(np.float16)})
    selector.saw(99, [observation(queries)])
    scores = selector.scores(100)
    assert scores is not None
    assert scores.shape == (100,)
    page = 41 // PAGE_TOKENS
    assert {*np.flatnonzero(scores == scores.max()).tolist()} == {*range(page * PAGE_TOKENS, (page + 1) * PAGE_TOKENS)}


def test_a_bound_is_never_below_the_best_key_of_its_page() -> None:
    selector, keys = PageSelector(frozenset({3}), N_KV_HEADS, HEAD_DIM, 256), keys_of(96, 2)
    selector.add_keys(0, {3: keys.astype(np.float16)})
    queries = np.random.default_rng(6).standard_normal((N_HEADS, HEAD_DIM), dtype=np.float32)
    bounds = selector._bounds[3][:, :6]
    for head, exact in enumerate(best_logits(queries, keys)):
        q, own = queries[head], bounds[head // (N_HEADS // N_KV_HEADS)]
        bound = own[:, :HEAD_DIM] @ np.maximum(q, 0) + own[:, HEAD_DIM:] @ np.minimum(q, 0)
        assert (bound >= exact.reshape(6, PAGE_TOKENS).max(1) - 0.02).all()


def test_pages_know_nothing_before_a_step_was_observed_and_little_of_what_came_after() -> None:
    selector = PageSelector(frozenset({3}), N_KV_HEADS, HEAD_DIM, 256)
    selector.add_keys(0, {3: keys_of(60, 0).astype(np.float16)})
    assert selector.scores(60) is None
    selector.saw(59, [observation(np.ones((N_HEADS, HEAD_DIM), np.float32))])
    later = selector.scores(90)
    assert later is not None
    assert later.shape == (90,)
    assert (later[64:] == later.min()).all()
    assert selector.scores(40) is None, "what was seen is of a text that is no longer there"
    selector.forget()
    assert selector.scores(90) is None, "and so it is once another request begins"
