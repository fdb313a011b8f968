from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rows import SUBJECT, answer, prompt, rows, sweep

from apps.bench import plots, report
from apps.bench.report import check_report, page, write_report
from apps.bench.results import row
from edgert.errors import UsageError

# A busy machine may freeze for minutes.
DEADLINE_MS = 200_000
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")


def test_the_page_opens_offline_without_errors(tmp_path: Path, require: Callable[[object, str], None]) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    require(path, "there is no chromium")
    troubles: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=list(FLAGS), timeout=DEADLINE_MS)
        context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
        context.set_default_timeout(DEADLINE_MS)
        for name, of in (("tests", rows()), ("sweep", sweep())):
            shown = context.new_page()
            shown.on("console", lambda message: troubles.append(message.text))
            shown.on("pageerror", lambda error: troubles.append(str(error)))
            shown.on("request", lambda asked: troubles.append(asked.url) if not asked.url.startswith(("file:", "data:"))
                     else None)
            (tmp_path / name).mkdir()
            shown.goto(write_report(tmp_path / name, of).as_uri())
            assert shown.title() == "tiny & small.gguf on Board <5>"
            assert shown.locator("svg").bounding_box()["height"] > 300
            assert shown.locator("thead th").first.inner_text() in ("engine", "budget")
            assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth")
        browser.close()
    assert troubles == []


def test_the_page_says_what_was_measured_and_what_not() -> None:
    text = page(rows())
    assert "tiny &amp; small.gguf on Board &lt;5&gt;" in text and "someone" not in text
    assert "the clock dropped" in text and "1.50 GB/s" in text and "window 1.0 MiB" in text
    assert "overlap of selected keys and values: the cache is dense" in text
    assert "time to first token: " not in text  # one row has it
    addresses = re.findall(r"""(?:src=|href=|url\()["']?([^"'\s>)]*)""", text)
    assert addresses and all(address.startswith(("data:", "#")) for address in addresses)


def test_axes_have_units_and_curves_a_legend() -> None:
    figure = plots.draw(sweep())
    labels = [(axis.get_xlabel(), axis.get_ylabel()) for axis in figure.axes]
    assert labels == [("memory budget, MiB", "tokens per second")] * 2 + [("MiB", "contender and budget")]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()][-1].startswith("pp512 edgert")
    bars = plots.draw(rows())
    assert [axis.get_xlabel() for axis in bars.axes] == ["test", "test", "MiB"]
    assert "single runs" in [text.get_text() for text in bars.axes[0].get_legend().get_texts()]
    both = [row(SUBJECT, one) for one in (prompt(), answer(), answer(n_gen=2))]
    both[2] |= {"n_prompt": 8, "test": "pp8+tg2"}
    assert len(plots.draw(both).axes) == 4


def test_a_drawing_is_a_curve_through_what_was_measured() -> None:
    (curve, *_rest) = plots.draw(sweep()).axes[0].containers
    xs, ys = curve.lines[0].get_data()
    assert [*xs] == [128, 256] and [*ys] == [one["median_ts"] for one in sweep() if one["n_prompt"]]


@pytest.mark.parametrize("name", ["a.svg", "a.png"])
def test_drawings_are_files_of_their_kind(name: str, tmp_path: Path) -> None:
    plots.check_plot(tmp_path / name)
    plots.plot(tmp_path / name, rows())
    assert (tmp_path / name).read_bytes().startswith(b"<?xml" if name == "a.svg" else b"\x89PNG")


def test_what_cannot_be_written_or_drawn_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--report"):
        check_report(tmp_path / "file" / "report")
    with pytest.raises(UsageError, match="--report"):
        write_report(tmp_path / "nowhere", rows())
    check_report(tmp_path / "new" / "report")
    assert [*(tmp_path / "new" / "report").iterdir()] == []
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="not installed"):
        report.check_report(tmp_path)
