"""Writes rules in llguidance's variant of Lark: terminals are lexemes, everything else is syntax.

Rules get new names, so that none of the user's means anything to llguidance.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgert.text.constraint_gbnf import Alt, Chars, Node, Ref, Repeat, Rules, Seq, Text

# llguidance otherwise allows, where only one text can follow, nothing but that text's own tokens; the model may spell.
HEADER = '%llguidance {"no_forcing": true}\n'


def write_lark(syntax: Rules, terminals: Rules) -> str:
    """The text of a grammar that begins with `root`. A rule may be in both: syntax there, part of a lexeme here."""
    as_terminal = {name: f"T{i}" for i, name in enumerate(terminals)}
    as_syntax = as_terminal | {name: f"r{i}" for i, name in enumerate(syntax)}
    lines = [f"{as_syntax[name]}: {_write(node, as_syntax)}\n" for name, node in syntax.items()]
    lines += [f"{as_terminal[name]}: {_write(node, as_terminal)}\n" for name, node in terminals.items()]
    return f"{HEADER}start: {as_syntax['root']}\n{''.join(lines)}"


def _write(node: Node, names: Mapping[str, str]) -> str:
    match node:
        case Ref(name):
            return names[name]
        case Text(text):
            return f"/{''.join(map(_escaped, map(ord, text)))}/"
        case Chars(ranges):
            return f"/[{''.join(f'{_escaped(low)}-{_escaped(high)}' for low, high in ranges)}]/"
        case Seq(parts):
            return " ".join(_write(part, names) for part in parts) or '""'
        case Alt(options):
            return f"({' | '.join(_write(option, names) for option in options)})"
        case Repeat(inner, least, most):
            written = f"({_write(inner, names)})"
            match least, most:
                case (_, 0):
                    return '""'
                case (0, None):
                    return f"{written}*"
                case (1, None):
                    return f"{written}+"
                case (0, 1):
                    return f"{written}?"
            return f"{written}{{{least},{'' if most is None else most}}}"


def _escaped(code_point: int) -> str:
    return f"\\x{{{code_point:x}}}"
