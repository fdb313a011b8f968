"""The Runtime as a program uses it: answers, reuse of what was computed, and requests that make no sense."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import write_tiny_model
from tiny_vocabulary import vocabulary_keys

from edgert import Runtime, SamplingParams
from edgert.architectures.base import MAX_CONTEXT
from edgert.errors import (
    BudgetTooSmall,
    ContextOverflow,
    KVStoreError,
    ModelFileError,
    ModelNotFound,
    TemplateError,
    UnsupportedArchitecture,
    UsageError,
)
from edgert.memory.profile_store import ProfileStore
from edgert.paths import Paths
from edgert.planning import EngineOptions, Planning

TinyModel = Callable[..., Path]
GREEDY = SamplingParams(temperature=0)
VOCAB_SIZE = 320
TEXT = "the way of one request, and the way of another"


def load(path: Path, **options: Any) -> Runtime:
    return Runtime.load(path, **{"threads": 1, "layout": "plain", "context": 512, **options})


@pytest.fixture
def runtime(tiny_model: TinyModel) -> Iterator[Runtime]:
    # F32: batches of another size then give the same tokens, which 8-bit activations do not promise.
    with load(tiny_model("llama", quantisation="F32")) as loaded:
        yield loaded


def some_ids(n: int, seed: int = 0) -> list[int]:
    return [int(token_id) for token_id in np.random.default_rng(seed).integers(0, 256, n)]


# -- answers ---------------------------------------------------------------------------------------------------------
def test_a_text_is_continued(runtime: Runtime) -> None:
    generation = runtime.generate(TEXT, max_tokens=20, sampling=GREEDY)
    pieces = list(generation)
    assert "".join(piece.text for piece in pieces) == generation.text
    assert generation.prompt_token_ids == runtime.tokenize(TEXT)
    assert len(generation.token_ids) == 20
    assert generation.finish_reason == "length"
    assert runtime.tokenizer is not None
    assert runtime.tokenizer.decode(generation.token_ids).decode(errors="replace") == generation.text


def test_ids_bytes_and_text_are_the_same_prompt(runtime: Runtime) -> None:
    ids = runtime.tokenize(TEXT)
    prompts = (TEXT, TEXT.encode(), ids, tuple(ids), np.array(ids))
    assert len({tuple(_fresh(runtime, prompt)) for prompt in prompts}) == 1
    json.dumps(runtime.generate(np.array(ids), max_tokens=1).prompt_token_ids)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        runtime.generate([1.5])  # type: ignore[list-item]


def test_a_model_without_a_vocabulary_takes_ids_only(tiny_model: TinyModel) -> None:
    with load(tiny_model("llama", vocabulary=False)) as runtime:
        generation = runtime.generate(some_ids(10), max_tokens=5, sampling=GREEDY, stop=["x"])
        assert generation.result() == ""
        assert len(generation.token_ids) == 5
        assert not runtime.has_template
        for wrong in (lambda: runtime.generate("text"), lambda: runtime.tokenize("text")):
            with pytest.raises(UsageError, match="no vocabulary") as raised:
                wrong()
            assert "ids" in raised.value.next_step
        with pytest.raises(TemplateError):
            runtime.chat([{"role": "user", "content": "Hi"}])


def test_every_token_of_an_answer_is_the_likeliest(runtime: Runtime) -> None:
    """Against the engine itself, in one pass over prompt and answer."""
    prompt = some_ids(30)
    answer = _fresh(runtime, prompt, max_tokens=16)
    runtime.engine.kv.truncate(0)
    logits = runtime.engine.step(np.array(prompt + answer, np.int32), n_outputs=17)
    assert logits.argmax(-1)[:-1].tolist() == answer


def test_an_end_token_stops(runtime: Runtime) -> None:
    assert runtime.tokenizer is not None
    end = runtime.tokenizer.eos_id
    assert end is not None
    generation = runtime.generate(TEXT, sampling=SamplingParams(temperature=0, logit_bias={end: 1000.0}))
    assert generation.result() == ""
    assert (generation.finish_reason, generation.token_ids) == ("stop", [])


def test_a_stop_string_stops_before_itself(runtime: Runtime) -> None:
    whole = runtime.generate(TEXT, max_tokens=30, sampling=GREEDY).result()
    stop = whole[8:11]
    generation = runtime.generate(TEXT, max_tokens=30, sampling=GREEDY, stop=[stop])
    assert "".join(piece.text for piece in generation) == generation.text == whole[:whole.index(stop)]
    assert generation.finish_reason == "stop"


def test_an_answer_without_a_limit_ends_with_the_context(tiny_model: TinyModel) -> None:
    with load(tiny_model("llama"), context=64) as runtime:
        generation = runtime.generate(some_ids(40), sampling=GREEDY)
        generation.result()
        assert generation.finish_reason == "length"
        assert len(generation.prompt_token_ids) + len(generation.token_ids) == 64 == runtime.context_length


def test_the_same_seed_says_the_same(runtime: Runtime) -> None:
    def said(seed: int) -> list[int]:
        generation = runtime.generate(TEXT, max_tokens=16, sampling=SamplingParams(temperature=1.0, seed=seed))
        generation.result()
        return generation.token_ids

    assert said(7) == said(7)
    assert len({tuple(said(seed)) for seed in range(4)}) == 4


# -- what was computed before ------------------------------------------------------------------------------------------
def _fresh(runtime: Runtime, prompt: Any, *, max_tokens: int = 12) -> list[int]:
    """The greedy answer, with nothing in the cache."""
    first = runtime.generate(prompt).prompt_token_ids[0]
    runtime.generate([(first + 1) % VOCAB_SIZE], max_tokens=1).result()
    generation = runtime.generate(prompt, max_tokens=max_tokens, sampling=GREEDY)
    generation.result()
    assert generation.timings.cache_n == 0
    return generation.token_ids


def test_a_shared_beginning_is_not_computed_again(runtime: Runtime) -> None:
    first, second = some_ids(100), [*some_ids(80), *some_ids(50, seed=1)]
    expected = _fresh(runtime, second)
    _fresh(runtime, first)
    generation = runtime.generate(second, max_tokens=12, sampling=GREEDY)
    generation.result()
    assert (generation.timings.cache_n, generation.timings.prompt_n) == (80, 50)
    assert generation.token_ids == expected


def test_a_conversation_computes_only_its_new_turn(runtime: Runtime) -> None:
    first = runtime.generate(some_ids(60), max_tokens=10, sampling=GREEDY)
    first.result()
    prompt = [*first.prompt_token_ids, *first.token_ids, *some_ids(20, seed=1)]
    second = runtime.generate(prompt, max_tokens=12, sampling=GREEDY)
    second.result()
    assert second.timings.cache_n == 60 + 10 - 1  # the last token was said, and not computed
    assert second.timings.prompt_n == 21
    assert second.token_ids == _fresh(runtime, prompt)


def test_the_same_prompt_again_computes_its_last_token(runtime: Runtime) -> None:
    prompt = some_ids(50)
    expected = _fresh(runtime, prompt)
    for _ in range(2):
        again = runtime.generate(prompt, max_tokens=12, sampling=GREEDY)
        again.result()
        assert (again.timings.cache_n, again.timings.prompt_n) == (49, 1)
        assert again.token_ids == expected
    shorter = runtime.generate(prompt[:20], max_tokens=12, sampling=GREEDY)
    shorter.result()
    assert (shorter.timings.cache_n, shorter.timings.prompt_n) == (19, 1)
    assert shorter.token_ids == _fresh(runtime, prompt[:20])


def test_a_refused_request_leaves_what_was_computed(runtime: Runtime) -> None:
    prompt = some_ids(50)
    expected = _fresh(runtime, prompt)
    for wrong in ([], [VOCAB_SIZE], some_ids(600)):
        with pytest.raises((UsageError, ContextOverflow)):
            runtime.generate(wrong)
    again = runtime.generate(prompt, max_tokens=12, sampling=GREEDY)
    again.result()
    assert again.timings.cache_n == 49
    assert again.token_ids == expected


# -- requests that end early -------------------------------------------------------------------------------------------
def test_an_abandoned_answer_makes_room_for_the_next(runtime: Runtime) -> None:
    prompt = some_ids(50)
    expected = _fresh(runtime, prompt)
    abandoned = runtime.generate(some_ids(30, seed=2), sampling=GREEDY)
    for _ in abandoned:
        break
    never_begun = runtime.generate(some_ids(30, seed=3), sampling=GREEDY)
    held = iter(runtime.generate(some_ids(30, seed=4), sampling=GREEDY))
    next(held)
    assert _fresh(runtime, prompt) == expected
    assert abandoned.finish_reason == never_begun.finish_reason == "cancelled"
    assert list(abandoned) == list(never_begun) == list(held) == []
    again = runtime.generate(prompt, max_tokens=12, sampling=GREEDY)
    assert again.result() is not None
    assert again.token_ids == expected


def test_a_prefill_is_cancelled_from_another_thread_and_keeps_whole_batches(tiny_model: TinyModel) -> None:
    prompt = some_ids(450)
    with load(tiny_model("llama", quantisation="F32"), batch=4) as runtime:
        expected = _fresh(runtime, prompt)
        runtime.generate([1], max_tokens=1).result()
        generation = runtime.generate(prompt, sampling=GREEDY)

        def cancel_on_the_way() -> None:
            while runtime.engine.kv.length < 20:
                time.sleep(0.001)
            generation.cancel()

        canceller = threading.Thread(target=cancel_on_the_way)
        canceller.start()
        assert list(generation) == []
        canceller.join()
        assert (generation.finish_reason, generation.text, generation.token_ids) == ("cancelled", "", [])
        again = runtime.generate(prompt, max_tokens=12, sampling=GREEDY)
        assert 20 <= again.timings.cache_n < 450
        assert (again.timings.cache_n) % 4 == 0
        assert again.timings.cache_n + again.timings.prompt_n == 450
        again.result()
        assert again.token_ids == expected


def test_cancelling_an_old_answer_does_not_stop_a_new_one(runtime: Runtime) -> None:
    old = runtime.generate(some_ids(10), sampling=GREEDY)
    new = runtime.generate(some_ids(20), max_tokens=10, sampling=GREEDY)
    pieces = iter(new)
    next(pieces)
    old.cancel()
    assert len(list(pieces)) >= 9
    assert new.finish_reason == "length"


def test_a_second_request_while_one_is_computed_is_refused(runtime: Runtime) -> None:
    """From another thread; the first one goes on, and closing the runtime under it is refused too."""
    first = runtime.generate(some_ids(400), max_tokens=3, sampling=GREEDY)
    refused = []
    step = runtime.engine.step

    def step_while_another_asks(*arguments: Any) -> Any:
        def ask() -> None:
            for wrong in (lambda: runtime.generate(some_ids(5)), runtime.close):
                try:
                    wrong()
                except UsageError as error:
                    refused.append(str(error))

        other = threading.Thread(target=ask)
        other.start()
        other.join(20)
        return step(*arguments)

    runtime.engine.step = step_while_another_asks  # type: ignore[assignment, method-assign]
    first.result()
    assert len(first.token_ids) == 3
    assert len(refused) == 2 * 3
    assert "another thread" in refused[0]


# -- requests that make no sense ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("prompt", ["", b"", [], ()])
def test_an_empty_prompt_is_refused(prompt: Any, runtime: Runtime) -> None:
    with pytest.raises(UsageError, match="empty") as raised:
        runtime.generate(prompt)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE, 2**31, 2**70])
def test_ids_beyond_the_vocabulary_are_refused(token_id: int, runtime: Runtime) -> None:
    with pytest.raises(UsageError, match="not in the vocabulary") as raised:
        runtime.generate([1, token_id, 2])
    assert str(VOCAB_SIZE - 1) in raised.value.next_step


@pytest.mark.parametrize("max_tokens", [0, -1])
def test_fewer_tokens_than_one_are_refused(max_tokens: int, runtime: Runtime) -> None:
    with pytest.raises(UsageError, match="max_tokens"):
        runtime.generate("a", max_tokens=max_tokens)


@pytest.mark.parametrize("n_tokens", [64, 65, 1000])
def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused_with_the_numbers(n_tokens: int,
                                                                                tiny_model: TinyModel) -> None:
    with load(tiny_model("llama"), context=64) as runtime:
        with pytest.raises(ContextOverflow) as raised:
            runtime.generate(some_ids(n_tokens))
        assert (raised.value.n_tokens, raised.value.context_length) == (n_tokens, 64)
        assert raised.value.trained_length == 2048
        assert raised.value.exit_code == 6
        assert runtime.generate(some_ids(63), sampling=GREEDY).result() is not None


# -- chat --------------------------------------------------------------------------------------------------------------
def test_a_conversation_goes_through_the_files_template(runtime: Runtime) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert runtime.render(messages) == runtime.tokenize(expected)  # type: ignore[arg-type]
    generation = runtime.chat(messages, max_tokens=3, sampling=GREEDY)  # type: ignore[arg-type]
    generation.result()
    assert generation.prompt_token_ids == runtime.tokenize(expected)


def test_a_begin_token_is_not_added_to_one_that_the_template_wrote(tmp_path: Path) -> None:
    template = "{{ bos_token }}{{ messages[0]['content'] }}"
    for index, (adds_bos, source) in enumerate([(True, template), (False, template), (True, template[15:])]):
        path = write_tiny_model(tmp_path / f"{index}.gguf", "llama", metadata={
            "tokenizer.ggml.add_bos_token": adds_bos, "tokenizer.chat_template": source})
        with load(path) as runtime:
            assert runtime.tokenizer is not None
            ids = runtime.render([{"role": "user", "content": "Hi"}])
            assert ids[0] == runtime.tokenizer.bos_id
            assert ids.count(ids[0]) == 1


@pytest.mark.parametrize("template", ["{% for %}", "{{ raise_exception('no') }}", "{{ messages[7].content }}"])
def test_a_template_that_fails_names_the_file(template: str, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model.gguf", "llama", metadata={"tokenizer.chat_template": template})
    with load(path) as runtime:
        with pytest.raises(TemplateError, match=r"model\.gguf") as raised:
            runtime.chat([{"role": "user", "content": "Hi"}])
        assert "--raw" in raised.value.next_step
        assert runtime.generate("Hi", max_tokens=1, sampling=GREEDY).result() is not None


# -- files and options that make no sense ------------------------------------------------------------------------------
def test_no_model_answers_to_a_name() -> None:
    with pytest.raises(ModelNotFound):
        Runtime.load("no-such-model")


def test_an_unknown_architecture_names_those_that_are_known(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model.gguf", "llama", metadata={"general.architecture": "mamba"})
    with pytest.raises(UnsupportedArchitecture, match="mamba") as raised:
        load(path)
    assert "llama" in raised.value.next_step


@pytest.mark.parametrize("n_tokens", [300, 400])
def test_a_vocabulary_of_another_size_than_the_embedding_is_refused(n_tokens: int, tmp_path: Path) -> None:
    """A sampled id must be a token, and a token's id a row; llama.cpp refuses such a file too."""
    path = write_tiny_model(tmp_path / "model.gguf", "llama", metadata=vocabulary_keys(n_tokens))
    with pytest.raises(ModelFileError, match=f"vocabulary has {n_tokens} tokens.*{VOCAB_SIZE}"):
        load(path)


@pytest.mark.parametrize(("options", "said"), [
    ({"context": 7}, "context"), ({"context": -5}, "context"), ({"context": MAX_CONTEXT + 1}, "context"),
    ({"context": 2**62}, "context"), ({"batch": 0}, "batch"), ({"batch": 10**6}, "batch"), ({"threads": -1}, "threads"),
    ({"threads": 10**6}, "threads"), ({"kv_type": "q5_0"}, "kv-type"), ({"layout": "fast"}, "layout"),
    ({"memory": "lots"}, "size"), ({"trace": Path("/no/such/directory/trace.json")}, "--trace"),
], ids=str)
def test_options_out_of_bounds_are_usage_errors(options: dict[str, Any], said: str, tiny_model: TinyModel) -> None:
    with pytest.raises(UsageError, match=said):
        load(tiny_model("llama"), **options)


def test_heads_that_q8_0_does_not_divide_are_a_usage_error(tiny_model: TinyModel) -> None:
    path = tiny_model("llama", head_dim=16, n_kv_heads=1)
    with pytest.raises(UsageError, match="q8_0"):
        load(path, kv_type="q8_0")
    with load(path, kv_type="f16") as runtime:
        assert runtime.generate("a", max_tokens=2, sampling=GREEDY).result() is not None


def test_an_impossible_budget_names_the_smallest_that_works(tiny_model: TinyModel) -> None:
    with pytest.raises(BudgetTooSmall) as raised:
        load(tiny_model("llama"), memory="1M")
    error = raised.value
    assert error.budget_bytes == 2**20 < error.smallest_bytes
    assert error.exit_code == 5


# -- what it says of itself --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_the_account_of_memory_is_true(kv_type: str, tiny_model: TinyModel) -> None:
    path = tiny_model("llama")
    with load(path, kv_type=kv_type) as runtime:
        assert runtime.memory()["kv_resident_bytes"] == 0
        generation = runtime.generate(some_ids(30), max_tokens=10, sampling=GREEDY)
        generation.result()
        memory = runtime.memory()
        n_tokens = 30 + len(generation.token_ids) - 1
        values = 2 * 2 * 2 * 32 * n_tokens  # K and V, layers, KV heads, head size
        assert memory["kv_resident_bytes"] == (values * 2 if kv_type == "f16" else values // 32 * 34)
        assert memory["pinned_bytes"] == path.stat().st_size
        assert memory["streamed_bytes"] == 0
        assert memory["budget_bytes"] is None
        assert memory["kv_selected_tokens"] is None
        assert memory["compute_bytes"] == runtime.engine.compute_bytes > 0
        peak = memory["peak_rss_bytes"]
        assert peak is not None
        assert peak > path.stat().st_size
        json.dumps(memory)


def test_a_budget_is_reported(tiny_model: TinyModel) -> None:
    with load(tiny_model("llama"), memory="2G") as runtime:
        assert runtime.memory()["budget_bytes"] == 2 * 2**30
        runtime.generate("a", max_tokens=2, sampling=GREEDY).result()


def test_the_plan_says_how_the_model_runs(tiny_model: TinyModel) -> None:
    with load(tiny_model("llama", quantisation="Q4_0"), batch=32, threads=2, layout="repack") as runtime:
        plan = runtime.plan()
        assert plan["weights"] == "resident"
        assert (plan["threads"], plan["batch"], plan["context_length"]) == (2, 32, 512)
        pinned = runtime.memory()["pinned_bytes"]
        assert pinned == runtime.model.file_bytes + plan["repacked_bytes"]
        json.dumps(plan)


def test_a_trace_tells_loading_from_computing(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with load(tiny_model("llama"), trace=path) as runtime:
        runtime.generate(TEXT, max_tokens=3, sampling=GREEDY).result()
    events = json.loads(path.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["name"] for event in spans if event["cat"] == "load"} == {"header", "vocabulary", "weights"}
    computed = [event["name"].split()[0] for event in spans if event["cat"] == "compute"]
    assert computed == ["prefill", "decode", "decode"]


def test_answers_teach_what_is_promised_of_the_next(tiny_model: TinyModel, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGERT_HOME", str(tmp_path))
    path, paths = tiny_model("llama", quantisation="F32"), Paths.of_user()
    store = ProfileStore(paths.cache / "device.json")

    def answered(learns: bool) -> dict[str, object]:
        with load(path, learn=learns) as runtime:
            generation = runtime.generate(TEXT, max_tokens=20, sampling=GREEDY)
            generation.result()
            return generation.timings.to_dict()

    for learns in (False, True):  # of a device of which nothing is known, nothing is promised
        assert answered(learns)["forecast_per_second"] is None
    first = answered(False)
    assert first["forecast_per_second"] and first["forecast_time_to_first_token_ms"]
    with Planning.open(path, paths, EngineOptions(context=512)) as planning:
        learnt, disk = store.load(*planning.keys)
        assert learnt is not None and [*learnt.corrections] == ["compute"]
        assert not learnt.is_measured and disk is None  # `edgert plan` measures both anew
        store.save(*planning.keys, replace(learnt, multiply_s={"0/plain": {1: 1e-10}}, corrections={}))
    for learns in (False, True):
        assert answered(learns)["forecast_per_second"]
        profile, _ = store.load(*planning.keys)
        assert profile is not None and [*profile.corrections] == ["compute"] * learns


# -- closing -----------------------------------------------------------------------------------------------------------
def test_closing_twice_does_no_harm_and_what_is_closed_answers_no_more(tiny_model: TinyModel) -> None:
    with load(tiny_model("llama")) as runtime:
        begun, unbegun = runtime.generate(TEXT, sampling=GREEDY), None
        pieces = iter(begun)
        next(pieces)
        runtime.close()
        assert begun.finish_reason == "cancelled"
        assert list(pieces) == []
        for asked in (TEXT, [1, 2, 3]):
            with pytest.raises(UsageError, match="closed"):
                unbegun = runtime.generate(asked)
        assert unbegun is None
        runtime.close()
        assert runtime.memory()["compute_bytes"] == 0  # nothing is read where nothing is
        runtime.plan()


def test_an_answer_that_had_not_begun_ends_with_the_runtime(tiny_model: TinyModel) -> None:
    runtime = load(tiny_model("llama"))
    unbegun = runtime.generate(TEXT, sampling=GREEDY)
    runtime.close()
    assert list(unbegun) == []
    assert unbegun.finish_reason == "cancelled"


def test_an_error_inside_with_closes_too(tiny_model: TinyModel) -> None:
    with pytest.raises(RuntimeError, match="mine"), load(tiny_model("llama")) as runtime:
        raise RuntimeError("mine")
    with pytest.raises(UsageError, match="closed"):
        runtime.generate([1])


def test_a_text_that_cannot_be_cut_where_another_begins_is_computed_anew(runtime: Runtime,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    expected, real = runtime.generate(TEXT, max_tokens=5, sampling=GREEDY).result(), runtime.engine.kv.truncate

    def damaged(n_tokens: int) -> None:
        monkeypatch.setattr(runtime.engine.kv, "truncate", real)
        raise KVStoreError("there", "the keys and values of token 3 are damaged")

    monkeypatch.setattr(runtime.engine.kv, "truncate", damaged)
    again = runtime.generate(TEXT, max_tokens=5, sampling=GREEDY)
    assert again.result() == expected
    assert (again.timings.cache_n, again.timings.prompt_n) == (0, len(runtime.tokenize(TEXT)))
