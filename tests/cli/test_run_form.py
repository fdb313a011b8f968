"""`edgert run` with --json-schema and --grammar: files in, constrained text out, clear words for what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Outcome

Command = Callable[..., Outcome]

SCHEMA = {"type": "object", "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 120}},
          "required": ["age"], "additionalProperties": False}


def test_the_answer_has_the_form_of_the_schema(edgert: Command, real_model: Callable[[str], Path],
                                               tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    outcome = edgert("run", real_model("smollm2-135m"), "How old?", "--json-schema", schema, "--threads", 1,
                     "--max-tokens", 60, "--context", 256, "--temp", 0)
    assert outcome.status == 0
    assert 0 <= json.loads(outcome.out)["age"] <= 120


def test_the_answer_has_the_form_of_the_grammar(edgert: Command, real_model: Callable[[str], Path],
                                                tmp_path: Path) -> None:
    grammar = tmp_path / "answer.gbnf"
    grammar.write_text('root ::= "yes" | "no"\n')
    outcome = edgert("run", real_model("smollm2-135m"), "Well?", "--grammar", grammar, "--threads", 1, "--context", 256)
    assert outcome.status == 0
    assert outcome.out.strip() in ("yes", "no")


@pytest.mark.parametrize(("content", "status"), [(None, 2), (b"\xff\xfe", 2), (b"{", 10)])
def test_a_file_that_is_no_schema_is_refused(edgert: Command, model: Path, tmp_path: Path, content: bytes | None,
                                             status: int) -> None:
    schema = tmp_path / "schema.json"
    if content is not None:
        schema.write_bytes(content)
    outcome = edgert("run", model, "Hi", "--json-schema", schema, "--context", 256)
    assert outcome.status == status
    assert "edgert: " in outcome.err
