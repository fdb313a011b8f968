"""What a Runtime takes it gives back: memory, descriptors and threads, also where loading fails."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from settling import check_settles, descriptors_and_threads
from tiny_models import write_tiny_model
from tiny_vocabulary import vocabulary_keys

from edgert import Runtime, SamplingParams
from edgert.errors import BudgetTooSmall, EdgertError, ModelFileError, OutOfMemory, UsageError
from edgert.ggml.backend import Backend

TinyModel = Callable[..., Path]
MIB = 2**20
GREEDY = SamplingParams(temperature=0)


def repeat(action: Callable[[], object], times: int = 30) -> int:
    """How many bytes `times` repetitions leave, once everything that stays is there. They leave no descriptor and no
    thread."""
    for _ in range(4):
        action()
    gc.collect()
    process = psutil.Process()
    rss_bytes, held = process.memory_info().rss, descriptors_and_threads()
    for _ in range(times):
        action()
    gc.collect()
    check_settles(*held)
    return process.memory_info().rss - rss_bytes


@pytest.mark.parametrize("options", [{}, {"layout": "repack"}, {"kv_type": "q8_0"}, {"memory": "4G"}, {"threads": 2}],
                         ids=str)
def test_thirty_loads_and_answers_leave_nothing(options: dict[str, Any], tiny_model: TinyModel) -> None:
    path = tiny_model("llama", quantisation="Q4_0", head_dim=64)
    prompt = [token_id % 256 for token_id in range(20 if options.get("threads") == 2 else 200)]  # a busy machine

    def use() -> None:
        with Runtime.load(path, context=2048, batch=128, **{"layout": "plain", "threads": 1, **options}) as runtime:
            runtime.generate(prompt, max_tokens=3, sampling=GREEDY).result()
            runtime.generate("and on", max_tokens=2).result()
            next(iter(runtime.generate("left alone")))

    assert repeat(use) < 12 * MIB  # 30 times a megabyte and more


def test_many_requests_to_one_runtime_leave_nothing(tiny_model: TinyModel) -> None:
    with Runtime.load(tiny_model("llama"), threads=1, context=4096, layout="plain") as runtime:
        lengths = iter(range(5, 10_000, 7))

        def use() -> None:
            prompt = [(token_id * 7) % 256 for token_id in range(next(lengths) % 2000 + 1)]
            runtime.generate(prompt, max_tokens=3, sampling=SamplingParams(seed=1)).result()

        runtime.generate([1] * 4000, max_tokens=3).result()  # the cache takes its memory as it fills, and keeps it
        assert repeat(use, 60) < 8 * MIB


def _fails(path: Path, error: type[EdgertError], **options: Any) -> Callable[[], None]:
    def attempt() -> None:
        with pytest.raises(error):
            Runtime.load(path, **{"threads": 1, "layout": "plain", "context": 2048, **options}).close()

    return attempt


def test_loads_that_fail_leave_nothing(tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = tiny_model("llama", hidden_size=512, ffn_size=2048)  # 10 MiB
    wrong_vocabulary = write_tiny_model(tmp_path / "vocabulary.gguf", "llama", metadata=vocabulary_keys(300),
                                        hidden_size=512, ffn_size=2048)
    closed, close = [], Backend.close

    def counted(backend: Backend) -> None:
        closed.append(bool(backend.handle))
        close(backend)

    monkeypatch.setattr(Backend, "close", counted)
    for attempt in (_fails(wrong_vocabulary, ModelFileError), _fails(sound, OutOfMemory, context=2**26),
                    _fails(sound, BudgetTooSmall, memory="1M"), _fails(sound, UsageError, layout="fast")):
        closed.clear()
        assert repeat(attempt, 10) < 16 * MIB
        assert sum(closed) == 14


# Runs alone, so that the test suite's own memory is not in the account. Anonymous memory only: the file's pages and
# the libraries' are shared with the page cache.
_MEASURE = """
import json, sys
from edgert import Runtime, SamplingParams

def anonymous_bytes():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

with Runtime.load(sys.argv[1], threads=1, context=2048) as runtime:
    peak, messages = 0, [{"role": "user", "content": "Tell me a story about the sea. " * 30}]
    for _ in runtime.chat(messages, max_tokens=24, sampling=SamplingParams(seed=1)):
        peak = max(peak, anonymous_bytes())
    memory, plan = runtime.memory(), runtime.plan()
    accounted = memory["kv_resident_bytes"] + memory["compute_bytes"] + plan["repacked_bytes"]
print(json.dumps({"beyond": peak - accounted, "peak": peak}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_the_process_itself_takes_less_than_120_mib(real_model: Callable[[str], Path]) -> None:
    done = subprocess.run([sys.executable, "-c", _MEASURE, str(real_model("smollm2-135m"))], capture_output=True,
                          text=True, timeout=200, check=False, env={**os.environ, "GGML_NO_BACKTRACE": "1"})
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert 0 < figures["beyond"] < 120 * MIB, figures
