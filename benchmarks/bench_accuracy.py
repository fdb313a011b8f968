"""Whether `edgert bench` measures well: it repeats itself, costs nothing, and is fair to llama.cpp.

    python benchmarks/bench_accuracy.py MODEL.gguf [--checks repeat,cost,baseline] [--rounds 5]

Prints a JSON line per check:
  repeat    two measurements of the same thing, each with processes of its own: medians, and how far they are apart; one
            after the other, as a user would, and in turn, which leaves out how the machine's own speed moves
  cost      the same runs with and without somebody who looks at power, temperature and clocks ten times a second, in
            turn; and the processor time that measuring takes, as a share of one core
  baseline  llama.cpp as `--baseline` measures it beside llama-cpp-python's own `Llama.eval`, in turn
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vs_llamacpp import session

from apps.bench.asked import OURS, Peer
from apps.bench.contenders import Setup
from apps.bench.measure import synthetic_tokens
from apps.bench.power_sources import find_source
from apps.bench.process import ContenderProcess
from apps.bench.sampler import Sampler
from apps.bench.speed import Run, SpeedTest, rate, steady_rate
from edgert.cpu import usable_cores

_TESTS = (SpeedTest(512, 0, 0), SpeedTest(0, 128, 0))
_PEER = Peer("llama.cpp", "llama.cpp", "plain")
_N_CORES = 8  # of the device whose files are read for `cost`


def repeat(args: argparse.Namespace) -> dict[str, Any]:
    """Two sessions, one after the other; then two whose repetitions take turns."""
    later = [_medians(args.model, args.rounds) for _ in range(2)]
    pairs = [[_medians(args.model, 1) for _ in range(2)] for _ in range(args.rounds)]
    in_turn = [[statistics.median(pair[side][test] for pair in pairs) for test in range(len(_TESTS))]
               for side in range(2)]
    return {test.name: {"medians": [a, b], "apart": abs(a / b - 1), "in_turn": [c, d], "apart_in_turn": abs(c / d - 1)}
            for test, a, b, c, d in zip(_TESTS, *later, *in_turn, strict=True)}


def _medians(model: Path, n_runs: int) -> list[float]:
    """Of each test, in a process of its own."""
    return [one[0].median_ts for one in session(model, _TESTS, n_runs, usable_cores(), [OURS]).results()]


def cost(args: argparse.Namespace) -> dict[str, Any]:
    """One contender, watched and not watched in turn. A device's sensors are files, which this one may lack."""
    speeds: dict[bool, list[float]] = {False: [], True: []}
    spent_s = watched_s = 0.0
    with tempfile.TemporaryDirectory() as directory, ContenderProcess("edgert") as process:
        root = _sensors(Path(directory))
        setup = Setup(None, usable_cores(), 512, "auto", "f16", 1024)
        process.ask("open", engine="edgert", path=str(args.model), setup=asdict(setup), cluster=None)
        process.ask("warm_up", test=asdict(_TESTS[1]), token_ids=None)
        for number in range(2 * args.rounds):
            is_watched = number % 4 in (1, 2)
            sampler, cpu_s, start_s = Sampler(find_source(root), root), time.process_time(), time.monotonic()
            if is_watched:
                sampler.start()
            speeds[is_watched].append(rate(_TESTS[1], Run.from_dict(process.ask("run"))))
            if is_watched:
                spent_s, watched_s = spent_s + time.process_time() - cpu_s, watched_s + time.monotonic() - start_s
            sampler.close()
    without, watched = statistics.median(speeds[False]), statistics.median(speeds[True])
    return {"tok_s": without, "watched_tok_s": watched, "cost": 1 - watched / without,
            "cpu_share_of_a_core": spent_s / watched_s}


def _sensors(root: Path) -> Path:
    """Three rails, three thermal zones and the clocks of eight cores."""
    chip = root / "sys/bus/i2c/devices/1-0040"
    rails = {f"{chip}/hwmon/hwmon1/{name}": text for number, label in ((1, "VDD_IN"), (2, "VDD_CPU"), (3, "VDD_SOC"))
             for name, text in ((f"in{number}_label", label), (f"in{number}_input", "5000"),
                                (f"curr{number}_input", "900"))}
    zones = {f"{root}/sys/class/thermal/thermal_zone{number}/temp": "48000" for number in range(3)}
    clocks = {f"{root}/sys/devices/system/cpu/cpu{number}/cpufreq/scaling_cur_freq": "1500000"
              for number in range(_N_CORES)}
    for name, text in {f"{chip}/name": "ina3221", **rails, **zones, **clocks}.items():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def baseline(args: argparse.Namespace) -> dict[str, Any]:
    """Processes of both kinds in turn, each with the model loaded anew."""
    ours: dict[str, list[float]] = {test.name: [] for test in _TESTS}
    direct: dict[str, list[float]] = {test.name: [] for test in _TESTS}
    command = [sys.executable, __file__, str(args.model), "--direct"]
    for _ in range(args.rounds):
        told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        for found in session(args.model, _TESTS, 1, usable_cores(), [_PEER]).results():
            ours[found[0].test.name].append(found[0].median_ts)
            direct[found[0].test.name].append(told[found[0].test.name])
    return {name: {"bench": statistics.median(ours[name]), "direct": statistics.median(direct[name]),
                   "ratio": statistics.median(a / b for a, b in zip(ours[name], direct[name], strict=True))}
            for name in ours}


def measure_directly(path: Path) -> dict[str, float]:
    """llama-cpp-python without any of this code: its Llama class, its eval, and the clock."""
    from edgert.ggml.library import load_libraries

    load_libraries()  # for the same OpenMP settings
    import llama_cpp

    before = llama_cpp.llama_model_default_params

    def without_repacking() -> Any:
        params = before()
        params.use_extra_bufts = False
        return params

    llama_cpp.llama_cpp.llama_model_default_params = without_repacking
    n_threads = usable_cores()
    llama: Any = llama_cpp.Llama(str(path), n_ctx=2048, n_batch=512, n_ubatch=512, n_threads=n_threads,
                                 n_threads_batch=n_threads, flash_attn=True, verbose=False)
    ids = synthetic_tokens(512, llama.n_vocab())
    found = {}
    for test in _TESTS:
        for _ in range(2):  # the first one warms up
            llama.reset()
            start, times = time.perf_counter(), list[float]()
            if test.n_prompt:
                llama.eval(ids)
                found[test.name] = test.n_prompt / (time.perf_counter() - start)
            for token_id in ids[:test.n_gen]:
                llama.eval([token_id])
                times.append(time.perf_counter())
            if times:
                found[test.name] = steady_rate(times)
    return found


CHECKS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "repeat": repeat, "cost": cost, "baseline": baseline}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--checks", default=",".join(CHECKS))
    parser.add_argument("--direct", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.direct:
        print(json.dumps(measure_directly(args.model)))
        return
    for name in args.checks.split(","):
        print(json.dumps({"check": name, "model": args.model.name, **CHECKS[name](args)}), flush=True)


if __name__ == "__main__":
    main()
