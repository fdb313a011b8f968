"""One result: a test on one contender, as a row whose names are llama-bench's where it has one, and ours where not.

Knows names and arithmetic, no formats. A figure that was not measured is None, and `reasons` says why.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from apps.bench.contenders import EngineName, Setup
from apps.bench.measure import SEED
from apps.bench.sampler import Observed
from apps.bench.speed import Counters, Run, SpeedTest, answer_rate, deviation, percentile, prompt_rate, rate

Row = dict[str, Any]
# What llama-bench says of a processor without options of its own: its readers want these names.
_LLAMA_BENCH_CONSTANTS: Mapping[str, Any] = {
    "gpu_info": "", "backends": "CPU", "cpu_mask": "0x0", "cpu_strict": False, "poll": 0, "n_gpu_layers": 0,
    "split_mode": "none", "main_gpu": 0, "no_kv_offload": False, "flash_attn": True, "tensor_split": "0.00",
    "tensor_buft_overrides": "none", "use_mmap": True, "embeddings": False, "no_op_offload": False}


_ALMOST = 0.05  # of a file: readahead and the header are no cache


@dataclass(frozen=True, slots=True)
class Subject:
    """The model and the build, under llama-bench's names, with the environment block."""

    build_commit: str
    cpu_info: str
    model_filename: str
    model_type: str
    model_size: int
    model_n_params: int
    environment: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class FirstTokens:
    """Times to a first token as a user has them, of a text of `n_prompt` tokens; or why there are none."""

    n_prompt: int | None
    samples_ns: tuple[int, ...]
    why: str | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """A test's repetitions on one contender, and what was seen beside them."""

    engine: EngineName
    setup: Setup
    test: SpeedTest
    test_time: str  # when it began: ISO 8601, UTC
    runs: tuple[Run, ...]
    first_tokens: FirstTokens
    facts: Mapping[str, Any]  # how the contender runs, and its memory after these runs
    observed: Observed
    load_ns: int
    cached_share: float | None  # of the model's file, before it was opened
    limit_bytes: int | None
    group_peak_bytes: int | None
    predicted_prompt_ns: float | None
    predicted_token_ns: float | None
    measuring_cpu_share: float  # of one core, that whoever measures took meanwhile
    uses_cluster: bool = False
    baseline: str | None = None
    ratio_to_baseline: float | None = None

    @property
    def samples_ts(self) -> tuple[float, ...]:
        return tuple(rate(self.test, run) for run in self.runs)

    @property
    def median_ts(self) -> float:
        return statistics.median(self.samples_ts)

    @property
    def predicted_ns(self) -> float | None:
        """Of the whole test."""
        prompt_ns, token_ns = self.predicted_prompt_ns, self.predicted_token_ns
        if (self.test.n_prompt and prompt_ns is None) or (self.test.n_gen and token_ns is None):
            return None
        return (prompt_ns or 0.0) + self.test.n_gen * (token_ns or 0.0)

    @property
    def predicted_ts(self) -> float | None:
        return self.test.n_timed * 1e9 / self.predicted_ns if self.predicted_ns else None

    def beside(self, baseline: str, ratio: float) -> Result:
        """The same, with what it was compared with."""
        return replace(self, baseline=baseline, ratio_to_baseline=ratio)


def row(subject: Subject, result: Result) -> Row:
    """The result as an object: llama-bench's fields, then ours."""
    test, setup, seen = result.test, result.setup, result.observed
    figures = _figures(result)
    return {
        "build_commit": subject.build_commit, "build_number": 0, "cpu_info": subject.cpu_info,
        **_LLAMA_BENCH_CONSTANTS, "model_filename": subject.model_filename, "model_type": subject.model_type,
        "model_size": subject.model_size, "model_n_params": subject.model_n_params, "n_batch": setup.batch_size,
        "n_ubatch": setup.batch_size, "n_threads": setup.n_threads, "type_k": setup.kv_type, "type_v": setup.kv_type,
        "n_prompt": test.n_prompt, "n_gen": test.n_gen, "n_depth": test.n_depth, "test_time": result.test_time,
        **_statistics(result),
        "engine": result.engine, "test": test.name, "layout": setup.layout, "context_length": setup.context_length,
        "seed": SEED, "repetitions": len(result.runs), "page_cache": _page_cache(result.cached_share),
        "cached_share_before_load": _rounded(result.cached_share, 4), "load_ns": result.load_ns,
        "memory_budget_bytes": setup.memory_bytes, "limit_bytes": result.limit_bytes, "cluster": result.uses_cluster,
        **figures,
        "energy_source": seen.source, "energy_rail": seen.rail, "avg_watts": _rounded(seen.avg_watts, 4),
        "joules_per_prompt_token": _rounded(seen.joules_per_prompt_token, 6),
        "joules_per_gen_token": _rounded(seen.joules_per_gen_token, 6), "temperature_c": seen.temperature_c,
        "clock_mhz": seen.clock_mhz, "throttled": seen.throttled,
        "measuring_cpu_share": round(result.measuring_cpu_share, 5),
        "reasons": _reasons(result, figures), "plan": dict(result.facts.get("plan", {})),
        "environment": dict(subject.environment)}


def _statistics(result: Result) -> Row:
    times, speeds = [run.total_ns for run in result.runs], result.samples_ts
    return {"avg_ns": round(statistics.fmean(times)), "stddev_ns": round(deviation(times)),
            "avg_ts": round(statistics.fmean(speeds), 6), "stddev_ts": round(deviation(speeds), 6),
            "median_ts": round(result.median_ts, 6), "samples_ns": times,
            "samples_ts": [round(speed, 6) for speed in speeds]}


def _figures(result: Result) -> Row:
    """What matters on a small device."""
    test, runs, first = result.test, result.runs, result.first_tokens
    gaps = [gap for run in runs for gap in run.gaps_ns]
    counted, n_tokens = _sum([part for run in runs for part in (run.prompt, run.answer)]), test.n_timed * len(runs)
    asked = counted.expert_hits + counted.expert_misses
    is_ours = result.engine == "edgert"
    return {
        "prompt_avg_ts": _mean([prompt_rate(test, run) for run in runs]),
        "gen_avg_ts": _mean([answer_rate(run) for run in runs]),
        "ttft_n_prompt": first.n_prompt, "ttft_samples_ns": list(first.samples_ns),
        "avg_ttft_ns": round(statistics.fmean(first.samples_ns)) if first.samples_ns else None,
        "gen_gap_p50_ns": percentile(gaps, 50) if gaps else None,
        "gen_gap_p99_ns": percentile(gaps, 99) if gaps else None,
        "peak_rss_bytes": result.facts.get("peak_rss_bytes"), "group_peak_bytes": result.group_peak_bytes,
        "pinned_bytes": result.facts.get("pinned_bytes"),
        "read_bytes_per_token": round(counted.read_bytes / n_tokens) if is_ours else None,
        "wait_ns_per_token": round(counted.wait_ns / n_tokens) if is_ours else None,
        "expert_hit_rate": round(counted.expert_hits / asked, 6) if asked else None, "kv_overlap": None,
        "predicted_ts": _rounded(result.predicted_ts, 6), "baseline": result.baseline,
        "ratio_to_baseline": _rounded(result.ratio_to_baseline, 6)}


def _reasons(result: Result, figures: Row) -> dict[str, str]:
    """Why figures that one might look for are None."""
    why = dict(result.observed.why)
    is_ours = result.engine == "edgert"
    if not is_ours:
        theirs = ("avg_ttft_ns", "read_bytes_per_token", "wait_ns_per_token", "predicted_ts", "expert_hit_rate",
                  "kv_overlap")
        return why | dict.fromkeys(theirs, f"{result.engine} does not tell")
    why["kv_overlap"] = "the cache is dense: attention sees every token, so nothing is selected"
    if figures["expert_hit_rate"] is None:
        why["expert_hit_rate"] = "no experts were read one by one"
    if figures["predicted_ts"] is None:
        why["predicted_ts"] = "a cluster is not predicted token by token" if result.uses_cluster else \
            "the device is not calibrated"
    if figures["avg_ttft_ns"] is None:
        why["avg_ttft_ns"] = result.first_tokens.why or "measured for prompts alone"
    return why


def _page_cache(cached_share: float | None) -> str | None:
    """What the page cache held of the model when it was opened."""
    if cached_share is None:
        return None
    return "warm" if cached_share > 1 - _ALMOST else "cold" if cached_share < _ALMOST else "partly warm"


def _sum(parts: Sequence[Counters]) -> Counters:
    return Counters(*(sum(getattr(part, name) for part in parts)
                      for name in ("read_bytes", "wait_ns", "expert_hits", "expert_misses")))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(statistics.fmean(known), 6) if known else None


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
