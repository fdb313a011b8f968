"""edgert beside llama.cpp, everything in memory: decode at two depths and prefill, in turn in one run.

    python benchmarks/vs_llamacpp.py MODEL.gguf [...] [--rounds 7] [--threads 2] [--only TEST]

Measured as `edgert bench` measures (apps/bench/session.py). llama.cpp's better setting (with or without repacking) is
the peer of each test. Prints a table and a JSON line per model: medians in tokens/s, and the ratio as the median over
rounds of edgert / peer, which a noisy machine moves least.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apps.bench.asked import OURS, Asked, Peer, Work
from apps.bench.contenders import Setup
from apps.bench.power_sources import Missing
from apps.bench.sampler import Sampler
from apps.bench.session import Session
from apps.bench.speed import SpeedTest
from edgert.cpu import usable_cores

_TESTS = (SpeedTest(512, 0, 0), SpeedTest(0, 128, 0), SpeedTest(0, 128, 512))
_PEERS = (OURS, Peer("plain", "llama.cpp", "plain"), Peer("repack", "llama.cpp", "repack"))


class Silent:
    """A watcher of a measurement that nobody watches."""

    def planned(self, works: Sequence[Work]) -> None: ...

    def doing(self, what: str) -> None: ...

    def done(self, work: Work, seconds: float) -> None: ...

    def warn(self, message: str) -> None:
        print(message, flush=True)


def session(path: Path, tests: Sequence[SpeedTest], rounds: int, n_threads: int, peers: Sequence[Peer]) -> Session:
    """A measurement without energy and predictions."""
    asked = Asked(path, (path,), (Setup(None, n_threads, 512, "auto", "f16", 2048),), tuple(tests), rounds,
                  tuple(peers), predicts=False)
    return Session(asked, Silent(), Sampler(Missing("not asked for")))


def compare(path: Path, rounds: int, n_threads: int, only: str | None = None) -> dict[str, dict[str, Any]]:
    """Median tokens/s and ratios for each test, or for the one whose name is given."""
    result: dict[str, dict[str, Any]] = {}
    tests = [test for test in _TESTS if only in (None, test.name)]
    for found in session(path, tests, rounds, n_threads, _PEERS).results():
        name, medians = found[0].test.name, [one.median_ts for one in found]
        result[name] = dict(zip((peer.name for peer in _PEERS), medians, strict=True)) | {
            "ratio": found[0].ratio_to_baseline}
        print(f"{path.stem:45} {name:12} edgert {medians[0]:7.2f}  llama.cpp plain {medians[1]:7.2f}  "
              f"repack {medians[2]:7.2f}  ratio to the better {found[0].ratio_to_baseline:.3f}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--only", metavar="TEST", help='one test, such as "tg128 @ d512"')
    args = parser.parse_args()
    for path in args.models:
        print(json.dumps({"model": path.name, **compare(path, args.rounds, args.threads, args.only)}), flush=True)


if __name__ == "__main__":
    main()
