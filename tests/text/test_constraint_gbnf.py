"""GBNF is read as llama.cpp reads it, and what is wrong with it is said with its place."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.errors import GrammarError
from edgert.text.constraint_gbnf import (
    MAX_GRAMMAR_BYTES,
    MAX_NESTING,
    MAX_REPEAT,
    MAX_RULES,
    Alt,
    Chars,
    Ref,
    Repeat,
    Seq,
    Text,
    parse_gbnf,
)


@pytest.mark.parametrize(("body", "node"), [
    ('"a\\n\\x41\\u00e9\\U0001f600\\"\\\\"', Text('a\nAé😀"\\')),
    ('""', Seq(())),
    ("", Seq(())),
    ("[a-cx]", Chars(((97, 99), (120, 120)))),
    ("[c-ea-d]", Chars(((97, 101),))),
    ("[\\]\\-a]", Chars(((45, 45), (93, 93), (97, 97)))),
    ("[a-]", Chars(((45, 45), (97, 97)))),
    ("[^\\n]", Chars(((0, 9), (11, 0xD7FF), (0xE000, 0x10FFFF)))),
    (".", Chars(((0, 0xD7FF), (0xE000, 0x10FFFF)))),
    ('"a"* "b"+ "c"?', Seq((Repeat(Text("a"), 0, None), Repeat(Text("b"), 1, None), Repeat(Text("c"), 0, 1)))),
    ('"a"{2} "b"{2,} "c"{ 0 , 3 }', Seq((Repeat(Text("a"), 2, 2), Repeat(Text("b"), 2, None),
                                         Repeat(Text("c"), 0, 3)))),
    ('"a" | "b" |\n "c"', Alt((Text("a"), Text("b"), Text("c")))),
    ('(\n"a"\n|\n) + # comment', Repeat(Alt((Text("a"), Seq(()))), 1, None)),
    ("root", Ref("root")),
])
def test_a_rule_is_read_as_written(body: str, node: object) -> None:
    assert parse_gbnf(f"# one\n\nroot  ::= {body}\n# end")["root"] == node


def test_rules_end_with_their_line_unless_in_parentheses() -> None:
    rules = parse_gbnf('root ::=\n  a-b_1 (\n  "x"\n  )\r\na-b_1 ::= "y" |\n\n  "z"')
    assert rules == {"root": Seq((Ref("a-b_1"), Text("x"))), "a-b_1": Alt((Text("y"), Text("z")))}


@pytest.mark.parametrize(("grammar", "line", "column", "problem"), [
    ("root ::= a", 1, 10, "'a' is not defined"),
    ('root = "a"', 1, 6, "'::=' belongs here"),
    ('root ::= "a', 1, 12, "ends inside quotes or brackets"),
    ("root ::= [a", 1, 12, "ends inside quotes or brackets"),
    ('root ::= "a\\', 1, 12, "no escape"),
    ('root ::= ("a"', 1, 14, "')' belongs here"),
    ('root ::= "a" )', 1, 14, "must end here"),
    ('root ::= "a"\n | "b"', 2, 2, "a rule's name belongs here"),
    ("root ::= [z-a]", 1, 11, "ends before it begins"),
    ("root ::= []", 1, 10, "no character is in this class"),
    ("root ::= [^\\x00-\\U0010ffff]", 1, 10, "no character is in this class"),
    ('root ::= "\\q"', 1, 11, "no escape \\q"),
    ('root ::= "\\x4"', 1, 13, "2 hexadecimal digits"),
    ('root ::= "\\ud800"', 1, 11, "0xd800 is not a character"),
    ('root ::= "\\U00110000"', 1, 11, "0x110000 is not a character"),
    ('root ::= "a"{3,2}', 1, 13, "at least 3 and at most 2"),
    (f'root ::= "a"{{{MAX_REPEAT + 1}}}', 1, 13, f"more than {MAX_REPEAT} repetitions"),
    ('root ::= "a"{x}', 1, 13, "write {n}"),
    ("root ::= *", 1, 10, "nothing to repeat"),
    ('root ::= "a"**', 1, 14, "nothing to repeat"),
    ('root ::= "a"\nroot ::= "b"', 2, 1, "twice"),
    ("root ::= <think>", 1, 10, "references to tokens"),
    ("root ::= " + "(" * (MAX_NESTING + 1), 1, 10 + MAX_NESTING, "nested more than"),
])
def test_an_error_names_its_place(grammar: str, line: int, column: int, problem: str) -> None:
    with pytest.raises(GrammarError) as caught:
        parse_gbnf(grammar)
    assert f"line {line}, column {column}: " in caught.value.message
    assert problem in caught.value.message
    assert caught.value.next_step
    assert caught.value.exit_code == 10


def test_a_grammar_needs_a_root() -> None:
    for grammar in ("", 'a ::= "b"', "# nothing"):
        with pytest.raises(GrammarError, match="no rule root"):
            parse_gbnf(grammar)


def test_size_and_number_of_rules_are_bounded() -> None:
    with pytest.raises(GrammarError, match="bytes"):
        parse_gbnf("#" * (MAX_GRAMMAR_BYTES + 1))
    with pytest.raises(GrammarError, match=f"more than {MAX_RULES} rules"):
        parse_gbnf("\n".join(f'r{i} ::= "a"' for i in range(MAX_RULES + 1)))


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet='ro t:=|"ab\\x4[]^-(){},1*+?.#\n', max_size=60))
def test_any_text_is_read_or_refused_with_a_grammar_error(text: str) -> None:
    try:
        parse_gbnf("root ::= " + text)
    except GrammarError as error:
        assert error.next_step
