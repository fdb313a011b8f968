"""Loads a vocabulary in a process of its own and tries it out: `python -m edgert.text.vocabulary_probe PATH`.

The process may crash, be killed for its memory or time, or exit with 3 and a reason on standard error; only exit
status 0 says that libllama can be trusted with the file. Knows what makes libllama end a process; keeps nothing.
"""

from __future__ import annotations

import resource
import signal
import sys
from pathlib import Path

from edgert.text.libllama import KIND_BPE, KIND_SPM, LEVEL_ERROR, Vocabulary, load_vocabulary, send_log_to

REFUSED_STATUS = 3  # Python itself uses 1 and 2
_DEADLINE_S = 30  # in case the process that waits for this one is gone
# A vocabulary of 262k tokens takes 40 MiB at its peak. The header reader admits headers of 256 MiB, of which libllama
# makes at most about six times as much.
_MAX_MEMORY_BYTES = 2 * 2**30
# Something of everything that pre-tokenizers tell apart.
_SAMPLE = ("Hello, WORLD's  42 cafés\t\t\n\n\r\n …“x”\u3000汉字かな한글 \U0001f600\u200d\u0301 "
           "<|im_end|></s> 1234567 !!!").encode()


def main(path: str) -> int:
    signal.alarm(_DEADLINE_S)  # the default action ends the process, also inside libllama
    _report_first_error()
    _limit_memory()
    try:
        vocabulary = load_vocabulary(Path(path))
        problem = find_problem(vocabulary) if vocabulary is not None else ""
    except MemoryError:
        vocabulary, problem = None, f"it needs more than {_MAX_MEMORY_BYTES >> 20} MiB"
    if problem:
        print(problem, file=sys.stderr)
    return REFUSED_STATUS if problem or vocabulary is None else 0


def find_problem(vocabulary: Vocabulary) -> str:
    """What is wrong with `vocabulary`, or an empty text. May end the process instead."""
    if vocabulary.kind not in (KIND_BPE, KIND_SPM):
        return "it is neither SentencePiece nor byte-level BPE"
    for token_id, adds, name in ((vocabulary.bos_id, vocabulary.adds_bos, "begin"),
                                 (vocabulary.eos_id, vocabulary.adds_eos, "end")):
        if adds and not 0 <= token_id < vocabulary.n_tokens:
            return f"it asks for a {name} token and has none"
    if vocabulary.kind == KIND_SPM and (missing := _missing_bytes(vocabulary)):
        return f"no token stands for byte {missing[0]:#04x}"
    every_byte = bytes(range(256)).decode("latin-1").encode()
    for text in (b"", _SAMPLE, every_byte, _SAMPLE * 20):
        for flags in ((False, False), (True, True)):
            token_ids = vocabulary.tokenize(text, add_special=flags[0], parse_special=flags[1])
            if not all(0 <= token_id < vocabulary.n_tokens for token_id in token_ids):
                return "it gives ids that it does not have"
    return ""


def _missing_bytes(vocabulary: Vocabulary) -> list[int]:
    """Bytes for which libllama would throw, uncaught, when a text has them outside of all tokens."""
    texts = {vocabulary.text(token_id) for token_id in range(vocabulary.n_tokens)}
    return [byte for byte in range(256) if b"<0x%02X>" % byte not in texts and bytes([byte]) not in texts]


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is an answer here, not something to examine
    address_space = Path("/proc/self/statm")
    if address_space.exists():  # Linux; the libraries are mapped by now, however large those for a GPU are
        mapped_bytes = int(address_space.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped_bytes + _MAX_MEMORY_BYTES,) * 2)


def _report_first_error() -> None:
    reported: list[str] = []  # what follows the first says less

    def report(level: int, text: str) -> None:
        if level == LEVEL_ERROR and not reported:
            reported.append(text)
            print(text[:1000].rstrip(), file=sys.stderr, flush=True)

    send_log_to(report)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
