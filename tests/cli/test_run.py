from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import Outcome, Terminal

from edgert import Runtime
from edgert.errors import UsageError
from edgert.text.stream import MAX_STOPS

Command = Callable[..., Outcome]
Answer = Callable[..., dict[str, Any]]
CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
# One thread: two would wait for each other at every operation whenever another program runs.
QUICK = ("--threads", 1, "--layout", "plain", "--context", "1k", "--max-tokens", 12)


@pytest.fixture(scope="module")
def runtime(model: Path) -> Iterator[Runtime]:
    with Runtime.load(model, layout="plain", threads=1, context=1024) as runtime:
        yield runtime


@pytest.fixture
def answer(edgert: Command, model: Path) -> Answer:
    """The object that --json prints."""
    def ask(*words: object, **options: Any) -> dict[str, Any]:
        outcome = edgert("run", model, *words, *QUICK, "--json", **options)
        assert (outcome.status, outcome.err) == (0, "")
        assert outcome.out.count("\n") == 1
        answered = json.loads(outcome.out)
        assert isinstance(answered, dict)
        return answered

    return ask


def test_text_goes_to_standard_output_and_nothing_else(edgert: Command, model: Path, runtime: Runtime) -> None:
    outcome = edgert("run", model, "hello", "--raw", "--temp", 0, *QUICK)
    text = "".join(outcome.out)
    assert (outcome.status, outcome.err) == (0, "")
    assert text and text == json.loads(edgert("run", model, "hello", "--raw", "--temp", 0, *QUICK,
                                              "--json").out)["text"]


def test_json_tells_everything_about_an_answer(answer: Answer, runtime: Runtime) -> None:
    answered = answer("hello", "--raw", "--temp", 0)
    assert list(answered) == ["text", "prompt_token_ids", "token_ids", "finish_reason", "timings", "memory", "plan"]
    assert answered["prompt_token_ids"] == runtime.tokenize("hello")
    assert runtime.tokenizer is not None
    assert runtime.tokenizer.decode(answered["token_ids"]).decode(errors="replace") == answered["text"]
    assert answered["finish_reason"] in ("stop", "length") and len(answered["token_ids"]) <= 12
    assert answered["timings"].keys() >= {"prompt_n", "prompt_ms", "prompt_per_second", "predicted_n", "predicted_ms",
                                          "predicted_per_second", "time_to_first_token_ms"}
    assert answered["memory"].keys() >= {"budget_bytes", "peak_rss_bytes", "pinned_bytes", "streamed_bytes",
                                         "kv_resident_bytes", "kv_selected_tokens"}
    assert answered["plan"]["threads"] == 1


def test_the_template_is_used_unless_raw(answer: Answer, runtime: Runtime) -> None:
    as_user = runtime.render([{"role": "user", "content": "hello"}])
    told = runtime.render([{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}])
    assert answer("hello")["prompt_token_ids"] == as_user
    assert answer("hello", "--system", "be kind")["prompt_token_ids"] == told
    assert answer("hello", "--raw")["prompt_token_ids"] == runtime.tokenize("hello") != as_user


def test_prompts_pass_byte_for_byte(answer: Answer, runtime: Runtime, tmp_path: Path) -> None:
    data = b"caf\xc3\xa9\r\n \x00\xff<|im_end|>\n"
    (tmp_path / "prompt.txt").write_bytes(data)
    wanted = runtime.tokenize(data)
    assert answer("--raw", "--prompt-file", tmp_path / "prompt.txt")["prompt_token_ids"] == wanted
    assert answer("--raw", stdin=data)["prompt_token_ids"] == wanted
    assert answer("--raw", "--prompt-file", "-", stdin=data)["prompt_token_ids"] == wanted
    assert answer("--raw", "look:", stdin=data)["prompt_token_ids"] == runtime.tokenize(b"look:\n\n" + data)


def test_invalid_utf8_passes_the_template_too(answer: Answer, runtime: Runtime) -> None:
    assert answer(stdin=b"a\xffb")["prompt_token_ids"] == runtime.render([{"role": "user", "content": "a\udcffb"}])


def test_a_seed_makes_an_answer_that_can_be_had_again(answer: Answer) -> None:
    first, again, other = (answer("hello", "--temp", 2, "--top-k", 0, "--top-p", 1, "--min-p", 0, "--seed", seed)
                           for seed in (7, 7, 8))
    assert first["token_ids"] == again["token_ids"] != other["token_ids"]


def test_a_stop_string_ends_the_answer_before_it(answer: Answer) -> None:
    whole_text = answer("hello", "--raw", "--temp", 0)["text"]
    stop = whole_text[4:6]
    stopped = answer("hello", "--raw", "--temp", 0, "--stop", "never said", "--stop", stop)
    assert stopped["text"] == whole_text[:whole_text.index(stop)]
    assert stopped["finish_reason"] == "stop"


def test_the_trace_is_chromes_format(edgert: Command, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    assert edgert("run", model, "hello", "--trace", path, *QUICK).status == 0
    events = json.loads(path.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] != "C"]  # the others are counters
    assert {event["cat"] for event in spans} >= {"load", "compute"}
    for event in spans:
        assert event["ph"] == "X" and event["dur"] >= 0 and event.keys() >= {"name", "ts", "pid", "tid"}


def test_timings_are_told_on_standard_error_when_asked(edgert: Command, model: Path) -> None:
    quiet, verbose = (edgert("run", model, "hello", "--temp", 0, *QUICK, *more) for more in ((), ("-v",)))
    assert (quiet.err, verbose.out) == ("", quiet.out)
    assert "predicted_per_second=" in verbose.err.splitlines()[-1]
    logged = [json.loads(line) for line in edgert("run", model, "hello", "-v", "--log-json", *QUICK).err.splitlines()]
    assert logged[-1]["prompt_n"] > 0


def test_a_full_context_is_said(edgert: Command, model: Path) -> None:
    # The tiny model may end by itself: a ban is not an option of the command, so a prompt that leaves little room.
    outcome = edgert("run", model, "hello", "--raw", "--temp", 0, *QUICK, "--context", 8, "--json")
    assert json.loads(outcome.out)["finish_reason"] == "length"
    assert "context of 8 tokens is full" in outcome.err


def test_a_prompt_longer_than_the_context_is_refused_with_the_numbers(edgert: Command, model: Path) -> None:
    outcome = edgert("run", model, "hello " * 100, *QUICK, "--context", 64)
    assert outcome.status == 6
    assert "the context holds 64" in outcome.err


@pytest.mark.parametrize(("words", "said"), [
    (["hello", "--raw", "--system", "be kind"], "--system needs the chat template"),
    (["hello", "--prompt-file", "file"], "exclude each other"),
    ([""], "the prompt is empty"),
    (["hello", "--temp", "-1"], "temperature"),
    (["hello", "--top-p", "2"], "top_p"),
    (["hello", "--seed", "-1"], "seed"),
])
def test_senseless_options_are_refused_before_the_model_is_opened(words: list[str], said: str, edgert: Command) -> None:
    outcome = edgert("run", "nosuch", *words)
    assert (outcome.status, outcome.out) == (UsageError.exit_code, "")
    assert said in outcome.err


@pytest.mark.parametrize(("words", "status", "said"), [
    (["--batch", 100_000], 2, "--batch"),
    (["--threads", 100_000], 2, "--threads"),
    (["--context", 4], 2, "context of 4 tokens"),
    (["--context", 999_999_999_999], 2, "beyond every memory"),
    (["--memory", "1M"], 5, "smallest that works"),
    (["--models-dir", "/nonexistent"], 2, "/nonexistent"),
    (["--trace", "/nonexistent/trace"], 2, "--trace"),
    (["--stop", ""], 2, "stop string"),
    (["--stop", "x"] * (MAX_STOPS + 1), 2, "stop strings"),
])
def test_impossible_sizes_are_refused_in_words(words: list[object], status: int, said: str, edgert: Command,
                                               model: Path) -> None:
    outcome = edgert("run", model, "hello", "--layout", "plain", "--max-tokens", 2, *words)
    assert (outcome.status, outcome.out) == (status, "")
    assert said in outcome.err


def test_json_needs_a_prompt(edgert: Command, model: Path) -> None:
    outcome = edgert("run", model, "--json", terminal=True)
    assert outcome.status == 2 and "--json needs a prompt" in outcome.err


def test_a_model_without_a_template_continues_text_and_refuses_a_system_prompt(
        edgert: Command, model: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runtime, "has_template", False)
    outcome = edgert("run", model, "hello", "--json", *QUICK)
    assert json.loads(outcome.out)["prompt_token_ids"] == runtime.tokenize("hello")
    outcome = edgert("run", model, "hello", "--system", "be kind", *QUICK)
    assert outcome.status == 2 and "no chat template" in outcome.err


def test_a_model_without_a_vocabulary_says_so(edgert: Command, tiny_model: Callable[..., Path]) -> None:
    outcome = edgert("run", tiny_model("llama", vocabulary=False), "hello", *QUICK)
    assert outcome.status == 2 and "no vocabulary" in outcome.err


def test_what_a_model_says_commands_no_terminal(edgert: Command, model: Path) -> None:
    wild = ["hello", "--threads", "1", "--layout", "plain", "--max-tokens", "200", "--temp", "3", "--top-k", "0",
            "--top-p", "1", "--min-p", "0", "--seed"]
    # A random model says any byte; find a seed with which it says control characters.
    seed = next(seed for seed in map(str, range(1000))
                if CONTROLS.search(json.loads(edgert("run", model, *wild, seed, "--json").out)["text"]))
    with Terminal(["run", str(model), *wild, seed]) as terminal:
        assert terminal.wait() == 0
        assert "\N{REPLACEMENT CHARACTER}" in terminal.screen
        assert not CONTROLS.search(terminal.screen)
    assert CONTROLS.search(edgert("run", model, *wild, seed).out)  # and a pipe gets what was said


def test_a_real_model_answers(edgert: Command, real_model: Callable[[str], Path]) -> None:
    outcome = edgert("run", real_model("smollm2-135m"), "The capital of France is", "--raw", "--temp", 0, *QUICK)
    assert "Paris" in outcome.out
