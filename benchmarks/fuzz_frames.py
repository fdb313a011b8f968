"""Feeds damaged, lying and shuffled frames to a worker's session and to pairing, and keeps the score.

Every case must end in the errors that a lost or senseless peer gives, in few steps and little memory. Case number i of
a seed is always the same. The tests run some thousand cases of this; at length:

    python benchmarks/fuzz_frames.py --cases 1000000 --seed 1
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Sized
from pathlib import Path
from typing import Any, cast

from edgert.engine.collective import Collective
from edgert.engine.engine import Engine
from edgert.errors import EdgertError
from tensorpar.collectives import Group, Network
from tensorpar.frames import HEADER_BYTES, Kind, Moment, pack
from tensorpar.link import Link
from tensorpar.messages import Settings, Setup
from tensorpar.session import Session
from tensorpar.slice_cache import SliceCache

# What a case may take beside what the stream itself holds: a frame's bound is checked before memory is taken.
_ALLOCATION_BYTES = 2**20
_NETWORK = Network(1e-4, 1e9, True)
_SETUP = Setup(1, 1, 2, "00" * 32, 1000, Settings(64, 16, "f16", "auto"), _NETWORK, "f32", None)
_INTERESTING = (0, 1, 2, 7, 24, 63, 64, 255, 256, 2**15, 2**16, 2**18, 2**28, 2**28 + 1, 2**31 - 1, 2**31, 2**32 - 1)


class Stream:
    """A socket whose peer has sent these bytes and closed; what is sent to it goes nowhere."""

    family = socket.AF_UNIX

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)

    def recv_into(self, into: memoryview) -> int:
        n = min(len(into), len(self._data))
        into[:n] = self._data[:n]
        self._data = self._data[n:]
        return n

    def send(self, data: memoryview) -> int:
        return len(data)

    def setblocking(self, _: bool) -> None: ...

    def setsockopt(self, *_: int) -> None: ...

    def close(self) -> None: ...


class _Cache(SliceCache):
    """Has every slice."""

    def __init__(self) -> None: ...

    def has(self, key: bytes) -> bool:
        return True

    def path(self, key: bytes) -> Path:
        return Path("slice")

    def keys(self) -> list[str]:
        return []


class _Cells:
    length, context_length = 0, 64

    def truncate(self, n_tokens: int) -> None:
        self.length = min(self.length, n_tokens)


class _Engine:
    """Receives what a pass would."""

    batch_size = 16

    def __init__(self, collective: Collective) -> None:
        self.collective, self.kv = collective, _Cells()

    def step(self, token_ids: Sized, n_outputs: int) -> None:
        group = cast(Group, self.collective)
        link = group._links[0]
        link.take(memoryview(bytearray(64)))
        group._advance()
        for _ in range(2):
            group._receive(link, Kind.SUM, memoryview(bytearray(64)))
            group._advance()
        self.kv.length += len(token_ids)

    def close(self) -> None: ...


def frame(kind: int, moment: Moment, payload: bytes) -> bytearray:
    return bytearray(pack(cast(Kind, kind), moment, len(payload)) + payload)


def sound_stream() -> list[bytearray]:
    """What a leader sends: a probe, a plan, two passes of two sums, the second over a set, and a plan again."""
    setup = json.dumps(_SETUP.to_dict()).encode()
    frames = [frame(Kind.PROBE, Moment(0), bytes(64)), frame(Kind.SETUP, Moment(0), setup)]
    for number, fields in ((1, (0, 1, 1, 1, 2**32 - 1)), (2, (1, 1, 1, 1, 1, 0))):
        start = b"".join(value.to_bytes(4, "little") for value in fields)
        frames.append(frame(Kind.PASS, Moment(1, number, 0), start + bytes(64)))
        frames += [frame(Kind.SUM, Moment(1, number, turn), bytes(64)) for turn in (1, 2)]
    return [*frames, frame(Kind.SETUP, Moment(0), setup)]


def mutated(rng: random.Random) -> bytes:
    """A stream with one to three lies in it."""
    frames = sound_stream()
    for _ in range(rng.randint(1, 3)):
        one = rng.choice(frames)
        if len(one) < HEADER_BYTES:
            break
        match rng.randrange(8):
            case 0:  # a header field
                offset = rng.choice((4, 5, 6, 8, 12, 16, 20))
                size = 1 if offset in (4, 5) else 2 if offset == 6 else 4
                value = rng.choice((*_INTERESTING, rng.getrandbits(32))) % 256**size
                one[offset:offset + size] = value.to_bytes(size, "little")
            case 1:  # bits anywhere
                for _ in range(rng.randint(1, 4)):
                    one[rng.randrange(len(one))] ^= 1 << rng.randrange(8)
            case 2:  # another kind
                one[5] = rng.randrange(16)
            case 3:  # a payload cut or prolonged, its length honest
                payload = bytes(one[HEADER_BYTES:])[:rng.randrange(80)] + rng.randbytes(rng.randrange(40))
                one[20:] = len(payload).to_bytes(4, "little") + payload
            case 4:
                rng.shuffle(frames)
            case 5:
                moment = Moment(rng.randrange(3), rng.randrange(3), rng.randrange(3))
                payload = rng.randbytes(rng.choice((0, 1, 16, 64, 80, 300)))
                frames.insert(rng.randrange(len(frames)), frame(rng.randrange(16), moment, payload))
            case 6:  # a lie in the plan
                one[HEADER_BYTES:] = _lying_message(rng)
                one[20:HEADER_BYTES] = (len(one) - HEADER_BYTES).to_bytes(4, "little")
            case 7:
                del frames[rng.randrange(len(frames)):]
                frames = frames or [bytearray(rng.randbytes(rng.randrange(60)))]
    return b"".join(frames)


def _lying_message(rng: random.Random) -> bytes:
    if rng.random() < 0.2:
        return rng.choice((b"[" * 2000, b'{"a":' * 500, b"{}", b"null", b'"\xff"', b'{"epoch": NaN}', b"9" * 5000))
    raw: dict[str, Any] = _SETUP.to_dict()
    where = rng.choice((raw, raw["settings"], raw["network"]))
    key = rng.choice(list(where))
    lies: tuple[Any, ...] = (None, True, -1, 0, 2**70, 1e308, float("nan"), "x" * 100, "00" * 31, [], {}, [[[[]]]],
                             "f32", "../../etc")
    where[key] = rng.choice(lies)
    if rng.random() < 0.3:
        del where[key]
    return json.dumps(raw).encode()


def run_case(seed: int, number: int) -> tuple[str, int]:
    """How a session ended on case `number`, and the most memory that it held. tracemalloc may be on."""
    return serve(mutated(random.Random(f"{seed}:{number}")))


def serve(data: bytes) -> tuple[str, int]:
    """The same for any stream."""
    link = Link(cast(socket.socket, Stream(data)))
    session = Session(link, _Cache(), lambda path, settings, collective: cast(Engine, _Engine(collective)), {})
    tracing = tracemalloc.is_tracing()
    if tracing:
        tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0] if tracing else 0
    try:
        ended = session.run()
    except EdgertError as error:  # a session tells its leader, and ends by itself
        raise AssertionError("an error left the session") from error
    return ended.split(":")[0][:40], tracemalloc.get_traced_memory()[1] - before if tracing else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    import logging

    logging.disable(logging.WARNING)
    ends: Counter[str] = Counter()
    failures: list[str] = []
    worst_peak, worst_s, started_s = 0, 0.0, time.perf_counter()
    for number in range(options.cases):
        if number % 100 == 0:
            tracemalloc.start()  # slows a case tenfold: a sample is measured
        began_s = time.perf_counter()
        try:
            ended, peak = run_case(options.seed, number)
        except Exception as error:  # whatever it is, it is the finding that this program looks for
            failures.append(f"case {number}: {type(error).__name__}: {error}")
            continue
        finally:
            worst_s = max(worst_s, time.perf_counter() - began_s)
            if number % 100 == 0:
                tracemalloc.stop()
        ends["it closed the connection" if ended.startswith("it closed") else "refused"] += 1
        worst_peak = max(worst_peak, peak)
    if worst_peak > _ALLOCATION_BYTES:
        failures.append(f"{worst_peak} bytes held")
    print(json.dumps({"cases": options.cases, "seed": options.seed, "ends": dict(ends), "n_failures": len(failures),
                      "failures": failures[:20], "worst_peak_bytes": worst_peak, "worst_ms": round(worst_s * 1000, 1),
                      "total_s": round(time.perf_counter() - started_s, 1)}))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
