"""The parts without a server: turns, frames, functions, forecasts, fields, settings."""

from __future__ import annotations

import asyncio
import io
import json
import math
import struct
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apps.server import tools
from apps.server.answering import without_oldest
from apps.server.asked import Asked, ToolChoice
from apps.server.forecast import Shape, Speeds, forecast, learned, planned
from apps.server.frames import MAX_FRAME_BYTES, encode, read_frame
from apps.server.host import may_overflow
from apps.server.pieces import Pieces
from apps.server.settings import is_loopback
from apps.server.streams import PING, with_pings
from apps.server.turns import Turns
from edgert.errors import ComputeError, UsageError
from edgert.memory.demand_store import DemandStore
from edgert.memory.planner import Demand, make_plan, tok_s
from edgert.memory.profile import DeviceProfile, DiskSpeed
from edgert.memory.profile_store import ProfileStore
from edgert.memory.shape import ModelShape, Overheads
from edgert.paths import Paths
from edgert.text.logprobs import check_n_top, token_logprobs


def test_clients_take_turns_and_keep_their_own_order() -> None:
    turns: Turns[str] = Turns(9)
    for client, item in (("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b1"), ("c", "c1"), ("b", "b2")):
        turns.add(client, item)
    expected = ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert turns.in_order() == expected
    assert [turns.take() for _ in range(7)] == [*expected, None]


def test_whoever_leaves_the_queue_gives_up_the_place() -> None:
    turns: Turns[str] = Turns(2)
    turns.add("a", "a1")
    turns.add("b", "b1")
    assert turns.is_full and turns.remove("a1") and not turns.remove("a1")
    assert not turns.is_full and turns.in_order() == ["b1"] and len(turns) == 1


def test_frames_pass_and_what_is_none_is_refused() -> None:
    frame = {"op": "x", "text": "h\u00e9\u0000\ud7ff"}
    assert read_frame(io.BytesIO(encode(frame))) == frame
    assert read_frame(io.BytesIO(b"")) is None and read_frame(io.BytesIO(encode(frame)[:-1])) is None
    for raw in (struct.pack(">I", MAX_FRAME_BYTES + 1), struct.pack(">I", 2) + b"[]",
                struct.pack(">I", 4) + b"{\xff}\x00", struct.pack(">I", 0)):
        with pytest.raises(ComputeError):
            read_frame(io.BytesIO(raw))


def test_a_request_survives_the_pipe() -> None:
    asked = Asked(messages=({"role": "user", "content": "x"},), stop=("a",), sampling={"seed": 1},
                  tools=ToolChoice(({"name": "f"},), "required", "f"), logprobs=2)
    assert Asked.from_frame(json.loads(json.dumps(asked.to_frame()))) == asked


def test_functions_are_told_in_words_where_the_template_knows_none() -> None:
    call = {"type": "function", "function": {"name": "now", "arguments": {}}}
    told = tools.told([{"role": "system", "content": "be kind"},
                       {"role": "assistant", "content": "", "tool_calls": [call]},
                       {"role": "tool", "content": "noon", "tool_call_id": "1"}], [{"name": "now"}])
    assert told[0]["content"].startswith("be kind\n\n") and '{"name": "now"}' in told[0]["content"]
    assert told[1] == {"role": "assistant", "content": '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'}
    assert told[2] == {"role": "user", "content": "<tool_response>\nnoon\n</tool_response>"}
    assert tools.is_native("{% if tools %}<tool_call>") and not tools.is_native("{{ messages }}")


def test_references_of_a_functions_schema_follow_it() -> None:
    schema = tools.call_schema([{"name": "f", "parameters": {"$ref": "#/$defs/x", "$defs": {"x": {"type": "object"}}}}])
    arguments = schema["anyOf"][0]["properties"]["arguments"]
    assert arguments["$ref"] == "#/anyOf/0/properties/arguments/$defs/x"


@pytest.mark.parametrize(("text", "call"), [
    ('{"name": "f", "arguments": {"a": 1}}', ("f", '{"a": 1}')), ('{"name": "f"}', ("f", "{}")), ('{"name": "f', None),
    ("[]", None), ('{"name": 3}', None)])
def test_calls_are_read_and_cut_ones_are_not(text: str, call: tuple[str, str] | None) -> None:
    assert tools.parse_call(text) == call


def test_the_oldest_turn_goes_whole_and_the_last_one_stays() -> None:
    roles = ("system", "user", "assistant", "user", "assistant", "user")
    talk = [{"role": role, "content": str(i)} for i, role in enumerate(roles)]
    shorter = without_oldest(talk)
    assert [one["content"] for one in shorter] == ["0", "3", "4", "5"]
    assert [one["content"] for one in without_oldest(without_oldest(shorter))] == ["0", "5"]
    assert without_oldest([talk[0], talk[5]]) == [talk[0], talk[5]]


def test_silence_is_broken_by_pings_and_nothing_is_lost() -> None:
    waited = asyncio.Event()

    async def source() -> AsyncIterator[bytes]:
        yield b"one"
        await waited.wait()
        yield b"two"

    async def collect() -> list[bytes]:
        told = []
        async for item in with_pings(source(), every_s=0.001):
            told.append(item)
            if told.count(PING) == 3:
                waited.set()
        return told

    told = asyncio.run(collect())
    assert told[0] == b"one" and told[-1] == b"two" and set(told[1:-1]) == {PING} and len(told) >= 5


@pytest.mark.parametrize(("gaps_ms", "sent"), [
    ([0, 50, 50, 50], [1, 1, 1, 1]),  # as slow as a reader: each at once
    ([0, 5, 5, 5, 5, 5, 5, 5, 5], [1, 4, 4]),  # the first at once, then what comes within 20 ms
    ([0, 5, 50, 5], [1, 2, 1])])
def test_pieces_that_come_quickly_travel_together(gaps_ms: list[int], sent: list[int]) -> None:
    now_s = 0.0
    frames: list[dict[str, Any]] = []
    with Pieces(frames.append, lambda: now_s) as pieces:
        for number, gap_ms in enumerate(gaps_ms):
            now_s += gap_ms / 1000 + 1e-6
            pieces.add(str(number), {"token": number})
    assert [frame["n_tokens"] for frame in frames] == sent
    assert "".join(frame["text"] for frame in frames) == "".join(map(str, range(len(gaps_ms))))
    assert [one["token"] for frame in frames for one in frame["logprobs"]] == list(range(len(gaps_ms)))


@pytest.mark.parametrize(("n_words", "context_length", "may"), [(10, 8192, False), (9000, 8192, True), (60, 512, True)])
def test_only_a_prompt_that_may_be_too_long_is_counted(n_words: int, context_length: int, may: bool) -> None:
    asked = Asked(messages=({"role": "user", "content": "\u00e9" * n_words},))
    assert may_overflow(asked, context_length) == may


MIB = 2**20
MODEL = Shape(file_bytes=1000 * MIB, active_bytes=1000 * MIB, kv_bytes_per_token=1024, context_length=4096)
SPEEDS = Speeds(memory_bytes_s=10_000 * MIB, disk_bytes_s=1000 * MIB)


@pytest.mark.parametrize(("budget_mib", "verdict", "rate"), [
    (2000, "fits", 10), (800, "streams", 1000 / 446), (220, "too slow", 1)])
def test_a_forecast_goes_by_the_bytes_of_a_token(budget_mib: int, verdict: str, rate: float) -> None:
    told = forecast(MODEL, budget_mib * MIB, 4096, SPEEDS)
    assert told.verdict == verdict and told.tokens_per_s == pytest.approx(rate, rel=0.01)
    assert told.kv_bytes == 4 * MIB and told.pinned_bytes + told.streamed_bytes == MODEL.file_bytes


def test_more_memory_never_forecasts_less_speed() -> None:
    rates = [forecast(MODEL, n * MIB, 4096, SPEEDS).tokens_per_s for n in range(100, 1600, 50)]
    assert rates == sorted(rates)


def test_speeds_are_learned_from_answers() -> None:
    speeds = learned(SPEEDS, MODEL, 25.0, 0)
    assert forecast(MODEL, 2000 * MIB, 4096, speeds).tokens_per_s == pytest.approx(25)
    speeds = learned(speeds, MODEL, 4.0, 300 * MIB)
    assert speeds.disk_bytes_s == 1200 * MIB and speeds.memory_bytes_s == 25_000 * MIB and speeds.measured


def test_a_model_that_was_planned_here_is_forecast_by_its_plan(tmp_path: Path) -> None:
    paths, model = Paths(tmp_path, tmp_path, tmp_path / "cache"), tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    assert planned(paths, model, 2**30, 4096) is None
    shape = ModelShape(
        file_bytes=1000 * MIB, small_bytes=MIB, large_bytes=900 * MIB, largest_block_bytes=30 * MIB,
        largest_piece_bytes=10 * MIB, matrix_bytes={2: 800 * MIB}, head_bytes={2: 100 * MIB}, expert_bytes={},
        n_layers=16, n_heads=16, n_kv_heads=4, head_dim=64, kv_bytes_per_token=16384, context_length=8192)
    demand = Demand(shape, Overheads(80 * MIB, 5 * MIB, {256: 30 * MIB}, 50 * MIB, MIB), 1024)
    DemandStore(paths.cache / "demands.json").save(model, demand, "cpu", "8:1")
    assert planned(paths, model, 2**30, 4096) is None  # the device is not known
    profile = DeviceProfile({"2/plain": {1: 1e-10, 128: 1e-9}}, {}, 2e10, DiskSpeed(2e9, 1e-4))
    ProfileStore(paths.cache / "device.json").save("cpu", "8:1", profile)
    for budget, verdict in ((1500, "fits"), (600, "streams"), (100, "too slow")):
        told = planned(paths, model, budget * MIB, 4096)
        assert told is not None and told.verdict == verdict and told.measured and told.kv_bytes == 64 * MIB
        if verdict != "too slow":
            plan = make_plan(replace(demand, context_length=4096), profile, budget * MIB)
            assert told.tokens_per_s == tok_s(replace(demand, context_length=4096), profile, plan)
            assert told.pinned_bytes + told.kv_bytes + told.other_bytes == plan.peak_bytes <= budget * MIB
            assert told.streamed_bytes == plan.streamed_bytes
        assert told.needed_bytes == (1000 + 64 + 80 + 5 + 50) * MIB
    model.write_bytes(b"GGUF, another")
    assert planned(paths, model, 2**30, 4096) is None


@pytest.mark.parametrize(("host", "is_it"), [
    ("127.0.0.1", True), ("localhost", True), ("::1", True), ("127.9.9.9", True),
    ("0.0.0.0", False), ("::", False), ("192.168.0.1", False), ("box", False)])
def test_loopback_is_known(host: str, is_it: bool) -> None:
    assert is_loopback(host) == is_it


def test_logprobs_are_the_logarithm_of_the_softmax() -> None:
    logits = np.random.default_rng(0).normal(0, 3, 1000).astype(np.float32)
    wanted = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    told = token_logprobs(logits, 7, 4)
    assert told.chosen == pytest.approx(wanted[7], abs=1e-4)
    assert [one for one, _ in told.top] == np.argsort(-logits)[:4].tolist()
    assert [value for _, value in told.top] == pytest.approx(np.sort(wanted)[::-1][:4].tolist(), abs=1e-4)
    assert token_logprobs(logits, 7, 0).top == ()
    assert math.isfinite(token_logprobs(np.array([1000, -1000], np.float32), 1, 2).chosen)
    for n_top in (-1, 21):
        with pytest.raises(UsageError):
            check_n_top(n_top)
