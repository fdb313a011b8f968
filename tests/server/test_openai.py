from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from served import Served, events

from edgert import Runtime

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
WEATHER: Any = {"type": "function", "function": {"name": "get_weather", "description": "the weather of a city",
                "parameters": {"type": "object", "required": ["city"], "additionalProperties": False,
                               "properties": {"city": {"$ref": "#/$defs/city"}},
                               "$defs": {"city": {"enum": ["Paris", "Rome"]}}}}}
TIME: Any = {"type": "function", "function": {"name": "get_time"}}
SCHEMA = {"type": "object", "required": ["age"], "additionalProperties": False,
          "properties": {"age": {"type": "integer", "minimum": 1, "maximum": 99}}}


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", timeout=120, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def name(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def test_models_are_listed_and_found_by_name(client: openai.OpenAI, tiny: Path) -> None:
    (model,) = client.models.list().data
    assert model.id == tiny.stem and model.object == "model"
    assert client.models.retrieve(model.id).id == model.id
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nosuch")


def test_a_chat_answers_what_the_runtime_answers(client: openai.OpenAI, name: str, tiny: Path) -> None:
    with Runtime.load(tiny, layout="plain", threads=1, context=8192) as runtime:
        from edgert import SamplingParams

        generation = runtime.chat(HELLO, max_tokens=12, sampling=SamplingParams(temperature=0))
        text = generation.result()
    reply = client.chat.completions.create(model=name, messages=HELLO, max_tokens=12, temperature=0)
    assert reply.choices[0].message.content == text
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason == ("length" if generation.finish_reason == "length" else "stop")
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (
        len(generation.prompt_token_ids), len(generation.token_ids))
    timings: Any = reply.model_extra
    assert timings["timings"]["predicted_n"] >= 12 and timings["timings"]["time_to_first_token_ms"] > 0


def test_a_stream_brings_the_same_text_and_a_last_chunk_with_usage(client: openai.OpenAI, name: str) -> None:
    options: Any = {"model": name, "messages": HELLO, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == \
        whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert whole.usage is not None and chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert len({chunk.id for chunk in chunks}) == 1


def test_seeds_repeat_and_stops_cut(client: openai.OpenAI, name: str) -> None:
    def answer(**options: Any) -> str:
        reply = client.chat.completions.create(model=name, messages=HELLO, max_tokens=12, **options)
        return reply.choices[0].message.content or ""

    assert answer(seed=7, temperature=2) == answer(seed=7, temperature=2) != answer(seed=8, temperature=2)
    text = answer(temperature=0)
    assert answer(temperature=0, stop=[text[3:5]]) == text[:text.index(text[3:5])]


def test_logprobs_are_of_the_softmax_and_top_ones_come_in_order(client: openai.OpenAI, name: str) -> None:
    reply = client.chat.completions.create(model=name, messages=HELLO, max_tokens=5, temperature=0, logprobs=True,
                                           top_logprobs=3)
    tokens = reply.choices[0].logprobs and reply.choices[0].logprobs.content
    assert tokens is not None and len(tokens) == 5
    for token in tokens:
        top = [one.logprob for one in token.top_logprobs]
        assert len(top) == 3 and top == sorted(top, reverse=True)
        assert token.logprob == pytest.approx(top[0])  # greedy
        assert sum(map(math.exp, top)) <= 1.0001
    streamed = list(client.chat.completions.create(model=name, messages=HELLO, max_tokens=5, temperature=0,
                                                   logprobs=True, stream=True))
    found = [one.logprob for chunk in streamed if chunk.choices and chunk.choices[0].logprobs
             for one in chunk.choices[0].logprobs.content or ()]
    assert found == pytest.approx([token.logprob for token in tokens])


def test_a_json_schema_holds(client: openai.OpenAI, name: str) -> None:
    reply = client.chat.completions.create(
        model=name, messages=HELLO, max_tokens=60, temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}})
    assert 1 <= json.loads(reply.choices[0].message.content or "")["age"] <= 99


def test_json_is_an_object_where_only_that_is_asked(client: openai.OpenAI, name: str) -> None:
    reply = client.chat.completions.create(model=name, messages=HELLO, max_tokens=400, seed=3, stop=None,
                                           response_format={"type": "json_object"})
    text = reply.choices[0].message.content or ""
    if reply.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)
    assert text.startswith("{")


@pytest.mark.parametrize(("tools", "choice"), [
    ([WEATHER, TIME], {"type": "function", "function": {"name": "get_weather"}}), ([WEATHER], "required"),
    ([TIME, WEATHER], "required")])
def test_a_required_call_has_arguments_that_its_schema_admits(tools: list[Any], choice: Any, client: openai.OpenAI,
                                                              name: str) -> None:
    reply = client.chat.completions.create(model=name, messages=HELLO, tools=tools, tool_choice=choice, temperature=0,
                                           max_tokens=200)
    assert reply.choices[0].finish_reason == "tool_calls" and reply.choices[0].message.content is None
    (call,) = reply.choices[0].message.tool_calls or ()
    assert call.type == "function" and call.id.startswith("call_")
    arguments = json.loads(call.function.arguments)
    if call.function.name == "get_weather":
        assert arguments["city"] in ("Paris", "Rome")
    else:
        assert call.function.name == "get_time" and arguments == {} and len(tools) == 2
    chunks = list(client.chat.completions.create(model=name, messages=HELLO, tools=tools, tool_choice=choice,
                                                 temperature=0, max_tokens=200, stream=True))
    deltas = [delta for chunk in chunks for delta in chunk.choices[0].delta.tool_calls or ()]
    assert [delta.function and delta.function.arguments for delta in deltas] == [call.function.arguments]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_free_text_stays_free_with_tools_and_calls_may_be_answered(client: openai.OpenAI, name: str) -> None:
    call: Any = {"id": "call_1", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
    messages: Any = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]},
                     {"role": "tool", "tool_call_id": "call_1", "content": "noon"}]
    for choice in ("auto", "none"):
        reply = client.chat.completions.create(model=name, messages=messages, tools=[TIME], tool_choice=choice,
                                               max_tokens=5, temperature=0)
        assert reply.choices[0].message.content and not reply.choices[0].message.tool_calls


def test_a_long_prompt_is_a_400_with_the_numbers_streamed_or_not(client: openai.OpenAI, name: str) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=name, stream=stream,
                                           messages=[{"role": "user", "content": "word " * 9000}])
        body: Any = caught.value.body
        assert body["code"] == "context_length_exceeded" and body["type"] == "invalid_request_error"
        assert body["n_prompt_tokens"] > body["n_ctx"] == 8192


def test_completions_continue_text_and_token_ids(client: openai.OpenAI, name: str) -> None:
    text = client.completions.create(model=name, prompt="hello", max_tokens=6, temperature=0, logprobs=1)
    assert text.choices[0].text and text.usage is not None and text.usage.completion_tokens == 6
    logprobs = text.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None and len(logprobs.tokens) == 6
    streamed = client.completions.create(model=name, prompt="hello", max_tokens=6, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == text.choices[0].text


@pytest.mark.parametrize(("change", "param"), [
    ({"messages": []}, "messages"), ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"), ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"), ({"max_tokens": 0}, "max_tokens"), ({"n": 2}, "n"),
    ({"top_logprobs": 3}, "top_logprobs"), ({"stop": [""]}, "stop"), ({"tool_choice": "required"}, "tool_choice"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"response_format": {"type": "json_schema"}}, "response_format"), ({"audio": {}}, "audio"),
    ({"logit_bias": {"x": 1}}, "logit_bias"), ({"model": 3}, "model"),
])
def test_what_makes_no_sense_is_named(change: dict[str, Any], param: str, served: Served) -> None:
    status, body = served.ask("POST", "/v1/chat/completions", {"messages": HELLO, **change})
    assert status == 400
    assert body["error"]["type"] == "invalid_request_error" and body["error"]["param"] == param
    assert body["error"].keys() >= {"message", "type", "param", "code"}


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"x"', b"[" * 100_000, b'{"messages": NaN}', b"\xff"])
def test_bodies_that_are_no_objects_are_refused(body: bytes, served: Served) -> None:
    assert served.ask("POST", "/v1/chat/completions", body)[0] == 400


def test_unknown_models_paths_and_methods_are_answered_in_openais_shape(served: Served, tiny: Path) -> None:
    for model in ("nosuch", str(tiny), "../" * 9 + "etc/passwd", f"../{tiny.name}"):
        status, body = served.ask("POST", "/v1/chat/completions", {"model": model, "messages": HELLO})
        assert (status, body["error"]["code"]) == (404, "model_not_found")
    assert served.ask("GET", "/nosuch")[0] == 404
    status, body = served.ask("GET", "/v1/chat/completions")
    assert status == 405 and "message" in body["error"]


def test_a_refused_schema_is_a_400(served: Served) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "propertiesx": {}}}}
    status, body = served.ask("POST", "/v1/chat/completions", {"messages": HELLO, "response_format": schema})
    assert status == 400 and body["error"]["code"] == "invalid_schema" and "propertiesx" in body["error"]["message"]


def test_progress_comes_as_chunks_only_for_those_who_ask(busy: Served) -> None:
    body = {"messages": [{"role": "user", "content": "word " * 400}], "max_tokens": 1, "stream": True}
    chunks = [one for one in events(busy.open("POST", "/v1/chat/completions", {**body, "return_progress": True}))
              if one != "[DONE]"]
    told = [one["prompt_progress"] for one in chunks if "prompt_progress" in one]
    assert told and all(0 <= one["processed"] <= one["total"] for one in told)
    silent = events(busy.open("POST", "/v1/chat/completions", {**body, "messages": HELLO}))
    assert all(one == "[DONE]" or one["choices"] for one in silent)


def test_a_call_in_free_text_is_made_under_its_schema(tiny_model: Callable[..., Path], monkeypatch: Any) -> None:
    """The tiny model never opens a call by itself, so the text that it says is made to."""
    from apps.server import answering, tools
    from apps.server.asked import Asked, ToolChoice

    emitted: list[dict[str, Any]] = []
    with Runtime.load(tiny_model("llama"), layout="plain", threads=1) as runtime:
        said = answering.Answering(runtime, Asked(messages=tuple(HELLO), max_tokens=8, sampling={"temperature": 0.0}),
                                   emitted.append)
        said.run()
        text = "".join(one.get("text", "") for one in emitted)
        monkeypatch.setattr(tools, "OPEN", text[2:4])  # what the model says anyhow opens a call
        emitted.clear()
        choice = ToolChoice((TIME["function"] | {"description": "", "parameters": None},), "auto")
        calling = answering.Answering(runtime, Asked(messages=tuple(HELLO), max_tokens=200, tools=choice,
                                                     sampling={"temperature": 0.0}), emitted.append)
        monkeypatch.setattr(tools, "told", lambda messages, _: [dict(one) for one in messages])
        calling.run()
    assert "".join(one.get("text", "") for one in emitted) == text[:text.index(text[2:4])]
    assert [(one["name"], one["arguments"]) for one in emitted if one["event"] == "tool_call"] == [("get_time", "{}")]
    assert emitted[-1]["finish_reason"] == "tool_calls"
