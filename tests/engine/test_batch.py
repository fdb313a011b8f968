"""Cutting a step's tokens into batches: nothing lost, nothing twice, and the wanted logits in the last one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.engine.batch import LEAST_PART_TOKENS, MAX_DECODE_TOKENS, Batch, in_parts, split


def shapes(n_tokens: int, start: int, batch_size: int, n_outputs: int = 1) -> list[tuple[int, int, int]]:
    """(start, n_tokens, n_outputs) of each batch."""
    batches = split(np.zeros(n_tokens, np.int32), start, batch_size, n_outputs)
    return [(batch.start, batch.n_tokens, batch.n_outputs) for batch in batches]


@pytest.mark.parametrize(("n_tokens", "start", "batch_size", "n_outputs", "expected"), [
    (1, 0, 512, 1, [(0, 1, 1)]),
    (1, 99, 512, 1, [(99, 1, 1)]),
    (512, 0, 512, 1, [(0, 512, 1)]),
    (513, 0, 512, 1, [(0, 512, 0), (512, 1, 1)]),
    (1300, 10, 512, 1, [(10, 512, 0), (522, 512, 0), (1034, 276, 1)]),
    (3, 0, 1, 1, [(0, 1, 0), (1, 1, 0), (2, 1, 1)]),
    (10, 0, 512, 4, [(0, 10, 4)]),
    (10, 0, 512, 10, [(0, 10, 10)]),
    (10, 0, 4, 2, [(0, 4, 0), (4, 4, 0), (8, 2, 2)]),
    (10, 0, 4, 3, [(0, 4, 0), (4, 3, 0), (7, 3, 3)]),  # the batch before is shorter, so that all three are together
    (9, 0, 4, 4, [(0, 4, 0), (4, 1, 0), (5, 4, 4)]),
])
def test_split(n_tokens: int, start: int, batch_size: int, n_outputs: int,
               expected: list[tuple[int, int, int]]) -> None:
    assert shapes(n_tokens, start, batch_size, n_outputs) == expected


@settings(derandomize=True)
@given(st.data(), st.integers(1, 2000), st.integers(0, 5000), st.integers(1, 600))
def test_split_keeps_every_token_in_order(data: st.DataObject, n_tokens: int, start: int, batch_size: int) -> None:
    n_outputs = data.draw(st.integers(1, min(n_tokens, batch_size)))
    token_ids = np.arange(n_tokens, dtype=np.int32)
    batches = split(token_ids, start, batch_size, n_outputs)
    np.testing.assert_array_equal(np.concatenate([batch.token_ids for batch in batches]), token_ids)
    for batch in batches:
        assert batch.start == start + batch.token_ids[0]
        assert batch.end == batch.start + batch.n_tokens
        assert 1 <= batch.n_tokens <= batch_size
    assert [batch.n_outputs for batch in batches] == [0] * (len(batches) - 1) + [n_outputs]
    assert all(batch.n_tokens == batch_size for batch in batches[:-2])
    assert len(batches) == -(-n_tokens // batch_size)


@settings(derandomize=True)
@given(st.integers(1, 2000), st.integers(0, 5000), st.integers(1, 600))
def test_with_one_output_batches_are_llama_cpps(n_tokens: int, start: int, batch_size: int) -> None:
    sizes = [n for _, n, _ in shapes(n_tokens, start, batch_size)]
    assert sizes[:-1] == [batch_size] * (len(sizes) - 1)


@pytest.mark.parametrize(("n_tokens", "batch_size", "n_outputs"), [(0, 512, 1), (5, 512, 0), (5, 512, 6), (5, 4, 5),
                                                                   (5, 512, -1)])
def test_impossible_wishes_are_refused(n_tokens: int, batch_size: int, n_outputs: int) -> None:
    with pytest.raises(AssertionError, match="logits"):
        split(np.zeros(n_tokens, np.int32), 0, batch_size, n_outputs)


def test_a_few_tokens_are_decoding_more_are_prefill() -> None:
    assert Batch(np.zeros(MAX_DECODE_TOKENS, np.int32), 0).phase == "decode"
    assert Batch(np.zeros(MAX_DECODE_TOKENS + 1, np.int32), 0).phase == "prefill"


@settings(derandomize=True)
@given(st.data(), st.integers(1, 1100), st.integers(0, 5000), st.sampled_from([128, 256]))
def test_parts_keep_every_token_in_order(data: st.DataObject, n_tokens: int, start: int, part_tokens: int) -> None:
    n_outputs = data.draw(st.one_of(st.integers(0, min(n_tokens, 8)), st.integers(0, n_tokens)))
    parts = in_parts(Batch(np.arange(n_tokens, dtype=np.int32), start, n_outputs), part_tokens)
    assert np.concatenate([part.token_ids for part in parts]).tolist() == list(range(n_tokens))
    assert [part.start for part in parts] == [start + int(part.token_ids[0]) for part in parts]
    assert [part.n_outputs for part in parts] == [0] * (len(parts) - 1) + [n_outputs]
    assert all(part.n_tokens % LEAST_PART_TOKENS == 0 for part in parts[:-1])
    assert parts[-1].n_tokens >= min(n_tokens, max(LEAST_PART_TOKENS, n_outputs))
    assert all(part.n_tokens <= max(part_tokens, part.n_outputs + LEAST_PART_TOKENS) for part in parts)
