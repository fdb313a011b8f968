"""A trace is Chrome's, is refused at once where it cannot be written, and costs nothing when it is off."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from edgert.engine import trace
from edgert.engine.trace import OFF, Trace
from edgert.errors import UsageError


def test_the_file_is_what_chrome_reads(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    recorded = Trace(path)
    with recorded.span("outer", "load"), recorded.span("inner", "wait"):
        pass
    with recorded.span("after", "compute"):
        pass
    recorded.save()
    written = json.loads(path.read_text())
    events = {event["name"]: event for event in written["traceEvents"]}
    assert list(events) == ["inner", "outer", "after"]  # in the order in which they ended
    for event in events.values():
        assert event["ph"] == "X"
        assert event["dur"] >= 0
        assert isinstance(event["pid"], int)
        assert event["tid"] == threading.get_native_id()
    inner, outer, after = (events[name] for name in ("inner", "outer", "after"))
    assert (outer["cat"], inner["cat"], after["cat"]) == ("load", "wait", "compute")
    assert outer["ts"] <= inner["ts"]
    assert inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] <= after["ts"]


def test_threads_are_told_apart(tmp_path: Path) -> None:
    recorded = Trace(tmp_path / "trace.json")

    def elsewhere() -> None:
        with recorded.span("elsewhere", "load"):
            pass

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    with recorded.span("here", "load"):
        pass
    recorded.save()
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert len({event["tid"] for event in events}) == 2


def test_a_span_that_fails_is_recorded(tmp_path: Path) -> None:
    recorded = Trace(tmp_path / "trace.json")
    with pytest.raises(RuntimeError), recorded.span("failing", "compute"):
        raise RuntimeError
    recorded.save()
    assert "failing" in (tmp_path / "trace.json").read_text()


def test_a_trace_that_is_off_keeps_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spans = {id(OFF.span(f"span {i}", "compute")) for i in range(10)}
    assert len(spans) == 1  # not even an object for each
    with OFF.span("a", "compute"), OFF.span("b", "compute"):
        pass
    assert OFF._spans == []
    OFF.save()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["missing/trace.json", ".", "file/trace.json"])
def test_a_path_that_cannot_be_written_is_refused_at_once(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--trace"):
        Trace(tmp_path / place)


def test_a_disk_that_is_full_at_the_end_is_a_typed_error(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    recorded = Trace(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(UsageError, match="--trace"):
        recorded.save()


def test_a_trace_ends_before_memory_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "_MAX_SPANS", 3)
    recorded = Trace(tmp_path / "trace.json")
    for i in range(5):
        with recorded.span(f"span {i}", "compute"):
            pass
    recorded.save()
    assert len(json.loads((tmp_path / "trace.json").read_text())["traceEvents"]) == 3
