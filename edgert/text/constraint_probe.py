"""Compiles a grammar in a process of its own: `python -m edgert.text.constraint_probe`, the grammar on standard input.

llguidance's compiler recurses and takes its time: a chain of references overflows the stack, patterns that must hold
at once take minutes. Here the process may end however it likes. Exit status 0 says that the grammar compiles in
bounded time, memory and depth and allows something to begin with; 3 comes with a reason on standard error.
"""

from __future__ import annotations

import resource
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from edgert.errors import GrammarError
from edgert.text.constraint_compile import check, compile_grammar

REFUSED_STATUS = 3  # Python itself uses 1 and 2
DEADLINE_S = 10  # grammars in use take milliseconds
_MAX_MEMORY_BYTES = 512 * 2**20  # beside what Python and llguidance have mapped
_STACK_BYTES = 2**20  # other threads have 8 MiB (Linux) or 16 (macOS), so what passes here passes there


def main() -> int:
    signal.alarm(DEADLINE_S + 1)  # in case the process that waits for this one is gone
    from llguidance import LLTokenizer

    grammar, tokenizer = sys.stdin.buffer.read().decode(), LLTokenizer("byte")
    _limit_memory()
    threading.stack_size(_STACK_BYTES)
    reasons = ["its compiler fails"]
    thread = threading.Thread(target=_try, args=(tokenizer, grammar, reasons))
    thread.start()
    thread.join()
    if reasons:
        print(*reasons, sep="\n", file=sys.stderr)
    return REFUSED_STATUS if reasons else 0


def _try(tokenizer: Any, grammar: str, reasons: list[str]) -> None:
    try:
        matcher = compile_grammar(tokenizer, grammar)
        matcher.compute_bitmask()
        check(matcher)
        reasons.clear()
    except GrammarError as error:
        reasons[:] = [error.message, error.next_step]


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is an answer here, not something to examine
    address_space = Path("/proc/self/statm")
    if address_space.exists():  # Linux
        mapped_bytes = int(address_space.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped_bytes + _MAX_MEMORY_BYTES,) * 2)


if __name__ == "__main__":
    sys.exit(main())
