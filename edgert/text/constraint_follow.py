"""Which characters may come after each lexeme of a grammar (FIRST and FOLLOW sets, as for an LL parser).

A lexeme is a rule taken as a whole, a literal, or one character; what the rules between them are made of is looked
at here, what a lexeme is made of in constraint_automaton.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgert.text.constraint_automaton import Alphabet, Automaton, build, union
from edgert.text.constraint_gbnf import Alt, Chars, Node, Ref, Repeat, Rules, Seq, Text

MAX_LEXEME_STATES = 256  # what is longer is matched in parts
_MAX_VISITS = 2_000_000  # of nodes of the grammar, 1 s; json.gbnf needs 400

Lexeme = Ref | Text | Chars


class TooMuchWork(Exception):
    """The grammar is beyond what can be analysed in a second."""


class Follow:
    """`after[lexeme]` is the mask of the characters that may come next, `automata` are the lexemes' own.

    `syntax` are the rules that are no lexemes, `automata_of_rules` belong to those that are. Raises TooMuchWork.
    """

    def __init__(self, syntax: Rules, automata_of_rules: Mapping[str, Automaton | None], alphabet: Alphabet) -> None:
        self._syntax, self._rule_automata, self._alphabet = syntax, automata_of_rules, alphabet
        self._begin: dict[str, tuple[int, bool]] = dict.fromkeys(syntax, (0, False))
        self._after_rule: dict[str, int] = dict.fromkeys(syntax, 0)
        self._changed, self._visits = True, 0
        self.after: dict[Lexeme, int] = {}
        self.automata: dict[Lexeme, Automaton] = {}
        while self._changed:
            self._changed = False
            for name, node in syntax.items():
                now = self._begins(node)
                self._changed |= now != self._begin[name]
                self._begin[name] = now
        self._changed = True
        while self._changed:
            self._changed = False
            for name, node in syntax.items():
                self._walk(node, self._after_rule[name])

    def _begins(self, node: Node) -> tuple[int, bool]:
        """The characters with which `node` may begin, and whether it may be empty."""
        self._count_visit()
        match node:
            case Ref(name) if name in self._syntax:
                return self._begin[name]
            case Ref() | Text() | Chars():
                automaton = self._automaton(node)
                return automaton.first_mask, automaton.nullable
            case Alt(options):
                begins = [self._begins(option) for option in options]
                return union(mask for mask, _ in begins), any(empty for _, empty in begins)
            case Repeat(inner, least, most):
                mask, empty = self._begins(inner)
                return (0, True) if most == 0 else (mask, empty or least == 0)
            case Seq(parts):
                mask = 0
                for part in parts:
                    first, empty = self._begins(part)
                    mask |= first
                    if not empty:
                        return mask, False
                return mask, True

    def _walk(self, node: Node, after: int) -> None:
        """Note what follows each part of `node`, given what follows the whole."""
        self._count_visit()
        match node:
            case Ref(name) if name in self._syntax:
                self._changed |= after | self._after_rule[name] != self._after_rule[name]
                self._after_rule[name] |= after
            case Ref() | Text() | Chars():
                self.after[node] = self.after.get(node, 0) | after
            case Alt(options):
                for option in options:
                    self._walk(option, after)
            case Repeat(inner, _, most) if most != 0:
                self._walk(inner, after if most == 1 else after | self._begins(inner)[0])
            case Seq(parts):
                for part in reversed(parts):
                    self._walk(part, after)
                    mask, empty = self._begins(part)
                    after = mask | after if empty else mask

    def _automaton(self, lexeme: Lexeme) -> Automaton:
        known = self.automata.get(lexeme)
        if known is None:
            known = build(lexeme, self._alphabet, self._rule_automata, MAX_LEXEME_STATES)
            assert known is not None  # longer ones are not taken for lexemes
            self.automata[lexeme] = known
        return known

    def _count_visit(self) -> None:
        self._visits += 1
        if self._visits > _MAX_VISITS:
            raise TooMuchWork
