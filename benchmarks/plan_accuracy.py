"""How right the plan is: predicted and measured memory and speed, side by side over a grid. Needs root.

    python benchmarks/plan_accuracy.py MODELS_DIR [BIG.gguf ...] --plot accuracy.svg --json accuracy.json    12 minutes
    python benchmarks/plan_accuracy.py MODELS_DIR [BIG.gguf ...] --times        what planning itself takes

Each case runs in a control group of the budget's size, from a cold page cache, with a calibration from before the grid
that no answer corrects (of a model with experts, one answer shows how it chooses them). Right after a case, the same
is predicted once more from figures of that minute: `now`. Its error is the model's own; what lies between the two
predictions is how far the machine has drifted since the calibration. A case beside which other programs computed says
so: its speed tells nothing. Cases that the planner refuses are named and left out. Peak memory is the larger of the
process's and the group's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import plan_cases
from plan_cases import Case

from apps.bench.control_group import is_possible

_MIB = 2**20
# (model to budget, context, tokens of the prompt, bound on the disk in MB/s); prompts fill a part of a batch, and with
# it the compute buffers.
Row = tuple[float, int, int, int]
_SMALL: tuple[Row, ...] = ((0.25, 512, 448, 0), (0.25, 2048, 1984, 0), (0.25, 8192, 4096, 0), (1.0, 1024, 512, 0),
                           (1.2, 512, 448, 200))
_MEDIUM: tuple[Row, ...] = ((0.6, 2048, 512, 0), (1.0, 1024, 512, 0), (1.5, 2048, 512, 0), (1.5, 8192, 1024, 0),
                            (2.0, 1024, 512, 0), (2.0, 1024, 512, 400), (2.5, 512, 448, 0))
_LARGE: tuple[Row, ...] = ((1.2, 1024, 512, 0), (2.0, 1024, 512, 0), (2.0, 1024, 512, 600), (4.0, 2048, 512, 0),
                           (8.0, 512, 448, 0))
_HUGE: tuple[Row, ...] = tuple((ratio, context, 256, disk) for ratio, context, _, disk in _LARGE)
_GRIDS = ((400 * _MIB, _SMALL), (1400 * _MIB, _MEDIUM), (3000 * _MIB, _LARGE), (2**63, _HUGE))
_BOUNDS = {"speed_error": 0.2, "speed_error_now": 0.2, "drift": 0.2, "memory_error": 0.05}
_EDGERT = [sys.executable, "-c", "import sys; from apps.cli.main import main; sys.exit(main())"]
_MOST_PLAN_S, _MOST_CALIBRATION_S = 3.0, 10.0
_QUIET_SHARE = 0.05  # of the processors' time; a case with which others computed more says nothing of speed


def grid(models: Sequence[Path]) -> Iterator[Case]:
    for model in models:
        size = model.stat().st_size
        rows = next(rows for below, rows in _GRIDS if size < below)
        for ratio, context, n_prompt, disk_mb_s in rows:
            yield Case(model, int(size / ratio), context, n_prompt, disk_mb_s)


def calibrate(cases: Sequence[Case], homes: Mapping[int, Path]) -> None:
    for model, mb_s in dict.fromkeys((case.model, case.disk_mb_s) for case in cases):
        plan_cases.run(Case(model, 2**33, 512, 1, mb_s), homes, "calibrate")


def measure(cases: Sequence[Case], homes: Mapping[int, Path]) -> list[dict[str, Any]]:
    results = []
    print(f"{'case':<42} {'tok/s':>7} {'pred.':>7} {'err':>6} {'now':>6} {'drift':>6}  {'peak':>5} {'pred.':>5} "
          f"{'err':>6}  {'prefill':>7} {'pred.':>6}  limit", flush=True)
    for case in cases:
        found = plan_cases.run(case, homes)
        if found is None:
            print(f"{case.name:<42} refused: the budget is too small", flush=True)
            continue
        now = plan_cases.run(case, homes, "again", sizes=found["sizes"], n_tokens=found["n_tokens"])
        assert now is not None  # it has planned before
        found |= {"case": case.name, "now_tok_s": now["predicted_tok_s"], "now_disk_bytes_s": now["disk_bytes_s"],
                  "speed_error": found["predicted_tok_s"] / found["tok_s"] - 1,
                  "speed_error_now": now["predicted_tok_s"] / found["tok_s"] - 1,
                  "drift": found["predicted_tok_s"] / now["predicted_tok_s"] - 1,
                  "memory_error": found["predicted_peak_bytes"] / found["peak_bytes"] - 1}
        results.append(found)
        print(_line(found), flush=True)
    return results


def _line(found: Mapping[str, Any]) -> str:
    hits = f"; experts found {found['hit_rate']:.0%}, pred. {found['predicted_hit_rate']:.0%}" \
        if found["sizes"]["pool_slots"] else ""
    others = f"; others took {found['others_share']:.0%}" if found["others_share"] > _QUIET_SHARE else ""
    return (f"{found['case']:<42} {found['tok_s']:7.2f} {found['predicted_tok_s']:7.2f} {found['speed_error']:+6.0%} "
            f"{found['speed_error_now']:+6.0%} {found['drift']:+6.0%}  "
            f"{found['peak_bytes'] >> 20:5} {found['predicted_peak_bytes'] >> 20:5} {found['memory_error']:+6.1%}  "
            f"{found['prefill_s']:6.1f}s {found['predicted_prefill_s']:5.1f}s  {found['limit']}{hits}{others}")


def summarise(results: Sequence[Mapping[str, Any]]) -> None:
    for what, bound in _BOUNDS.items():
        errors = [abs(result[what]) for result in results]
        print(f"{what}: median {statistics.median(errors):.1%}, worst {max(errors):.1%}, "
              f"{sum(error <= bound for error in errors)} of {len(errors)} within {bound:.0%}")
    n_disturbed = sum(result["others_share"] > _QUIET_SHARE for result in results)
    print(f"others computed beside {n_disturbed} of {len(results)} cases")


def scatter(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Measured over predicted, on logarithmic axes, with the bound of 20 %."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    measured = [result["tok_s"] for result in results]
    for key, marker, label in (("predicted_tok_s", "o", "before the grid"), ("now_tok_s", "x", "in the same minute")):
        axes.loglog([result[key] for result in results], measured, marker, label=label)
    ends = [min(measured) / 1.5, max(measured) * 1.5]
    for factor, style in ((1.0, "-"), (1 / 1.2, ":"), (1 / 0.8, ":")):
        axes.plot(ends, [end * factor for end in ends], style, color="grey")
    axes.set_xlabel("predicted tokens/s")
    axes.set_ylabel("measured tokens/s")
    axes.legend()
    figure.savefig(path)


def times(models: Sequence[Path], directory: Path) -> list[dict[str, Any]]:
    """Whole processes of `edgert plan`: the first on a device, which measures it and rehearses the model, and the next;
    their difference is the calibration."""
    rows = list[dict[str, Any]]()
    print(f"{'model':<40} {'first':>7} {'then':>7}")
    for model in models:
        home = directory / f"times-{model.stem}"
        first_s, then_s = (_plan_s(model, home) for _ in range(2))
        print(f"{model.stem[:40]:<40} {first_s:6.2f}s {then_s:6.2f}s", flush=True)
        rows.append({"model": model.name, "first_s": first_s, "calibration_s": first_s - then_s, "plan_s": then_s})
    for what, key, most in (("planning", "plan_s", _MOST_PLAN_S),
                            ("calibration with rehearsal", "calibration_s", _MOST_CALIBRATION_S)):
        print(f"{what}: at most {max(row[key] for row in rows):.2f} s of {most:g}")
    return rows


def _plan_s(model: Path, home: Path) -> float:
    start = time.perf_counter()
    subprocess.run([*_EDGERT, "plan", str(model), "--json"], check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL, env={**os.environ, "EDGERT_HOME": str(home)})
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="GGUF files, or directories of them")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--times", action="store_true", help="time `edgert plan` itself, for each model")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    files = [file for one in args.models for file in (sorted(one.glob("*.gguf")) if one.is_dir() else [one])]
    with tempfile.TemporaryDirectory() as directory:
        if args.times:
            results = times(files, Path(directory))
        else:
            if not is_possible():
                raise SystemExit("this needs root and a writable memory control group")
            cases = [case for case in grid(files) if args.only in case.name]
            homes = {mb_s: Path(directory) / str(mb_s) for mb_s in {case.disk_mb_s for case in cases}}
            calibrate(cases, homes)
            results = measure(cases, homes)
            summarise(results)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.plot and not args.times:
        scatter(args.plot, results)


if __name__ == "__main__":
    main()
