"""What llguidance is given matches exactly the texts that the GBNF grammar matches, though it knows lexemes."""

from __future__ import annotations

import random
from itertools import product

import pytest
from grammar_oracles import matches
from llguidance import LLTokenizer

from edgert.errors import GrammarError
from edgert.text import constraint_follow, constraint_lexemes
from edgert.text.constraint_compile import compile_grammar
from edgert.text.constraint_gbnf import MAX_RULES, Rules, parse_gbnf
from edgert.text.constraint_lexemes import to_llguidance

BYTES = LLTokenizer("byte")
JSON = r'''
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9]+)? ws
ws     ::= | " " | "\n" [ \t]{0,20}
'''


def accepted(lark: str, text: str) -> bool:
    matcher = compile_grammar(BYTES, lark)
    return all(not matcher.is_stopped() and matcher.try_consume_tokens([byte]) == 1 for byte in text.encode()) \
        and matcher.is_accepting()


def language(lark: str, alphabet: str, longest: int) -> set[str]:
    """All texts up to `longest` characters that are accepted."""
    matcher, found = compile_grammar(BYTES, lark), set()

    def explore(text: str) -> None:
        if matcher.is_accepting():
            found.add(text)
        for char in alphabet if len(text) < longest and not matcher.is_stopped() else "":
            if matcher.try_consume_tokens([ord(char)]) == 1:
                explore(text + char)
                matcher.rollback(1)

    explore("")
    return found


def expected(rules: Rules, alphabet: str, longest: int) -> set[str]:
    return {text for length in range(longest + 1) for text in map("".join, product(alphabet, repeat=length))
            if matches(rules, text)}


@pytest.mark.parametrize("grammar", [
    'root ::= w " " w "a"\nw ::= [a-z]+',  # w would swallow the last a
    'root ::= "(" root ")" | w "a"\nw ::= [a ]+',
    'root ::= ("a" | "ab") ("b a" | " ") root?',  # the longer literal is not always the right one
    'root ::= "a" root "a" | "aa" | ws\nws ::= " "*',
    'root ::= ws ws "a" ws root?\nws ::= " "*',
    'root ::= x | y\nx ::= "a" x "b" | "ab"\ny ::= "a" y "bb" | "abb"',  # two lexemes for one text
    'root ::= root "a" | "b"',  # recursion on the left
    'root ::= x\nx ::= "a" x | ""\n',
    'root ::= ("b" "bb" | "bbb" | ("b" "b") "b") root?',  # one text in three forms
    'root ::= "a" (x | " ") "b"\nx ::= [^b ] root | "b"{0,2}',
    'root ::= w x? "a" | " " root " "\nw ::= "a"+\nx ::= "b"',  # what follows w, x being empty
    'root ::= w+ | " " root " "\nw ::= "a" | "aab"',  # w follows itself
    'root ::= w "ba" | " " root " "\nw ::= "a" "b"?',  # w may end before its last part
    'root ::= "b" "bb" | "bbb" | ("b" "b") "b"',  # one text in three forms, in one lexeme
    'root ::= x "b" | "abb" | " " root " "\nx ::= "a" y\ny ::= "b"',
])
def test_lexemes_do_not_change_what_matches(grammar: str) -> None:
    rules = parse_gbnf(grammar)
    assert language(to_llguidance(rules), "ab ", 5) == expected(rules, "ab ", 5)


def test_random_grammars_match_what_a_slow_recogniser_matches() -> None:
    rng = random.Random(4)
    n_recursive = 0
    for _ in range(100):
        grammar = random_grammar(rng)
        try:
            lark = to_llguidance(rules := parse_gbnf(grammar))
        except GrammarError:
            continue  # a rule without an end
        n_recursive += "start: r" in lark
        assert language(lark, "ab", 4) == expected(rules, "ab", 4), grammar
    assert n_recursive > 30


def random_grammar(rng: random.Random) -> str:
    names = ["root", "x", "y"][:rng.randint(1, 3)]

    def node(depth: int) -> str:
        kind = rng.random()
        if depth == 0 or kind < 0.3:
            literal = f'"{"".join(rng.choice("ab") for _ in range(rng.randint(1, 3)))}"'
            return rng.choice([literal, literal, rng.choice(["[a]", "[ab]", "[^a]", "."]), rng.choice(names)])
        parts = [node(depth - 1) for _ in range(rng.randint(1, 3))]
        if kind < 0.6:
            return f"({' '.join(parts)})"
        if kind < 0.85:
            return f"({' | '.join(parts)}{rng.choice(['', ' |'])})"
        return f"({parts[0]}){rng.choice(['*', '+', '?', '{2}', '{1,2}'])}"

    return "\n".join(f'{name} ::= {node(2)} | {rng.choice(["[a]", node(1)])}' for name in names)


def test_rules_of_json_stay_lexemes() -> None:
    lark = to_llguidance(parse_gbnf(JSON))
    assert lark.count("\nT") == 3  # ws, string and number; the mask is 50 times slower without


def test_a_grammar_beyond_analysis_is_matched_character_by_character(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, bound in ((constraint_lexemes, "_MAX_COMPARISONS"), (constraint_follow, "_MAX_VISITS")):
        with monkeypatch.context() as patch:
            patch.setattr(module, bound, 5)
            lark = to_llguidance(parse_gbnf(JSON))
        assert "\nT" not in lark
        assert accepted(lark, '{"a": [1, -2.5e3, "\\u00e9"]}\n')
        assert not accepted(lark, '{"a": 01}')


@pytest.mark.parametrize("grammar", [
    "root ::= root", 'root ::= "a" x | "b"\nx ::= "c" x', 'root ::= x\nx ::= y "a"\ny ::= x? x',
])
def test_a_rule_that_never_ends_is_refused(grammar: str) -> None:
    with pytest.raises(GrammarError, match="never comes to an end"):
        to_llguidance(parse_gbnf(grammar))


def test_rules_that_nothing_refers_to_do_not_count() -> None:
    assert accepted(to_llguidance(parse_gbnf('root ::= "a"\nx ::= x')), "a")


@pytest.mark.parametrize("grammar", [
    "\n".join(["root ::= r0", *(f"r{i} ::= r{i + 1} r{i + 1}" for i in range(MAX_RULES - 2)),
               f'r{MAX_RULES - 2} ::= "c"']),
    "\n".join(["root ::= r0", *(f'r{i} ::= "a" r{i + 1} | root' for i in range(MAX_RULES - 2)),
               f'r{MAX_RULES - 2} ::= "c"']),
    "root ::= " + "(" * 64 + '"a" root?' + ")*" * 64,
    'root ::= "x" (' + " | ".join(f'"a{i}"' for i in range(3000)) + ") root?",
    'root ::= "x" root "y" | "' + "a" * 100_000 + '"',
])
def test_the_analysis_of_hostile_grammars_comes_to_an_end(grammar: str) -> None:
    assert to_llguidance(parse_gbnf(grammar))
