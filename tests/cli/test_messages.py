from __future__ import annotations

import json
import logging

import pytest

from apps.cli.messages import complain, logging_to_stderr
from edgert.errors import ContextOverflow, EdgertError

Capture = pytest.CaptureFixture[str]


def _log_something() -> None:
    log = logging.getLogger("edgert.somewhere")
    log.warning("careful with %s", "\x1b[2J")
    log.info('said "yes"', extra={"fields": {"n": 3, "speed": None, "why": "it was so"}})
    log.debug("detail")


def test_by_default_only_warnings_are_said_and_plainly(capsys: Capture) -> None:
    with logging_to_stderr(0, as_json=False):
        _log_something()
    assert capsys.readouterr().err == "edgert: warning: careful with \N{REPLACEMENT CHARACTER}[2J\n"


def test_verbose_says_keys_and_values_that_can_be_split_again(capsys: Capture) -> None:
    with logging_to_stderr(1, as_json=False):
        _log_something()
    warning, info = capsys.readouterr().err.splitlines()
    assert warning.endswith(r'level=warning logger=edgert.somewhere msg="careful with \u001b[2J"')
    assert info.endswith(r'level=info logger=edgert.somewhere msg="said \"yes\"" n=3 speed=null why="it was so"')


def test_json_is_one_object_a_line(capsys: Capture) -> None:
    with logging_to_stderr(5, as_json=True):
        _log_something()
        try:
            raise ValueError("a\nb")
        except ValueError:
            logging.getLogger("edgert").exception("two\nlines")
        complain(ContextOverflow(9, 8), as_json=True)
    warning, info, debug, failure, error = map(json.loads, capsys.readouterr().err.splitlines())
    assert (warning["level"], info["n"], debug["message"]) == ("warning", 3, "detail")
    assert "ValueError" in failure["traceback"]
    assert error["exit_code"] == 6
    assert "9 tokens" in error["message"] and error["next_step"]


def test_logging_leaves_nothing_behind(capsys: Capture) -> None:
    before = list(logging.getLogger().handlers), logging.getLogger().level
    with logging_to_stderr(2, as_json=False):
        assert logging.getLogger().level == logging.DEBUG
    assert (list(logging.getLogger().handlers), logging.getLogger().level) == before


def test_errors_are_a_message_and_a_next_step_without_control_characters(capsys: Capture) -> None:
    complain(EdgertError("the name is \x1b]0;owned\x07", "Choose another."))
    complain(EdgertError("alone"))
    assert capsys.readouterr().err == "edgert: the name is \ufffd]0;owned\ufffd\nChoose another.\nedgert: alone\n"
