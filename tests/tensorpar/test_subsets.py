"""Which devices are used: the fastest by prediction, and one alone where the network costs more than it brings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgert.architectures.base import Hyperparameters
from edgert.architectures.registry import open_architecture
from edgert.gguf.model_file import ModelFile
from edgert.memory.profile import DeviceProfile
from edgert.paths import Paths
from tensorpar.collectives import Algorithm, Network, choose, seconds
from tensorpar.division import shard
from tensorpar.planner import Device, Prediction, predict, predictions, reason
from tensorpar.plans import Plans, is_worth_keeping
from tensorpar.profile import Profile
from tensorpar.shares import Cut, Shard, covers, length, splits_head

MIB, GIB = 2**20, 2**30
CUT = Cut(32, 8, 2, 14336, 256, 128_256, {12: 750_000_000}, {12: 3_200_000_000}, {14: 430_000_000}, 300_000_000,
          3_200_000_000)


def device(name: str, bytes_per_s: float, memory_bytes: int = 16 * GIB, latency_s: float = 0.0) -> Device:
    profile = Profile({12: 1 / bytes_per_s, 14: 1 / bytes_per_s}, 1e-10, 2e8, memory_bytes, 4)
    return Device(name, profile, latency_s, 1e9)


LAPTOP = device("laptop", 20e9)


@pytest.fixture
def hp(tiny_model: Callable[..., Path]) -> Hyperparameters:
    """Those of a model of 8 billion parameters, as far as they count."""
    tiny = open_architecture(ModelFile.open(tiny_model("llama"))).hp
    return replace(tiny, n_layers=32, hidden_size=4096)


def test_the_collective_is_chosen_by_latency_and_bandwidth() -> None:
    lan, slow = Network(1e-4, 1.2e8, True), Network(5e-3, 1e6, True)
    assert choose(16384, 2, lan) == choose(16384, 2, slow) == "one-shot"
    assert choose(8 * 2**20, 4, lan) == "scatter"
    assert choose(8 * 2**20, 4, replace(lan, is_mesh=False)) == "star"
    star, one_shot = (seconds(one, 16384, 2, Network(1e-3, 1e9, True)) for one in ("star", "one-shot"))
    assert star / one_shot > 1.8


@pytest.mark.parametrize("algorithm", ["star", "one-shot", "scatter"])
def test_costs_grow_with_ranks_and_bytes(algorithm: Algorithm) -> None:
    network = Network(1e-3, 1e8, True)
    assert seconds(algorithm, 2000, 3, network) > seconds(algorithm, 1000, 3, network)
    assert seconds(algorithm, 1000, 4, network) > seconds(algorithm, 1000, 3, network)


def test_near_devices_are_used_and_far_ones_are_not(hp: Hyperparameters) -> None:
    near = [device(f"near{n}", 20e9, latency_s=1e-4) for n in range(3)]
    found = predictions(CUT, hp, [LAPTOP, *near])
    assert found[0].devices == ("laptop", "near0", "near1", "near2") and len(found) == 8
    assert "4 devices" in reason(found[0], found)
    far = [replace(one, latency_s=5e-3) for one in near]
    alone = predictions(CUT, hp, [LAPTOP, *far])
    assert alone[0].devices == ("laptop",)
    assert "this device alone" in reason(alone[0], alone) and "ms on the network" in reason(alone[0], alone)


def test_a_model_that_no_device_holds_is_worth_a_slow_network(hp: Hyperparameters) -> None:
    small = [device(name, 20e9, 2 * GIB + 300 * 2**20, 5e-3) for name in ("a", "b", "c")]
    small[0] = replace(small[0], latency_s=0.0)
    best = predictions(CUT, hp, small)[0]
    assert len(best.devices) > 1 and best.missing_bytes == 0


def test_a_faster_device_gets_more_and_a_full_one_no_more_than_it_holds(hp: Hyperparameters) -> None:
    fast, tiny = device("fast", 60e9, latency_s=1e-4), device("tiny", 60e9, GIB, 1e-4)
    three = next(one for one in predictions(CUT, hp, [LAPTOP, fast, tiny]) if len(one.devices) == 3)
    assert covers(CUT, three.shards)
    _, of_fast, of_tiny = (CUT.stored_bytes(one) for one in three.shards)
    assert of_fast > 1.5 * of_tiny and of_tiny < GIB - 2**25
    two = next(one for one in predictions(CUT, hp, [LAPTOP, fast]) if len(one.devices) == 2)
    assert 2.5 < length(two.shards[1].ffn) / length(two.shards[0].ffn) < 3.5
    assert length(two.shards[1].heads) / length(two.shards[0].heads) == 3


@pytest.mark.parametrize(("bytes_per_s", "is_alike"), [(19e9, True), (21e9, True), (17e9, False), (24e9, False)])
def test_devices_that_are_measured_about_alike_have_equal_parts(hp: Hyperparameters, bytes_per_s: float,
                                                                is_alike: bool) -> None:
    other = device("other", bytes_per_s, latency_s=1e-4)
    first, second = next(one.shards for one in predictions(CUT, hp, [LAPTOP, other]) if len(one.devices) == 2)
    assert (length(first.ffn) == length(second.ffn)) == is_alike


def both(cut: Cut, hp: Hyperparameters, pair: Sequence[Device]) -> Prediction:
    return next(one for one in predictions(cut, hp, pair) if len(one.devices) == 2)


def test_what_must_fit_is_weights_and_cache_but_not_the_embedding_table(hp: Hyperparameters) -> None:
    kept = CUT.attention_bytes + CUT.ffn_bytes + CUT.head_bytes
    half = kept // 2 + 48 * MIB
    for memory_bytes, more, missing in ((half + 16 * MIB, {}, False), (half - 64 * MIB, {}, True),
                                        (half + 16 * MIB, {"kv_bytes": 256 * MIB}, True),
                                        (half + 16 * MIB, {"hidden_bytes": 256 * MIB}, True)):
        pair = [device("a", 20e9, memory_bytes), device("b", 20e9, memory_bytes, 1e-4)]
        assert (both(replace(CUT, **more), hp, pair).missing_bytes > 0) == missing


@pytest.mark.parametrize("leads", [True, False])
def test_nobody_streams_what_another_has_room_for(hp: Hyperparameters, leads: bool) -> None:
    kept = CUT.attention_bytes + CUT.ffn_bytes + CUT.head_bytes
    short, roomy = kept // 2 - 40 * MIB, kept // 2 + 200 * MIB
    own, others = (short, roomy) if leads else (roomy, short)
    pair = [device("a", 20e9, own), device("b", 20e9, others, 1e-4)]
    two = both(CUT, hp, pair)
    assert two.missing_bytes == 0 and covers(CUT, two.shards)
    assert (CUT.kept_bytes(two.shards[0]) < CUT.kept_bytes(two.shards[1])) == leads
    # By speed alone, who is short would read what it lacks, and as much again as a window takes.
    halves = predict(CUT, hp, pair, shard(CUT, [1, 1], splits_head=True), 16384)
    assert halves.missing_bytes > 80 * MIB and halves.tokens_per_s < two.tokens_per_s


@pytest.mark.parametrize(("ffn_bytes", "window_bytes"), [
    (3_200_000_000, 80 * MIB),  # a half of a layer's 95 MiB, cut to 32; 16 for the ring's end; 32 on their way
    (400_000_000, 29 * MIB)])  # 6, 3 and 20
def test_who_lacks_a_little_reads_a_window_more(hp: Hyperparameters, ffn_bytes: int, window_bytes: int) -> None:
    cut = replace(CUT, attention={12: 10**8}, ffn={12: ffn_bytes}, stored_ffn_bytes=ffn_bytes)
    shards = shard(cut, [1, 1])

    def missing(memory_bytes: int) -> int:
        return predict(cut, hp, [device("a", 2e10), device("b", 2e10, memory_bytes)], shards, 16384).missing_bytes

    enough = next(n for n in range(0, 4 * GIB, MIB) if missing(n) == 0)
    assert missing(enough - MIB) == pytest.approx(window_bytes, abs=MIB)


def test_what_streams_passes_memory_twice_and_is_waited_for(hp: Hyperparameters) -> None:
    shards = shard(CUT, [1, 1])
    pair = [device("a", 20e9, 8 * GIB), device("b", 20e9, 8 * GIB, 1e-4)]
    short = replace(pair[1], profile=replace(pair[1].profile, memory_bytes=GIB, disk_bytes_s=1e12))
    mapped, streams = (predict(CUT, hp, [pair[0], one], shards, 16384) for one in (pair[1], short))
    assert mapped.missing_bytes == 0 < streams.missing_bytes
    assert streams.compute_s == pytest.approx(mapped.compute_s + streams.missing_bytes / 20e9 + 7e-5 * hp.n_layers)
    slow = replace(short, profile=replace(short.profile, disk_bytes_s=1e8))
    waits = predict(CUT, hp, [pair[0], slow], shards, 16384)
    assert waits.compute_s + waits.network_s == pytest.approx(waits.missing_bytes / 1e8)


@pytest.mark.parametrize(("slower", "before", "anew", "keeps"), [
    (1.0, 0, 0, True), (1.1, 0, 0, True), (1.3, 0, 0, False), (1.1, MIB, MIB, True), (1.0, MIB, 0, False)])
def test_parts_stay_unless_new_ones_are_much_faster_or_stream_no_more(hp: Hyperparameters, slower: float, before: int,
                                                                     anew: int, keeps: bool) -> None:
    one = predict(CUT, hp, [LAPTOP], [CUT.whole()], 16384)
    assert is_worth_keeping(replace(one, compute_s=slower * one.compute_s, missing_bytes=before),
                            replace(one, missing_bytes=anew)) == keeps


@given(st.integers(1, 40))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_a_device_has_less_at_the_next_start_lets_nobody_stream(hp: Hyperparameters, disk: int) -> None:
    kept = CUT.attention_bytes + CUT.ffn_bytes + CUT.head_bytes
    first, second = (device(name, 20e9, memory_bytes, latency_s) for name, memory_bytes, latency_s in (
        ("a", kept // 2, 0.0), ("b", kept // 2 + 200 * MIB, 1e-4)))
    first = replace(first, profile=replace(first.profile, disk_bytes_s=1e8 * disk))
    shards = both(CUT, hp, [first, second]).shards
    less = replace(first, profile=replace(first.profile, memory_bytes=first.profile.memory_bytes - 7 * MIB))
    assert predict(CUT, hp, [less, second], shards, 16384).missing_bytes == 0


def test_a_slow_device_with_room_gets_no_more_than_reading_costs(hp: Hyperparameters) -> None:
    quick, slow = device("quick", 20e9, 2 * GIB), device("slow", 1e9, 16 * GIB, 1e-4)
    quick = replace(quick, profile=replace(quick.profile, disk_bytes_s=3e9))
    two = both(CUT, hp, [quick, slow])
    assert two.missing_bytes > GIB and CUT.kept_bytes(two.shards[0]) > 2 * CUT.kept_bytes(two.shards[1])


@given(st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_other_division_is_much_faster(hp: Hyperparameters, data: st.DataObject) -> None:
    """Against every division of a model with few places to be cut at."""
    sizes, share = st.integers(50, 800), st.floats(0.2, 1.5)
    attention, ffn, head = (data.draw(sizes) * MIB for _ in range(3))
    cut = Cut(8, 4, 2, 8 * 256, 256, 8 * 64, {12: attention}, {12: ffn}, {14: head}, 0, ffn,
              data.draw(st.sampled_from([0, 400])) * MIB)
    pair = []
    for latency_s in (0.0, 1e-4):
        one = device(f"{latency_s}", data.draw(st.sampled_from([5e9, 20e9])),
                     int((cut.total_bytes + cut.kv_bytes) * data.draw(share)), latency_s)
        disk = data.draw(st.sampled_from([1e8, 3e9]))
        pair.append(replace(one, profile=replace(one.profile, disk_bytes_s=disk)))
    best = max(predict(cut, hp, pair, shards, 16384).tokens_per_s for shards in every_division(cut))
    assert both(cut, hp, pair).tokens_per_s > 0.8 * best


def every_division(cut: Cut) -> Iterator[tuple[Shard, ...]]:
    """Over two ranks; the head by rows, or the leader's."""
    groups, ffn, rows = range(1, cut.n_kv_heads), range(256, cut.ffn_size, 256), (*range(64, cut.n_head_rows, 64), 512)
    for kv, columns, end in product(groups, ffn, rows):
        first, second = (0, end), (end, cut.n_head_rows)
        yield (Shard(((0, 2 * kv),), ((0, kv),), ((0, columns),), (first,), leads=True),
               Shard(((2 * kv, 8),), ((kv, 4),), ((columns, cut.ffn_size),), (second,) if end < 512 else ()))


def test_devices_that_meet_after_every_block_wait_for_the_slowest_of_each(hp: Hyperparameters) -> None:
    two = next(one for one in predictions(CUT, hp, [LAPTOP, device("other", 20e9, latency_s=1e-4)])
               if len(one.devices) == 2)
    small_s = 2e-5 * hp.n_layers
    layers_s, head_s = (750e6 + 3.2e9) / 2 / 20e9, 430e6 / 2 / 20e9
    cached_s = 2 * 16 * hp.head_dim * 256 * hp.n_layers * 1e-10
    assert two.compute_s == pytest.approx(layers_s + head_s + small_s + cached_s, rel=1e-3)


@pytest.mark.parametrize(("latency_s", "bytes_per_s", "splits"), [(1e-4, 1e9, True), (1e-4, 2e7, False),
                                                                  (2e-2, 1e9, False)])
def test_the_head_is_computed_by_all_where_its_logits_travel_in_less_time(hp: Hyperparameters, latency_s: float,
                                                                          bytes_per_s: float, splits: bool) -> None:
    # Half of the head takes 10.75 ms, half of the logits are 256 kB.
    other = replace(device("other", 20e9, latency_s=latency_s), bytes_per_s=bytes_per_s)
    two = next(one for one in predictions(CUT, hp, [LAPTOP, other]) if len(one.devices) == 2)
    assert splits_head(two.shards) == splits
    at_once = predict(CUT, hp, [LAPTOP, other], shard(CUT, [1, 1], splits_head=True), 16384)
    alone = predict(CUT, hp, [LAPTOP, other], shard(CUT, [1, 1]), 16384)
    assert at_once.compute_s == pytest.approx(alone.compute_s - 430e6 / 2 / 20e9)
    assert at_once.network_s == pytest.approx(alone.network_s + latency_s + 4 * 64_128 / bytes_per_s, abs=1e-4)


def test_a_profile_travels_and_is_doubted() -> None:
    measured = DeviceProfile({"12/plain": {1: 4e-11}, "12/repack": {1: 3e-11}, "14/plain": {1: 5e-11}},
                             corrections={"compute": 1.1, "disk": 2.0}, n_threads=4)
    profile = Profile.of(measured, 5 * GIB)
    assert profile.byte_s == pytest.approx({12: 3.3e-11, 14: 5.5e-11}) and profile.disk_bytes_s == 5e8
    assert Profile.of(measured, 5 * GIB, "plain").multiply(12, 2) == pytest.approx(8.8e-11)
    assert profile.multiply(30, 1) == profile.multiply(12, 1)  # of a type that was not measured
    told = profile.to_dict()
    assert Profile.of_message(told) == profile
    for lie in (None, {}, {**told, "byte_s": {"12": -1}}, {**told, "byte_s": {"x": 1e-10}}, {**told, "n_threads": "2"},
                {**told, "attend_s": float("nan")}, {**told, "disk_bytes_s": 0}, {**told, "memory_bytes": True}):
        with pytest.raises(ValueError, match="profile"):
            Profile.of_message(lie)


def test_plans_are_kept_and_doubted(tmp_path: Path) -> None:
    paths = Paths(tmp_path, tmp_path, tmp_path)
    plans, shards = Plans(paths), shard(CUT, [1.0, 2.0])
    assert plans.get("key", CUT, 2) is None
    plans.put("key", shards)
    assert Plans(paths).get("key", CUT, 2) == shards
    assert plans.get("key", CUT, 3) is None and plans.get("other", CUT, 2) is None
    assert plans.get("key", replace(CUT, ffn_size=8192), 2) is None
    for n in range(70):
        plans.put(str(n), shards)
    assert plans.get("key", CUT, 2) is None and plans.get("69", CUT, 2) == shards
    for damage in ("", "[]", '{"69": 5}', '{"69": [{"heads": [[3, 1]]}]}'):
        (tmp_path / "cluster-plans.json").write_text(damage)
        assert plans.get("69", CUT, 2) is None
    assert length(shards[0].heads) > 0
