from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Terminal

OPTIONS = ("--threads", "1", "--layout", "plain", "--temp", "0", "-v")
PROMPT = "\n> "


def _talk(model: Path, *words: str) -> Terminal:
    return Terminal(["run", str(model), *OPTIONS, *words])


def _timings(said: str) -> dict[str, int]:
    answer = next(line for line in said.splitlines() if "msg=answer" in line)
    return {key: int(value) for key, value in re.findall(r"(\w+_n)=(\d+)", answer)}


def test_each_turn_reuses_the_kv_of_the_turns_before(model: Path) -> None:
    with _talk(model, "--max-tokens", "8") as terminal:
        assert "/help" in terminal.wait_for(PROMPT)
        cached = []
        for _ in range(3):
            terminal.type("hello there\n")
            cached.append(_timings(terminal.wait_for(PROMPT))["cache_n"])
        assert cached[0] == 0 < cached[1] < cached[2]
        terminal.type("/reset\n")
        assert "forgotten" in terminal.wait_for(PROMPT)
        terminal.type("hello there\n")
        after_reset = _timings(terminal.wait_for(PROMPT))
        assert after_reset["cache_n"] + after_reset["prompt_n"] < cached[1]
        terminal.type("/exit\n")
        assert terminal.wait() == 0


def test_a_real_model_remembers_what_was_said(real_model: Callable[[str], Path]) -> None:
    with _talk(real_model("smollm2-135m"), "--max-tokens", "16") as terminal:
        terminal.wait_for(PROMPT)
        terminal.type("The secret word is Lighthouse.\n")
        terminal.wait_for(PROMPT)
        terminal.type("Repeat the secret word.\n")
        terminal.wait_for("Repeat the secret word.\n")
        assert "lighthouse" in terminal.wait_for(PROMPT).lower()
        terminal.type("\x04")
        assert terminal.wait() == 0


def test_commands_are_explained_and_slips_are_named(model: Path) -> None:
    with _talk(model) as terminal:
        terminal.wait_for(PROMPT)
        terminal.type("/help\n")
        explained = terminal.wait_for(PROMPT)
        assert all(word in explained for word in ("/reset", "/exit", '"""', "Ctrl-C", "Ctrl-D"))
        terminal.type("/rest\n")
        assert "Did you mean /reset?" in terminal.wait_for(PROMPT)
        terminal.type("\n   \n")
        assert "msg=" not in terminal.wait_for(PROMPT) + terminal.wait_for(PROMPT)
        terminal.type("/exit\n")
        assert terminal.wait() == 0


def test_several_lines_between_quotes_are_one_turn(model: Path) -> None:
    with _talk(model, "--max-tokens", "2") as terminal:
        terminal.wait_for(PROMPT)
        terminal.type("one two three\n")
        one_line = _timings(terminal.wait_for(PROMPT))
        terminal.type("/reset\n")
        terminal.wait_for(PROMPT)
        terminal.type('"""one\n')
        terminal.wait_for("\n. ")
        terminal.type("two\n")
        terminal.wait_for("\n. ")
        terminal.type('three"""\n')
        several = _timings(terminal.wait_for(PROMPT))
        # A newline is a token as a space is, in this vocabulary.
        assert abs(sum(one_line.values()) - sum(several.values())) <= 2
        terminal.type('"""half\n')
        terminal.wait_for("\n. ")
        terminal.type("\x03")
        assert "msg=" not in terminal.wait_for(PROMPT)


def test_ctrl_c_at_the_prompt_says_how_to_leave_however_often(model: Path) -> None:
    with _talk(model) as terminal:
        terminal.wait_for(PROMPT)
        for _ in range(3):
            terminal.type("half a line\x03")
            assert "Ctrl-D leaves" in terminal.wait_for(PROMPT)
        terminal.type("\x04")
        assert terminal.wait() == 0


def test_ctrl_c_stops_an_answer_which_stays_in_the_history(tiny_model: Callable[..., Path]) -> None:
    model = tiny_model("llama", n_layers=8, context_length=32768)
    with _talk(model, "--context", "32k") as terminal:
        terminal.wait_for(PROMPT)
        terminal.type("hello there\n")
        terminal.wait_for("msg=prompt")
        terminal.wait_for("\n")
        while len(terminal.screen) < terminal.screen.index("msg=prompt") + 200:
            terminal._read()
        terminal.type("\x03")
        stopped = terminal.wait_for(PROMPT)
        assert "finish_reason=cancelled" in stopped
        n_before = sum(_timings(stopped).values())
        terminal.type("more\n")
        terminal.wait_for("msg=prompt")
        second = terminal.wait_for("\n")
        cached = int(re.findall(r"cache_n=(\d+)", second)[0])
        assert 12 < cached <= n_before  # the question, and more than its first tokens of answer
        terminal.type("\x03")
        terminal.wait_for(PROMPT)
        terminal.type("\x04")
        assert terminal.wait() == 0


def test_a_full_context_is_said_with_numbers_and_reset_helps(model: Path) -> None:
    with _talk(model, "--context", "48", "--max-tokens", "4") as terminal:
        terminal.wait_for(PROMPT)
        terminal.type("hello\n")
        terminal.wait_for(PROMPT)
        terminal.type("many words " * 10 + "\n")
        refused = terminal.wait_for(PROMPT)
        assert "the context holds 48" in refused and "/reset" in refused
        terminal.type("hi\n")  # what was said before is kept, and a short turn still fits
        assert _timings(terminal.wait_for(PROMPT))["cache_n"] > 0
        terminal.type("/reset\n")
        terminal.wait_for(PROMPT)
        terminal.type("hello\n")
        assert "msg=answer" in terminal.wait_for(PROMPT)


def test_answers_can_go_to_a_file_while_a_person_types(model: Path, tmp_path: Path) -> None:
    with (tmp_path / "answers").open("wb") as file, Terminal(
            ["run", str(model), *OPTIONS, "--max-tokens", "5"], stdout=file.fileno()) as terminal:
        terminal.wait_for("> ")
        terminal.type("hello\n")
        terminal.wait_for("msg=answer")
        terminal.wait_for("\n> ")
        terminal.type("\x04")
        assert terminal.wait() == 0
    assert (tmp_path / "answers").read_bytes()
    assert b"> " not in (tmp_path / "answers").read_bytes()[:2]


@pytest.mark.parametrize("while_answering", [False, True])
def test_sigterm_ends_a_conversation(while_answering: bool, tiny_model: Callable[..., Path]) -> None:
    with _talk(tiny_model("llama", n_layers=8, context_length=32768), "--context", "32k") as terminal:
        terminal.wait_for(PROMPT)
        if while_answering:
            terminal.type("hello\n")
            terminal.wait_for("msg=prompt")
        os.kill(terminal.process.pid, signal.SIGTERM)
        assert terminal.wait() == 143
        assert "Traceback" not in terminal.screen
