"""What reading and computing cost each other: they share cores, caches and memory, so neither hides for nothing.

    python benchmarks/contention.py MODEL.gguf [--prompts 64,512] [--tokens 32] [--rounds 5]

With everything in memory: time to the first token, and time per token, alone and while threads read the file as
streamed weights are read (offload/readers.py), in turn; and the disk's speed meanwhile, over its speed alone. A prompt
for which as long must be read as is computed takes at least what it takes while reading. Prints a JSON line per row.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgert import Runtime, SamplingParams
from offload.arena import Arena
from offload.direct_file import DirectFile
from offload.disk_speed import measure_bandwidth
from offload.readers import Read, Readers

_N_THREADS, _PIECE_BYTES, _N_SLOTS = 4, 8 * 2**20, 8  # as streamed weights are read (offload/window.py)
_RAW_S = 0.5
_GREEDY = SamplingParams(temperature=0)


class Reading:
    """Reads a file round and round, while it is asked to."""

    def __init__(self, path: Path) -> None:
        self._file, self._readers, self._arena = DirectFile(path), Readers(_N_THREADS), Arena(_N_SLOTS * _PIECE_BYTES)
        self._n_pieces, self._stops = self._file.size_bytes // _PIECE_BYTES, threading.Event()

    @contextmanager
    def going_on(self) -> Iterator[list[float]]:
        """Gives a list that holds the bytes/s once it has ended."""
        self._stops.clear()
        thread, speed = threading.Thread(target=self._read, daemon=True), list[float]()
        start, before = time.perf_counter(), self._readers.bytes_read
        thread.start()
        try:
            yield speed
        finally:
            speed.append((self._readers.bytes_read - before) / (time.perf_counter() - start))
            self._stops.set()
            thread.join()

    def _read(self) -> None:
        reads: list[Read] = []
        while not self._stops.is_set():
            if len(reads) >= _N_SLOTS:
                reads[-_N_SLOTS].wait(lambda: False)
            number = len(reads)
            reads.append(Read(self._file, number % self._n_pieces * _PIECE_BYTES, _PIECE_BYTES,
                              self._arena.base + number % _N_SLOTS * _PIECE_BYTES))
            self._readers.submit(reads[-1])
        for read in reads[-_N_SLOTS:]:
            read.wait(lambda: False)

    def close(self) -> None:
        self._readers.close(self._arena)
        self._file.close()
        self._arena.close()


def answer_s(runtime: Runtime, prompt: list[int], n_tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and for each of the others."""
    runtime.engine.kv.truncate(0)
    start, times = time.perf_counter(), list[float]()
    for _ in runtime.generate(prompt, max_tokens=n_tokens, sampling=_GREEDY):
        times.append(time.perf_counter())
    return times[0] - start, (times[-1] - times[0]) / max(1, len(times) - 1)


def row(runtime: Runtime, reading: Reading, n_prompt: int, n_tokens: int, n_rounds: int,
        raw_bytes_s: float) -> dict[str, Any]:
    """Medians of `n_rounds`, alone and while reading in turn. Of several tokens, the time of one counts."""
    prompt, which = [(i * 7) % 5000 + 100 for i in range(n_prompt)], 0 if n_tokens == 1 else 1
    answer_s(runtime, prompt, n_tokens)
    alone, beside, speeds = [], [], []
    for _ in range(n_rounds):
        alone.append(answer_s(runtime, prompt, n_tokens)[which])
        with reading.going_on() as speed:
            beside.append(answer_s(runtime, prompt, n_tokens)[which])
        speeds += speed
    alone_s, beside_s, speed_s = (statistics.median(of) for of in (alone, beside, speeds))
    what = f"a prompt of {n_prompt}" if n_tokens == 1 else "a token"
    print(f"{what:18} {1000 * alone_s:7.1f} ms alone, {1000 * beside_s:7.1f} while reading: x{beside_s / alone_s:.2f}; "
          f"the disk {speed_s / 1e9:.2f} GB/s, {speed_s / raw_bytes_s:.0%} of alone", flush=True)
    return {"what": what, "alone_s": alone_s, "while_reading_s": beside_s, "slower": beside_s / alone_s,
            "disk_bytes_s": speed_s, "raw_bytes_s": raw_bytes_s, "of_disk": speed_s / raw_bytes_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", default="64,512")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    raw_bytes_s = measure_bandwidth(args.model, _N_THREADS, _RAW_S)
    reading = Reading(args.model)
    with Runtime.load(args.model, context=2304, layout="plain", speculate="off") as runtime:
        shapes = [(int(n), 1) for n in args.prompts.split(",")] + [(64, args.tokens)]
        for n_prompt, n_tokens in shapes:
            print(json.dumps({"model": args.model.name, **row(runtime, reading, n_prompt, n_tokens, args.rounds,
                                                              raw_bytes_s)}), flush=True)
    reading.close()


if __name__ == "__main__":
    main()
