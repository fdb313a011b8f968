"""How quick a connection is: frames that the other side sends back as they are."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

from tensorpar.frames import BadFrame, Kind, Moment
from tensorpar.link import Link

_SMALL_BYTES, _LARGE_BYTES = 64, 2**20
# Small frames in some rounds with a pause between: one round alone may meet a busy moment (the other side has just
# opened a connection), and then all of it does.
_N_ROUNDS, _N_PROBES, _PAUSE_S = 4, 9, 0.015
_ANSWER_S = 10.0


@dataclass(frozen=True, slots=True)
class Speed:
    """One way: seconds for a small frame, bytes a second for a large one."""

    latency_s: float
    bytes_per_s: float


def measure(link: Link) -> Speed:
    """Ask the other side, which must `echo`. Raises PeerLost, BadFrame."""
    rounds = []
    for _ in range(_N_ROUNDS):
        rounds.append(statistics.median(_round_trip_s(link, _SMALL_BYTES) for _ in range(_N_PROBES)))
        time.sleep(_PAUSE_S)
    large_s = min(_round_trip_s(link, _LARGE_BYTES) for _ in range(2))
    return Speed(min(rounds) / 2, 2 * _LARGE_BYTES / max(large_s - min(rounds), 1e-6))


def _round_trip_s(link: Link, n_bytes: int) -> float:
    payload = memoryview(bytearray(n_bytes))
    began_s = time.perf_counter()
    link.send(Kind.PROBE, Moment(0), payload, _ANSWER_S)
    if link.peek(n_bytes, _ANSWER_S).kind is not Kind.PROBE:
        raise BadFrame("no echo")
    link.take(payload, _ANSWER_S)
    return time.perf_counter() - began_s


def echo(link: Link) -> None:
    """Send the probe that is next back. Raises BadFrame for one that is too long."""
    header = link.peek(_LARGE_BYTES)
    payload = memoryview(bytearray(header.n_bytes))
    link.take(payload)
    link.send(Kind.PROBE, header.moment, payload)
