"""Ctrl-C as a user has it: a real process, a real signal, and what was said is kept."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen

import psutil
import pytest
from command_line import DEADLINE_S, read_until, start

# Long enough to be interrupted: 8,000 tokens of prefill in one graph, or 30,000 tokens of answer, take some 10 s or
# minutes. One thread, since two would wait for each other at every operation whenever another program runs.
LONG = ("--threads", "1", "--layout", "plain", "--context", "32k", "--batch", "8192", "--temp", "0", "-v")
LONG_PROMPT = b"a b c d " * 1600


@pytest.fixture(scope="module")
def slow_model(tiny_model: Callable[..., Path]) -> str:
    return str(tiny_model("llama", n_layers=8, context_length=32768))


@contextmanager
def running(words: Sequence[str], prompt: bytes = b"") -> Iterator[Popen[bytes]]:
    process = start(["run", *words])
    assert process.stdin is not None
    process.stdin.write(prompt)
    process.stdin.close()
    process.stdin = None
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _wait_until_it_has_computed(process: Popen[bytes], cpu_s: float) -> None:
    """Until it has used so much more processor time, however busy the machine is."""
    running = psutil.Process(process.pid)
    end = running.cpu_times().user + cpu_s
    while running.cpu_times().user < end:
        assert process.poll() is None
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_an_answer_and_keeps_what_was_said(number: signal.Signals, status: int,
                                                          slow_model: str) -> None:
    with running([slow_model, "hello", "--raw", *LONG]) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.send_signal(number)
        _, messages = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == status
    assert b"finish_reason=cancelled" in messages and b"Traceback" not in messages


def test_a_prefill_stops_between_two_operations(slow_model: str) -> None:
    with running([slow_model, "--raw", "--json", *LONG], LONG_PROMPT) as process:
        assert process.stderr is not None
        read_until(process.stderr, b"msg=prompt")
        _wait_until_it_has_computed(process, 1.0)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=DEADLINE_S)
    answered = json.loads(out)
    assert process.returncode == 130
    assert (answered["finish_reason"], answered["text"], answered["token_ids"]) == ("cancelled", "", [])
    assert len(answered["prompt_token_ids"]) > 8000


def test_json_keeps_a_stopped_answer(slow_model: str) -> None:
    with running([slow_model, "hello", "--raw", "--json", *LONG]) as process:
        assert process.stderr is not None
        read_until(process.stderr, b"msg=prompt")
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert json.loads(out)["finish_reason"] == "cancelled"


def test_a_signal_while_the_model_loads_ends_the_command_in_one_line(slow_model: str) -> None:
    with running([slow_model, "hello", "-v"]) as process:
        assert process.stderr is not None
        read_until(process.stderr, b"msg=")  # the weights' layout, in the middle of loading
        process.send_signal(signal.SIGINT)
        _, messages = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert b"Traceback" not in messages
