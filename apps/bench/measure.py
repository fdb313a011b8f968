"""Runs a test on a contender: which tokens, in which order, and when each was there.

Knows token ids, steps and the clock; what the times say is in speed.py. Prompts are synthetic, the same in every run.
An answer's tokens are chosen once, by the model itself and before anything is timed, with end tokens banned; every run
then computes exactly these, so that no run is shorter than another and a model of experts is asked for the experts of
a text rather than of noise.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from apps.bench.contenders import Contender
from apps.bench.speed import Run, SpeedTest

SEED = 20250101
_TEMPERATURE = 0.8  # greedy answers to noise repeat themselves


def synthetic_tokens(n_tokens: int, vocab_size: int) -> list[int]:
    """The first ids of one sequence, the same for every test of a model."""
    return [int(one) for one in np.random.default_rng(SEED).integers(0, vocab_size, n_tokens, dtype=np.int32)]


def warm_up(contender: Contender, test: SpeedTest, token_ids: Sequence[int] | None) -> list[int]:
    """Fill the cache up to the test's depth and run the test once, untimed: with `token_ids`, or with an answer that
    the contender's logits choose. The ids (n_depth + n_prompt + n_gen). Raises what steps raise."""
    n_given = test.n_depth + test.n_prompt
    given = list(token_ids[:n_given] if token_ids else synthetic_tokens(n_given, contender.vocab_size))
    contender.truncate(0)
    logits = None
    for part in (given[:test.n_depth], given[test.n_depth:]):
        if part:
            logits = contender.step(np.array(part, np.int32))
    if token_ids is None:
        return given + _choose(contender, test.n_gen, logits)
    for token_id in token_ids[n_given:]:
        contender.step(np.array([token_id], np.int32))
    return list(token_ids)


def _choose(contender: Contender, n_tokens: int, logits: NDArray[np.float32] | None) -> list[int]:
    """`n_tokens` tokens that the model says, none of which ends an answer; each is computed."""
    random = np.random.default_rng(SEED)
    chosen: list[int] = []
    for _ in range(n_tokens):
        if logits is None:  # there is nothing before the answer
            chosen += synthetic_tokens(1, contender.vocab_size)
        else:
            scores = logits / np.float32(_TEMPERATURE) + random.gumbel(size=len(logits)).astype(np.float32)
            scores[contender.end_ids] = -np.inf
            chosen.append(int(scores.argmax()))
        logits = contender.step(np.array(chosen[-1:], np.int32))
    return chosen


def run_once(contender: Contender, test: SpeedTest, token_ids: Sequence[int]) -> Run:
    """One repetition, from the test's depth on."""
    prompt = np.array(token_ids[test.n_depth:test.n_depth + test.n_prompt], np.int32)
    answer = [np.array([token_id], np.int32) for token_id in token_ids[test.n_depth + test.n_prompt:]]
    contender.truncate(test.n_depth)
    token_ns = []
    step, now_ns, before = contender.step, time.monotonic_ns, contender.counters()
    prompt_end_ns = start_ns = now_ns()
    if test.n_prompt:
        step(prompt)
        prompt_end_ns = now_ns()
    between = contender.counters()
    if not test.n_prompt:
        prompt_end_ns = start_ns = now_ns()
    for token_id in answer:
        step(token_id)
        token_ns.append(now_ns())
    after = contender.counters()
    return Run(start_ns, prompt_end_ns, tuple(token_ns), between.since(before), after.since(between))
