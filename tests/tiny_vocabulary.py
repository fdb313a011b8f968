"""A vocabulary small enough to read: byte-level BPE with 256 byte tokens, some merges and the ChatML markers.

Any text can be written with it, as with the vocabularies of GPT-2 and its heirs whose scheme it follows.
"""

from __future__ import annotations

from itertools import product

from tiny_gguf import Array, MetaValue

from edgert.gguf.values import ValueType

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END)
CHATML_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_NORMAL, _CONTROL = 1, 3  # llama.cpp's token types
# In merge order. A leading space is "Ġ" in the byte alphabet.
_MERGES = ("t h", "th e", "Ġ the", "Ġ a", "Ġ o", "i n", "Ġ s", "e r", "o n", "r e", "Ġ w", "in g", "a n", "an d",
           "Ġ and", "l l", "o u", "Ġ b", "Ġ c", "e s", "Ġ i", "i s", "Ġ to", "t o", "o r")


def byte_alphabet() -> list[str]:
    """The 256 visible characters that stand for bytes: printable ones for themselves, the others from U+0100 on."""
    visible = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    return [chr(byte) if byte in visible else chr(next(hidden)) for byte in range(256)]


def _merges(count: int) -> list[str]:
    chosen: list[str] = []
    known = set(byte_alphabet())
    systematic = (f"{first} {second}" for first, second in product("etaoinshrdluĠcmfwypvbgkqjxz", repeat=2))
    pending = list(_MERGES)
    while len(chosen) < count:
        # A merge may be used once both its halves are tokens; those listed too early come round again.
        merge = next((one for one in pending if set(one.split(" ")) <= known), None)
        if merge is None:
            merge = next(systematic)
        else:
            pending.remove(merge)
        if (token := merge.replace(" ", "")) not in known:
            known.add(token)
            chosen.append(merge)
    return chosen


def vocabulary_keys(size: int) -> dict[str, MetaValue]:
    """The tokenizer's keys for a vocabulary of `size` tokens (at least 259), the three special ones last."""
    merges = _merges(size - 256 - len(SPECIAL_TOKENS))
    tokens = [*byte_alphabet(), *(one.replace(" ", "") for one in merges), *SPECIAL_TOKENS]
    first_special = len(tokens) - len(SPECIAL_TOKENS)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [_NORMAL] * first_special + [_CONTROL] * len(SPECIAL_TOKENS),
        "tokenizer.ggml.merges": Array(ValueType.STRING, merges),  # typed, for it may be empty
        "tokenizer.ggml.bos_token_id": first_special,
        "tokenizer.ggml.padding_token_id": first_special,
        "tokenizer.ggml.eos_token_id": first_special + 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHATML_TEMPLATE,
    }


def no_vocabulary_keys(architecture: str, size: int) -> dict[str, MetaValue]:
    """The keys of a model without a tokenizer, which is driven with token ids only."""
    return {"tokenizer.ggml.model": "no_vocab", f"{architecture}.vocab_size": size}
