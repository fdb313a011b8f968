"""The process of one contender: reads requests as JSON lines on standard input, answers on standard output.

A process of its own, so that its peak memory is its own, a control group can hold it, and a check of ggml's that fails
ends it alone. Started by process.py; when that goes away, so does this.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any, BinaryIO

from apps.bench.contenders import Contender, Edgert, LlamaCppContender, Setup
from apps.bench.measure import run_once, warm_up
from apps.bench.speed import SpeedTest
from edgert.errors import ContextOverflow, EdgertError, OutOfMemory, to_fields

Message = dict[str, Any]
_DEFECT = "This is a defect in edgert."


class Worker:
    """One contender, one request after the other."""

    def __init__(self, answers: BinaryIO) -> None:
        self._answers = answers
        self._contender: Contender | None = None
        self._test = SpeedTest(0, 0, 0)
        self._token_ids: list[int] = []

    def handle(self, asked: Message) -> None:
        """Answer one request, with an error where that is what came of it."""
        try:
            answer = getattr(self, f"do_{asked.pop('op')}")(**asked)
        except EdgertError as error:
            answer = {"error": to_fields(error)}
        except MemoryError:
            answer = {"error": to_fields(OutOfMemory("this model", 0))}
        except Exception as error:
            answer = {"error": to_fields(EdgertError(f"{type(error).__name__}: {error}"[:500], _DEFECT))}
        self._answers.write(json.dumps(answer).encode() + b"\n")
        self._answers.flush()

    def do_survey(self, path: str, seconds: float, calibrated: list[Message]) -> Message:
        from apps.bench.survey import survey

        return survey(Path(path), seconds, [Setup(**setup) for setup in calibrated])

    def do_open(self, engine: str, path: str, setup: Message, cluster: Message | None) -> Message:
        from edgert.ggml.library import load_libraries

        load_libraries()  # before the peer: both then compute with the same OpenMP settings
        if engine == "edgert":
            self._contender = Edgert(Path(path), Setup(**setup), _cluster_options(cluster))
        else:
            self._contender = LlamaCppContender(Path(path), Setup(**setup))
        return self._contender.facts()

    def do_warm_up(self, test: Message, token_ids: list[int] | None) -> Message:
        contender, self._test = self._opened(), SpeedTest(**test)
        self._token_ids = warm_up(contender, self._test, token_ids)
        test_, predict_ns = self._test, contender.predict_ns
        n_before = test_.n_depth + test_.n_prompt
        return {"token_ids": self._token_ids,
                "predicted_prompt_ns": predict_ns(test_.n_prompt, test_.n_depth) if test_.n_prompt else None,
                "predicted_token_ns": predict_ns(1, n_before + test_.n_gen // 2) if test_.n_gen else None}

    def do_run(self) -> Message:
        return run_once(self._opened(), self._test, self._token_ids).to_dict()

    def do_first_token(self, n_prompt: int) -> Message:
        try:
            told = self._opened().first_token(n_prompt)
        except ContextOverflow as error:
            return {"reason": f"the prompt and its template have {error.n_tokens} tokens, the context holds fewer"}
        return {"reason": "the model has no vocabulary"} if told is None else {"ns": told[0], "n_prompt": told[1]}

    def do_facts(self) -> Message:
        return self._opened().facts()

    def close(self) -> None:
        if self._contender is not None:
            self._contender.close()

    def _opened(self) -> Contender:
        assert self._contender is not None, "the first request opens a model"
        return self._contender


def _cluster_options(told: Message | None) -> Any:
    if told is None:
        return None
    from tensorpar.members import parse_address
    from tensorpar.workers import ClusterOptions

    return ClusterOptions(told["devices"], tuple(map(parse_address, told["peers"])), told["wire"])


def _end_with(parent: int) -> None:
    """End at once when whoever asked is gone, also in the middle of a long test."""
    while os.getppid() == parent and not _STOPPED.wait(1.0):
        pass
    if not _STOPPED.is_set():
        os._exit(1)


_STOPPED = threading.Event()


def main() -> None:
    """Keep standard output for answers alone: whatever else is printed goes to standard error."""
    from apps.cli.messages import logging_to_stderr

    verbosity, as_json, parent = int(sys.argv[1]), sys.argv[2] == "1", int(sys.argv[3])
    threading.Thread(target=_end_with, args=(parent,), name="parent", daemon=True).start()
    with os.fdopen(os.dup(1), "wb") as answers, logging_to_stderr(verbosity, as_json):
        os.dup2(2, 1)
        worker = Worker(answers)
        try:
            for line in sys.stdin.buffer:
                worker.handle(json.loads(line))
        finally:
            _STOPPED.set()
            worker.close()


if __name__ == "__main__":
    main()
