"""The sampler chooses what llama.cpp's own chain chooses, stays in bounds, and repeats itself with the same seed."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from llama_cpp import llama_cpp as oracle
from numpy.typing import NDArray

from edgert.errors import ComputeError, UsageError
from edgert.text.sampler import MAX_LOGIT_BIASES, MAX_SEED, Sampler, SamplingParams

N_VOCAB = 500
N_TOKENS = 60


def logits_of(step: int, n_vocab: int = N_VOCAB) -> NDArray[np.float32]:
    return (np.random.default_rng(step).standard_normal(n_vocab) * 3).astype(np.float32)  # (n_vocab,) float32


def our_tokens(params: SamplingParams) -> list[int]:
    tokens = []
    with Sampler(params, N_VOCAB) as sampler:
        for step in range(N_TOKENS):
            tokens.append(sampler.sample(logits_of(step)))
            sampler.accept(tokens[-1])
    return tokens


def llama_cpps_tokens(params: SamplingParams) -> list[int]:
    """The same through the package's functions, as llama.cpp's common_sampler puts its default chain together."""
    chain = oracle.llama_sampler_chain_init(oracle.llama_sampler_chain_default_params())
    biases = (oracle.llama_logit_bias * len(params.logit_bias))(*[
        oracle.llama_logit_bias(token_id, bias) for token_id, bias in params.logit_bias.items()])
    for sampler in [
        oracle.llama_sampler_init_logit_bias(N_VOCAB, len(biases), biases),
        oracle.llama_sampler_init_penalties(N_VOCAB, params.repeat_last_n, params.repeat_penalty, 0.0, 0.0),
        oracle.llama_sampler_init_top_k(params.top_k),
        oracle.llama_sampler_init_top_p(params.top_p, 0),
        oracle.llama_sampler_init_min_p(params.min_p, 0),
        oracle.llama_sampler_init_temp(params.temperature),
        oracle.llama_sampler_init_dist(params.seed),
    ]:
        oracle.llama_sampler_chain_add(chain, sampler)
    tokens = []
    for step in range(N_TOKENS):
        candidates = (oracle.llama_token_data * N_VOCAB)(*[
            oracle.llama_token_data(token_id, logit, 0.0) for token_id, logit in enumerate(logits_of(step).tolist())])
        array = oracle.llama_token_data_array(candidates, N_VOCAB, -1, False)
        oracle.llama_sampler_apply(chain, ctypes.byref(array))
        tokens.append(array.data[array.selected].id)
        oracle.llama_sampler_accept(chain, tokens[-1])
    oracle.llama_sampler_free(chain)
    return tokens


@pytest.mark.parametrize("params", [
    SamplingParams(seed=1),
    SamplingParams(seed=2, temperature=1.5, top_k=0, top_p=1.0, min_p=0.0),
    SamplingParams(seed=3, top_k=0, top_p=0.7),
    SamplingParams(seed=4, top_k=200, min_p=0.3, top_p=1.0),
    SamplingParams(seed=5, repeat_penalty=1.8, repeat_last_n=7, temperature=0.3),
    SamplingParams(seed=6, logit_bias={3: 12.0, 4: -math.inf}, repeat_penalty=1.3),
    SamplingParams(seed=7, temperature=0.0),
    SamplingParams(seed=8, temperature=0.0, repeat_penalty=2.0, repeat_last_n=64),
    SamplingParams(seed=9, temperature=0.0, logit_bias={17: 100.0}),
    SamplingParams(seed=10, top_p=0.0),
], ids=lambda params: f"seed{params.seed}")
def test_tokens_equal_llama_cpps_own_chain(params: SamplingParams) -> None:
    assert our_tokens(params) == llama_cpps_tokens(params)


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others() -> None:
    assert our_tokens(SamplingParams(seed=42)) == our_tokens(SamplingParams(seed=42))
    assert our_tokens(SamplingParams(seed=42)) != our_tokens(SamplingParams(seed=43))


def test_a_drawn_seed_is_named_and_repeats_the_answer() -> None:
    with Sampler(SamplingParams(), N_VOCAB) as first:
        tokens = [first.sample(logits_of(step)) for step in range(20)]
    with Sampler(SamplingParams(seed=first.seed), N_VOCAB) as second:
        assert [second.sample(logits_of(step)) for step in range(20)] == tokens


@pytest.mark.parametrize("params", [SamplingParams(seed=1, repeat_penalty=1.5), SamplingParams(temperature=0)])
def test_reset_starts_over(params: SamplingParams) -> None:
    with Sampler(params, N_VOCAB) as sampler:
        def answer() -> list[int]:
            tokens = []
            for step in range(20):
                tokens.append(sampler.sample(logits_of(step)))
                sampler.accept(tokens[-1])
            return tokens

        first = answer()
        sampler.reset()
        assert answer() == first


def test_greedy_takes_the_first_of_equal_logits() -> None:
    logits = np.zeros(N_VOCAB, np.float32)
    logits[[7, 99, 300]] = 5.0
    for params in (SamplingParams(temperature=0), SamplingParams(temperature=0, logit_bias={0: -1.0})):
        with Sampler(params, N_VOCAB) as sampler:
            assert sampler.sample(logits) == 7


def test_the_models_logits_are_left_as_they_are() -> None:
    logits = logits_of(0)
    with Sampler(SamplingParams(seed=1, repeat_penalty=1.5, logit_bias={1: 3.0}), N_VOCAB) as sampler:
        sampler.accept(sampler.sample(logits))
        sampler.sample(logits)
    assert np.array_equal(logits, logits_of(0))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("spoil", [
    lambda logits: logits.fill(-np.inf),
    lambda logits: logits.__setitem__(100, np.nan),
    lambda logits: logits.__setitem__(100, np.inf),
], ids=["all -inf", "nan", "inf"])
def test_logits_that_are_no_numbers_are_an_error(spoil: Callable[[Any], None], temperature: float) -> None:
    logits = logits_of(0)
    spoil(logits)
    with Sampler(SamplingParams(temperature=temperature, seed=1), N_VOCAB) as sampler, pytest.raises(ComputeError):
        sampler.sample(logits)


def test_masked_logits_are_never_chosen() -> None:
    logits = np.full(N_VOCAB, -np.inf, np.float32)
    logits[[5, 6]] = 0.0
    with Sampler(SamplingParams(seed=1, temperature=2.0, min_p=0.0, top_p=1.0), N_VOCAB) as sampler:
        assert {sampler.sample(logits) for _ in range(50)} == {5, 6}


@pytest.mark.parametrize("logits", [
    np.zeros(N_VOCAB - 1, np.float32), np.zeros(N_VOCAB, np.float64), np.zeros((1, N_VOCAB), np.float32),
    np.zeros(2 * N_VOCAB, np.float32)[::2],
], ids=["short", "float64", "two dimensions", "strided"])
def test_other_arrays_are_refused(logits: Any) -> None:
    with Sampler(SamplingParams(), N_VOCAB) as sampler, pytest.raises(UsageError):
        sampler.sample(logits)


@pytest.mark.parametrize("wrong", [
    {"temperature": -0.1}, {"temperature": math.nan}, {"temperature": 1e-9}, {"temperature": 1e9}, {"temperature": "1"},
    {"top_k": -1}, {"top_k": 1.5}, {"top_k": True}, {"top_p": -0.1}, {"top_p": 1.1}, {"min_p": 1.1}, {"min_p": None},
    {"repeat_penalty": 0}, {"repeat_penalty": math.inf}, {"repeat_last_n": -1}, {"repeat_last_n": 2**30},
    {"seed": -1}, {"seed": MAX_SEED + 1}, {"logit_bias": {-1: 1.0}}, {"logit_bias": {1: math.nan}},
    {"logit_bias": {1: math.inf}}, {"logit_bias": dict.fromkeys(range(MAX_LOGIT_BIASES + 1), 1.0)},
], ids=str)
def test_parameters_out_of_range_are_refused_with_the_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        SamplingParams(**wrong)
    assert caught.value.next_step


def test_ids_outside_of_the_vocabulary_are_refused() -> None:
    with pytest.raises(UsageError):
        Sampler(SamplingParams(logit_bias={N_VOCAB: 1.0}), N_VOCAB)
    with Sampler(SamplingParams(), N_VOCAB) as sampler:
        for token_id in (-1, N_VOCAB):
            with pytest.raises(UsageError):
                sampler.accept(token_id)


def test_a_closed_sampler_says_so() -> None:
    sampler = Sampler(SamplingParams(), N_VOCAB)
    sampler.close()
    sampler.close()
    for use in (sampler.reset, lambda: sampler.accept(1), lambda: sampler.sample(logits_of(0))):
        with pytest.raises(UsageError):
            use()


def test_parameters_do_not_change_with_the_callers_mapping() -> None:
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias)
    bias[2] = 3.0
    assert dict(params.logit_bias) == {1: 2.0}
