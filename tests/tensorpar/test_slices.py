"""A slice is a model: the file's own bytes, from any offset on, checked as every file is; and the cache of slices."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ranks import shards_of
from tiny_architectures import ARCHITECTURES

from edgert.architectures.registry import open_architecture
from edgert.errors import ClusterError, ModelFileError, NoSpace
from edgert.gguf.model_file import ModelFile
from edgert.paths import Paths
from edgert.runtime import Runtime
from tensorpar.slice_cache import SliceCache
from tensorpar.slice_file import SliceFile

TinyModel = Callable[..., Path]


def slice_of(path: Path, rank: int, weights: tuple[float, ...] = (1.0, 2.0)) -> SliceFile:
    model = ModelFile.open(path)
    return SliceFile(model, open_architecture(model).hp, shards_of(path, weights)[rank])


def rows_of(model: ModelFile, name: str) -> np.ndarray:
    """(n_rows, row_bytes) uint8."""
    info = model.tensors[name]
    with model.parts[info.part].open("rb") as file:
        file.seek(info.offset)
        return np.frombuffer(file.read(info.n_bytes), np.uint8).reshape(-1, info.type.row_bytes(info.shape[0]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_slices_are_sound_models_and_together_the_whole(tiny_model: TinyModel, tmp_path: Path,
                                                        architecture: str) -> None:
    path = tiny_model(architecture, quantisation="Q4_0", n_heads=8, n_kv_heads=8 if architecture == "olmoe" else 4)
    whole, parts = ModelFile.open(path), []
    for rank in (0, 1):
        file = tmp_path / f"{rank}.gguf"
        slice_of(path, rank).write(file)
        parts.append(ModelFile.open(file))
        open_architecture(parts[-1])  # every tensor of the shape that the slice's own sizes demand
    assert not any(key.startswith("tokenizer.") for one in parts for key in one.metadata)
    names = ("attn_v.weight", "attn_output.weight", "attn_norm.weight")
    v, output, norm = ([rows_of(one, f"blk.1.{name}") for one in (whole, *parts)] for name in names)
    np.testing.assert_array_equal(v[0], np.concatenate(v[1:]))
    np.testing.assert_array_equal(output[0], np.concatenate(output[1:], axis=1))
    assert (norm[0] == norm[1]).all() and (norm[0] == norm[2]).all()
    assert rows_of(parts[1], "token_embd.weight").shape[0] == 1 and "output.weight" not in parts[1].tensors


def test_a_part_of_a_model_answers_nobody(tiny_model: TinyModel, tmp_path: Path) -> None:
    slice_of(tiny_model("llama", n_heads=8, n_kv_heads=4), 0).write(tmp_path / "0.gguf")
    with pytest.raises(ModelFileError, match="one device's part"):
        Runtime.load(tmp_path / "0.gguf")


def test_a_bias_that_is_added_to_the_sum_is_the_leaders_alone(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = tiny_model("qwen2", n_heads=8, n_kv_heads=4)
    model = ModelFile.open(path)
    names = set()
    for rank in (0, 1):
        slice_of(path, rank).write(tmp_path / f"{rank}.gguf")
        names = set(ModelFile.open(tmp_path / f"{rank}.gguf").tensors)
        assert {"blk.0.attn_q.bias", "blk.0.attn_v.bias"} <= names
    assert not names & {"output.weight", "output.bias", "blk.0.attn_output.bias"}
    assert model.tensors


@pytest.mark.parametrize("start_share", [0.0, 0.001, 0.3, 0.77, 0.9999, 1.0])
def test_bytes_from_any_offset_on(tiny_model: TinyModel, tmp_path: Path, start_share: float,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensorpar.slice_file._PIECE_BYTES", 1000)
    one = slice_of(tiny_model("qwen3moe", n_heads=8, n_kv_heads=4), 1)
    one.write(tmp_path / "slice.gguf")
    data = (tmp_path / "slice.gguf").read_bytes()
    assert len(data) == one.size_bytes
    start = int(start_share * len(data))
    assert b"".join(one.chunks(start)) == data[start:]


def test_a_split_model_gives_the_same_slice_bytes(tiny_model: TinyModel) -> None:
    whole, split = (tiny_model("llama", n_heads=8, n_kv_heads=4, split_parts=n) for n in (1, 3))
    assert b"".join(slice_of(whole, 1).chunks()) == b"".join(slice_of(split, 1).chunks())


def test_keys_name_model_and_part(tiny_model: TinyModel) -> None:
    path, other = (tiny_model("llama", n_heads=8, n_kv_heads=4, seed=seed) for seed in (0, 1))
    keys = {slice_of(path, 0).key, slice_of(path, 1).key, slice_of(path, 1, (1.0, 1.0)).key, slice_of(other, 1).key}
    assert len(keys) == 4 and slice_of(path, 1).key in keys


def test_a_model_that_shrinks_meanwhile_is_an_error(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_model("llama", n_heads=8, n_kv_heads=4).read_bytes())
    one = slice_of(path, 1)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(ModelFileError, match="shorter"):
        b"".join(one.chunks())


KEY, DATA = bytes(range(32)), b"weights" * 100


@pytest.fixture
def cache(tmp_path: Path) -> SliceCache:
    return SliceCache(Paths(tmp_path, tmp_path, tmp_path), cap_bytes=2000)


def put(cache: SliceCache, key: bytes, data: bytes = DATA) -> None:
    cache.make_room(key, len(data))
    with cache.append(key) as file:
        file.write(data)
    cache.finish(key, hashlib.sha256(data).digest())


def test_a_transfer_goes_on_where_it_ended_and_is_verified(cache: SliceCache) -> None:
    cache.make_room(KEY, len(DATA))
    for part in (DATA[:300], DATA[300:]):
        with cache.append(KEY) as file:
            file.write(part)
    assert cache.received_bytes(KEY) == len(DATA) and not cache.has(KEY)
    assert cache.finish(KEY, hashlib.sha256(DATA).digest()).read_bytes() == DATA
    assert cache.has(KEY) and cache.keys() == [KEY.hex()]


def test_what_arrived_damaged_is_removed(cache: SliceCache) -> None:
    cache.make_room(KEY, len(DATA))
    with cache.append(KEY) as file:
        file.write(DATA)
    with pytest.raises(ClusterError, match="damaged"):
        cache.finish(KEY, bytes(32))
    assert cache.received_bytes(KEY) == 0 and not cache.has(KEY)


def test_the_longest_unused_give_way(cache: SliceCache) -> None:
    keys = [bytes([n]) * 32 for n in range(3)]
    put(cache, keys[0])
    put(cache, keys[1])
    assert cache.has(keys[0])  # and so it was used last
    put(cache, keys[2])
    assert cache.has(keys[0]) and not cache.has(keys[1]) and cache.has(keys[2])
    with pytest.raises(NoSpace):
        cache.make_room(KEY, 2001)


def test_no_name_comes_from_a_peer(cache: SliceCache) -> None:
    for key in (b"", b"../../etc/passwd", b"x" * 33):
        with pytest.raises(ClusterError):
            cache.path(key)
