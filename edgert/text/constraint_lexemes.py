"""Turns GBNF rules into a grammar for llguidance that accepts the same texts.

llguidance cuts a text into lexemes greedily: `w "a"` with `w ::= [a-z]+` never matches there, for w swallows the a.
GBNF knows no lexemes. So a rule or literal becomes one only where its end is unmistakable: no character that may
follow it could also continue it, or another lexeme with the same beginning. What remains is matched character by
character, which is exact and slow (JSON on a vocabulary of 152k: 5 ms a token instead of 0.1).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from itertools import product

from edgert.errors import GrammarError
from edgert.text.constraint_automaton import Alphabet, Automaton, build, characters, either
from edgert.text.constraint_follow import MAX_LEXEME_STATES, Follow, Lexeme, TooMuchWork
from edgert.text.constraint_gbnf import Alt, Chars, Node, Ref, Repeat, Rules, Seq, Text
from edgert.text.constraint_lark import write_lark
from edgert.text.constraint_simplify import simplify

_MAX_ROUNDS = 32  # each walks over the whole grammar; llama.cpp's examples need at most 3
_MAX_COMPARISONS = 1_000_000  # of states in a round, 0.5 s


def to_llguidance(rules: Rules) -> str:
    """The grammar in llguidance's variant of Lark. Raises GrammarError for a rule that no text can satisfy."""
    rules = _reachable(rules, ["root"])
    _check_productive(rules)
    regular = _bottom_up(rules, lambda node, done: all(name in done for name in _references(node)))
    rules = simplify(rules, regular)
    if "root" in regular:  # one regular expression for all: nothing to cut
        return write_lark({}, _reachable(rules, ["root"]))
    alphabet = Alphabet(rules)
    automata: dict[str, Automaton | None] = {}
    for name in regular:
        automata[name] = build(rules[name], alphabet, automata, MAX_LEXEME_STATES)
    try:
        split = _find_split(rules, automata, alphabet)
    except TooMuchWork:
        split = {*map(Ref, regular), *_literals(rules)}
    lexemes = _lexemes(automata, split)
    syntax = _syntax(rules, lexemes, split)
    used = [name for node in syntax.values() for name in _references(node) if name in lexemes]
    return write_lark(syntax, _reachable(rules, used))


def _references(node: Node) -> Iterator[str]:
    match node:
        case Ref(name):
            yield name
        case Seq(parts) | Alt(parts):
            for part in parts:
                yield from _references(part)
        case Repeat(inner):
            yield from _references(inner)


def _literals(rules: Rules) -> Iterator[Text]:
    pending = list(rules.values())
    while pending:
        match pending.pop():
            case Text() as text:
                yield text
            case Seq(parts) | Alt(parts):
                pending.extend(parts)
            case Repeat(inner):
                pending.append(inner)


def _reachable(rules: Rules, starts: Iterable[str]) -> Rules:
    found = {name: rules[name] for name in starts}
    pending = list(found)
    while pending:
        for name in _references(rules[pending.pop()]):
            if name not in found:
                found[name] = rules[name]
                pending.append(name)
    return found


def _bottom_up(rules: Rules, qualifies: Callable[[Node, Container[str]], bool]) -> list[str]:
    """Rules in an order in which each qualifies by those before it; those that never do are left out."""
    users: dict[str, list[str]] = {name: [] for name in rules}
    for name, node in rules.items():
        for used in set(_references(node)):
            users[used].append(name)
    done: dict[str, None] = {}
    pending = list(rules)
    while pending:
        name = pending.pop()
        if name not in done and qualifies(rules[name], done):
            done[name] = None
            pending.extend(users[name])
    return list(done)


def _check_productive(rules: Rules) -> None:
    """A rule that can only go on for ever would lead an answer into a dead end."""
    productive = set(_bottom_up(rules, _comes_to_an_end))
    endless = next((name for name in rules if name not in productive), None)
    if endless is not None:
        raise GrammarError(f"grammar: rule {endless!r} never comes to an end",
                           "Give it an alternative that does not refer back to it.")


def _comes_to_an_end(node: Node, productive: Container[str]) -> bool:
    match node:
        case Ref(name):
            return name in productive
        case Seq(parts):
            return all(_comes_to_an_end(part, productive) for part in parts)
        case Alt(options):
            return any(_comes_to_an_end(option, productive) for option in options)
        case Repeat(inner, least, _):
            return least == 0 or _comes_to_an_end(inner, productive)
        case Text() | Chars():
            return True


def _find_split(rules: Rules, automata: Mapping[str, Automaton | None], alphabet: Alphabet) -> set[Lexeme]:
    """The regular rules and literals that must not be lexemes. Raises TooMuchWork."""
    split: set[Lexeme] = {text for text in _literals(rules) if len(text.text) > MAX_LEXEME_STATES}
    for _ in range(_MAX_ROUNDS):
        follow = Follow(_syntax(rules, _lexemes(automata, split), split), automata, alphabet)
        unclear = _unclear(follow)
        if not unclear:
            return split
        split |= unclear
    raise TooMuchWork


def _lexemes(automata: Mapping[str, Automaton | None], split: set[Lexeme]) -> frozenset[str]:
    return frozenset(name for name, automaton in automata.items() if automaton is not None and Ref(name) not in split)


def _syntax(rules: Rules, lexemes: frozenset[str], split: set[Lexeme]) -> Rules:
    """The rules that are not lexemes, with the literals of `split` written out as characters."""
    def rewrite(node: Node) -> Node:
        match node:
            case Text(text):
                return Seq(tuple(characters(node))) if node in split or len(text) == 1 else node
            case Seq(parts):
                return Seq(tuple(map(rewrite, parts)))
            case Alt(options):
                return Alt(tuple(map(rewrite, options)))
            case Repeat(inner, least, most):
                return Repeat(rewrite(inner), least, most)
            case Ref() | Chars():
                return node

    return {name: rewrite(node) for name, node in rules.items() if name not in lexemes}


def _unclear(follow: Follow) -> set[Lexeme]:
    """Lexemes that could go on where another one, or the same, may end because of what may follow it."""
    together = either(list(follow.automata.values()))
    owner = [lexeme for lexeme, automaton in follow.automata.items() for _ in automaton.masks]
    unclear: set[Lexeme] = set()
    comparisons = 0
    for lexeme, one in follow.automata.items():
        after = follow.after.get(lexeme, 0)
        seen: set[tuple[int, int]] = set()  # a state of this lexeme, and one of any that has read the same
        pending = list(product(one.first, together.first))
        while pending:
            comparisons += 1
            if comparisons > _MAX_COMPARISONS:
                raise TooMuchWork
            state, other = pair = pending.pop()
            if pair in seen or not one.masks[state] & together.masks[other]:
                continue
            seen.add(pair)
            if state in one.last:
                unclear.update(owner[more] for more in together.after[other] if together.masks[more] & after)
            pending.extend(product(one.after[state], together.after[other]))
    return unclear
