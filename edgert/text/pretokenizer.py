"""Which of libllama's pre-tokenizers recurse once per character, and how their texts are split without a crash.

For some `tokenizer.ggml.pre` libllama splits text with std::regex, which recurses for every character that one match
takes (at most 340 bytes of stack each, measured): 40,000 exclamation marks end the process on an 8 MiB stack. Texts
with such runs go to a thread with a deep stack, and the length of a run is bounded.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable

from edgert.errors import OutOfMemory, UsageError

# Every pre-tokenizer whose patterns libllama (0.5) splits by loops of its own, or with bounded matches: texts of
# 100,000 letters, digits, spaces, signs and ideographs in one run passed on an 8 MiB stack. Others recurse.
ITERATIVE = frozenset({
    "a.x-4.0", "chameleon", "chatglm-bpe", "codeshell", "command-r", "dbrx", "deepseek-r1-qwen", "exaone",
    "exaone4", "f2llmv2", "falcon-h1", "falcon3", "gemma4", "gigachat", "glm4", "glm5", "gpt-2",
    "granite-docling", "granite-embed-multi-311m", "grok-2", "hunyuan", "jais", "jina-de", "jina-es",
    "jina-v1-en", "jina-v2-code", "jina-v2-de", "jina-v2-es", "jina-v5-nano", "kimi-k2", "kormo", "laguna",
    "lfm2", "llama-bpe", "llama-v3", "llama3", "megrez", "mellum", "mellum2", "midm-2.0", "minerva-7b",
    "modern-bert", "mpt", "olmo", "phi-2", "pixtral", "qwen2", "qwen35", "refact", "roberta-bpe", "sarvam-moe",
    "smaug-bpe", "smollm", "solar-open", "stablelm2", "starcoder", "trillion",
})
# `whitespace` fails an assertion on two spaces, `superbpe` takes minutes for a long number, and a match of
# `exaone-moe` has no bound at all, because it goes on across spaces. None is needed for a supported architecture.
REFUSED = frozenset({"whitespace", "superbpe", "exaone-moe"})

_EVERY_STACK_CHARS = 8192  # 2.8 MiB of stack at most: fits everywhere
MAX_RUN_CHARS = 2**16
# A match spans at most one run and the line breaks after it.
_DEEP_STACK_BYTES = 2 * MAX_RUN_CHARS * 512
_SPACES = re.compile(r"\s+")
_stack_size_lock = threading.Lock()


def longest_run(text: str) -> int:
    """The length of the longest stretch of `text` that is all whitespace, or has none."""
    longest_word = max(map(len, text.split()), default=0)
    return max(longest_word, max((match.end() - match.start() for match in _SPACES.finditer(text)), default=0))


def split_deeply(text: str, tokenize: Callable[[], list[int]]) -> list[int]:
    """`tokenize()` of `text`, run where it cannot run out of stack. Raises UsageError when no stack would do."""
    if len(text) <= _EVERY_STACK_CHARS or (run := longest_run(text)) <= _EVERY_STACK_CHARS // 2:
        return tokenize()
    if run > MAX_RUN_CHARS:
        raise UsageError(f"the text has {run} characters in a row without a space between them",
                         f"This model's tokenizer can split at most {MAX_RUN_CHARS}; break the text into lines.")
    tokens: list[list[int]] = []
    errors: list[BaseException] = []
    thread = threading.Thread(target=_keep, args=(tokenize, tokens, errors), name="edgert-tokenize")
    with _stack_size_lock:  # the size holds for all threads started meanwhile; more than they need does no harm
        before = threading.stack_size(_DEEP_STACK_BYTES)
        try:
            thread.start()
        except RuntimeError as error:
            raise OutOfMemory("a stack for splitting the text", _DEEP_STACK_BYTES) from error
        finally:
            threading.stack_size(before)
    thread.join()
    if errors:
        raise errors[0]
    return tokens[0]


def _keep(tokenize: Callable[[], list[int]], tokens: list[list[int]], errors: list[BaseException]) -> None:
    try:
        tokens.append(tokenize())
    except BaseException as error:  # raised again in the caller's thread
        errors.append(error)
