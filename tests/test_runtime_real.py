"""The Runtime on a model that people use: SmolLM2-135M and the chat template that its file brings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgert import Runtime, SamplingParams
from edgert.text.template import Message

GREEDY = SamplingParams(temperature=0)
QUESTION: list[Message] = [{"role": "user", "content": "What is the capital of Italy? Answer in one word."}]
_PROMPT = ("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
           "<|im_start|>user\nWhat is the capital of Italy? Answer in one word.<|im_end|>\n<|im_start|>assistant\n")


@pytest.fixture(scope="module")
def runtime(real_model: Callable[[str], Path]) -> Iterator[Runtime]:
    with Runtime.load(real_model("smollm2-135m"), context=1024, threads=1, layout="plain") as loaded:
        yield loaded


def test_the_files_template_makes_the_prompt(runtime: Runtime) -> None:
    assert runtime.has_template
    assert runtime.render(QUESTION) == runtime.tokenize(_PROMPT)
    assert len(runtime.render(QUESTION)) < 50  # its markers are single tokens


def test_a_chat_answers_streams_and_ends_by_itself(runtime: Runtime) -> None:
    generation = runtime.chat(QUESTION, max_tokens=64, sampling=GREEDY)
    pieces = list(generation)
    assert "".join(piece.text for piece in pieces) == generation.text
    assert generation.finish_reason == "stop"
    assert "Rome" in generation.text
    assert "<|im_end|>" not in generation.text


def test_a_second_turn_computes_only_what_is_new(runtime: Runtime) -> None:
    first = runtime.chat(QUESTION, max_tokens=64, sampling=GREEDY)
    first.result()
    messages: list[Message] = [*QUESTION, {"role": "assistant", "content": first.text},
                               {"role": "user", "content": "And of France?"}]
    second = runtime.chat(messages, max_tokens=16, sampling=GREEDY)
    said = second.result()
    n_shared = len(first.prompt_token_ids) + len(first.token_ids)
    assert second.timings.cache_n >= n_shared - 1
    assert second.timings.prompt_n < 25
    runtime.generate("something else", max_tokens=1).result()
    fresh = runtime.chat(messages, max_tokens=16, sampling=GREEDY)
    fresh.result()
    assert fresh.timings.cache_n < 5
    # The cache was filled in other batches: as near as llama.cpp is to itself, so the beginning is the same.
    assert fresh.text[:8] == said[:8]


def test_a_story_has_the_same_words_for_the_same_seed(runtime: Runtime) -> None:
    def told(seed: int) -> str:
        return runtime.generate("Once upon a time", max_tokens=24, sampling=SamplingParams(seed=seed)).result()

    runtime.generate("x", max_tokens=1).result()
    first = told(3)
    runtime.generate("x", max_tokens=1).result()  # so that both begin with an empty cache
    assert told(3) == first
    assert told(4) != first
