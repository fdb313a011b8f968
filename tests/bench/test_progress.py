from __future__ import annotations

import io

from apps.bench.asked import Work
from apps.bench.progress import Progress, TimeLeft, shown


def test_the_time_left_is_that_of_its_like() -> None:
    prompt, answer = Work("a", 512, 0), Work("a", 0, 128)
    left = TimeLeft([prompt, prompt, prompt, answer, answer])
    assert left.seconds() is None
    left.done(prompt, 2.0)
    assert left.seconds() is None  # nobody knows yet how long an answer takes
    left.done(answer, 10.0)
    assert left.seconds() == 2 * 2.0 + 10.0
    for _ in range(2):
        left.done(prompt, 2.0)
    left.done(answer, 10.0)
    assert left.seconds() == 0.0


def test_work_of_another_size_is_guessed_token_by_token() -> None:
    left = TimeLeft([Work("a", 100, 0), Work("a", 0, 10), Work("a", 200, 20)])
    left.done(Work("a", 100, 0), 1.0)
    left.done(Work("a", 0, 10), 5.0)
    assert left.seconds() == 2.0 + 10.0


def test_time_is_written_as_people_say_it() -> None:
    assert (shown(None), shown(200.4), shown(5)) == ("", "about 3:20 left", "about 0:05 left")


def test_a_pipe_gets_warnings_and_nothing_else() -> None:
    stream = io.StringIO()
    with Progress(stream) as progress:
        progress.planned([Work("a", 1, 0)])
        progress.doing("pp1: run 1 of 5")
        progress.done(Work("a", 1, 0), 1.0)
        progress.warn("it is hot")
        with progress.aside():
            pass
    assert stream.getvalue() == "edgert: it is hot\n"
