"""Sets of characters as bit masks, and the position automaton of a piece of a grammar (Glushkov 1961).

Knows which characters may begin, continue and end a match. Takes bounded repetition for unbounded, so that an
automaton has as many states as the grammar has characters; what it says may follow is therefore never too little.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from edgert.text.constraint_gbnf import Alt, Chars, Node, Ref, Repeat, Rules, Seq, Text


class Alphabet:
    """All code points, cut where any class of the grammar begins or ends; bit i of a mask is the i-th part."""

    def __init__(self, rules: Rules) -> None:
        cuts: set[int] = set()
        for chars in _all_chars(rules.values()):
            for low, high in chars.ranges:
                cuts.update((low, high + 1))
        self._cuts = sorted(cuts)
        self._masks: dict[Chars, int] = {}

    def mask(self, chars: Chars) -> int:
        known = self._masks.get(chars)
        if known is None:
            known = 0
            for low, high in chars.ranges:
                first, end = bisect_left(self._cuts, low), bisect_left(self._cuts, high + 1)
                known |= (1 << end) - (1 << first)
            self._masks[chars] = known
        return known


def characters(text: Text) -> list[Chars]:
    return [Chars(((ord(char), ord(char)),)) for char in text.text]


def _all_chars(nodes: Iterable[Node]) -> Iterable[Chars]:
    pending = list(nodes)
    while pending:
        match pending.pop():
            case Chars() as chars:
                yield chars
            case Text() as text:
                yield from characters(text)
            case Seq(parts) | Alt(parts):
                pending.extend(parts)
            case Repeat(node):
                pending.append(node)


@dataclass(frozen=True, slots=True)
class Automaton:
    """State i reads a character of `masks[i]`; `after[i]` are the states that may come next, `first` those at the
    beginning; a match may end after the states of `last`, or is empty where `nullable`."""

    masks: tuple[int, ...]
    after: tuple[frozenset[int], ...]
    first: frozenset[int]
    last: frozenset[int]
    nullable: bool

    @property
    def first_mask(self) -> int:
        return union(self.masks[state] for state in self.first)


_EMPTY = Automaton((), (), frozenset(), frozenset(), True)


def union(masks: Iterable[int]) -> int:
    result = 0
    for mask in masks:
        result |= mask
    return result


def build(node: Node, alphabet: Alphabet, rules: Mapping[str, Automaton | None], max_states: int) -> Automaton | None:
    """The automaton of `node`, given those of the rules it refers to; None where it had more than `max_states`."""
    match node:
        case Chars():
            return _reads(alphabet.mask(node))
        case Text(text):
            return None if len(text) > max_states else _join([_reads(alphabet.mask(one)) for one in characters(node)])
        case Ref(name):
            return rules[name]
        case Repeat(inner, least, most):
            built = build(inner, alphabet, rules, max_states)
            return None if built is None else _repeated(built, least, most)
        case Seq(parts) | Alt(parts):
            automata: list[Automaton] = []
            for part in parts:
                built = build(part, alphabet, rules, max_states)
                if built is None:
                    return None
                automata.append(built)
            if sum(len(one.masks) for one in automata) > max_states:
                return None
            return _join(automata) if isinstance(node, Seq) else either(automata)


def _reads(mask: int) -> Automaton:
    only = frozenset((0,))
    return Automaton((mask,), (frozenset(),), only, only, False)


def _repeated(one: Automaton, least: int, most: int | None) -> Automaton:
    nullable = one.nullable or least == 0
    if most == 0:
        return _EMPTY
    if most == 1:
        return Automaton(one.masks, one.after, one.first, one.last, nullable)
    after = tuple(states | one.first if state in one.last else states for state, states in enumerate(one.after))
    return Automaton(one.masks, after, one.first, one.last, nullable)


def _join(parts: list[Automaton]) -> Automaton:
    """One after the other."""
    masks: list[int] = []
    after: list[frozenset[int]] = []
    first: frozenset[int] = frozenset()
    last: frozenset[int] = frozenset()
    nullable = True
    for part in parts:
        moved = _moved(part, len(masks))
        for state in last:
            after[state] |= moved.first
        masks += moved.masks
        after += moved.after
        first = first | moved.first if nullable else first
        last = last | moved.last if part.nullable else moved.last
        nullable = nullable and part.nullable
    return Automaton(tuple(masks), tuple(after), first, last, nullable)


def either(parts: list[Automaton]) -> Automaton:
    """One of them; the states keep their order."""
    masks: list[int] = []
    after: list[frozenset[int]] = []
    first: set[int] = set()
    last: set[int] = set()
    for part in parts:
        moved = _moved(part, len(masks))
        masks += moved.masks
        after += moved.after
        first |= moved.first
        last |= moved.last
    return Automaton(tuple(masks), tuple(after), frozenset(first), frozenset(last),
                     any(part.nullable for part in parts))


def _moved(one: Automaton, offset: int) -> Automaton:
    def move(states: frozenset[int]) -> frozenset[int]:
        return frozenset(state + offset for state in states)

    return Automaton(one.masks, tuple(map(move, one.after)), move(one.first), move(one.last), one.nullable)
