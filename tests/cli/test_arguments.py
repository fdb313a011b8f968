from __future__ import annotations

import argparse

import pytest

from apps.cli.arguments import did_you_mean, token_count, whole
from apps.cli.main import build_parser
from edgert.errors import UsageError


@pytest.mark.parametrize(("text", "tokens"), [("8192", 8192), ("8k", 8192), ("1K", 1024), ("0", 0)])
def test_a_context_is_a_number_or_thousands_of_1024(text: str, tokens: int) -> None:
    assert token_count(text) == tokens


@pytest.mark.parametrize("text", ["", "8q", "-1", "1.5k", "8kk", "9" * 5000, "٣"])
def test_other_contexts_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        token_count(text)


@pytest.mark.parametrize("text", ["0", "-1", "1.0", "", "2147483648", "9" * 5000, "²"])
def test_counts_are_whole_and_positive(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        whole(text)
    assert whole("2147483647") == 2**31 - 1


@pytest.mark.parametrize("words", [
    ["run", "m", "hello", "--temp", "0"],
    ["run", "m", "--temp", "0", "hello"],
    ["run", "--temp", "0", "m", "hello"],
    ["run", "m", "--temp", "0", "--", "hello"],
    ["run", "m", "--raw", "hello", "--temp=0"],
])
def test_model_and_prompt_may_stand_anywhere_among_options(words: list[str]) -> None:
    args = build_parser().parse(words)
    assert (args.model, args.prompt, args.temp) == ("m", "hello", 0)


def test_a_prompt_may_begin_with_a_dash() -> None:
    assert build_parser().parse(["run", "m", "- one - two"]).prompt == "- one - two"
    assert build_parser().parse(["run", "m", "--", "--help"]).prompt == "--help"


def test_verbose_counts_before_and_after_the_command() -> None:
    assert build_parser().parse(["-v", "run", "m"]).verbose == 1
    assert build_parser().parse(["run", "m", "-vv"]).verbose == 2
    assert build_parser().parse(["run", "m"]).verbose == 0
    assert build_parser().parse(["--log-json", "bench", "m"]).log_json


@pytest.mark.parametrize(("words", "said"), [
    (["rnu", "m"], "no command 'rnu'\nDid you mean run?"),
    (["run", "m", "--max-token", "3"], "no option --max-token\nDid you mean --max-tokens?"),
    (["run", "--tmep", "0", "m", "hi"], "no option --tmep\nDid you mean --temp?"),
    (["run", "--hepl"], "no option --hepl\nDid you mean --help?"),
    (["run", "m", "--qqqq=3"], "no option --qqqq\nSee `edgert run --help`"),
    (["run", "m", "why", "not"], "too many: 'not'\nPut a prompt of several words in quotes"),
    (["run"], "required: MODEL"),
    (["run", "m", "--temp", "hot"], "--temp: invalid float value: 'hot'"),
    (["run", "m", "--temp"], "--temp: expected one argument"),
    (["run", "m", "--kv-type", "f8"], "--kv-type: invalid choice: 'f8'"),
    (["run", "m", "--memory", "much"], "'much' is not a size"),
    (["run", "m", "-x"], "no option -x"),
])
def test_slips_are_named_with_what_was_probably_meant(words: list[str], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        build_parser().parse(words)
    assert said in str(caught.value)


def test_nothing_is_suggested_where_nothing_is_near() -> None:
    assert did_you_mean("xyzzy" * 1000, ["run", "list"]) == ""
