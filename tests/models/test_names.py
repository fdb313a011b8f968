"""What names mean: references, quantisations, parts, and paths that a server sends."""

from __future__ import annotations

import pytest

from edgert.models.names import (
    HubReference,
    choose_file,
    is_model,
    parse_reference,
    parse_split,
    parts_of,
    prefers,
    printable,
    safe_relative,
    stem,
)


@pytest.mark.parametrize(("model", "repo", "quant"), [
    ("user/repo", "user/repo", None),
    ("bartowski/Llama-3.2-1B-Instruct-GGUF:q4_k_m", "bartowski/Llama-3.2-1B-Instruct-GGUF", "q4_k_m"),
    ("u_1/r.2:file-Q8_0.gguf", "u_1/r.2", "file-Q8_0.gguf"),
])
def test_references_are_taken_apart(model: str, repo: str, quant: str | None) -> None:
    assert parse_reference(model) == HubReference(repo, quant)


@pytest.mark.parametrize("model", [
    "", "name", "a/b/c", "../repo", "user/..", "./repo", "user/repo:", "user/repo:a:b", "/user/repo", "user/re po",
    "dir/model.gguf", "user/repo\n", "üser/repo", "u" * 97 + "/r",
])
def test_what_is_no_reference_is_none(model: str) -> None:
    assert parse_reference(model) is None


FILES = ["README.md", "m-BF16.gguf", "m-F16.gguf", "m-IQ4_XS.gguf", "mmproj-Q4_K_M.gguf", "m-Q8_0.gguf",
         "m-q4_k_m.gguf", "Q6_K/m-Q6_K-00002-of-00002.gguf", "Q6_K/m-Q6_K-00001-of-00002.gguf"]


@pytest.mark.parametrize(("quant", "chosen"), [
    (None, "m-q4_k_m.gguf"), ("Q4_K_M", "m-q4_k_m.gguf"), ("f16", "m-F16.gguf"), ("BF16", "m-BF16.gguf"),
    ("iq4_xs", "m-IQ4_XS.gguf"), ("Q6_K", "Q6_K/m-Q6_K-00001-of-00002.gguf"), ("Q4_K", None), ("Q2_K", None),
    ("M-Q8_0.gguf", "m-Q8_0.gguf"), ("m-q6_k", "Q6_K/m-Q6_K-00001-of-00002.gguf"), (".*", None),
])
def test_a_quantisation_chooses_its_file_in_any_case(quant: str | None, chosen: str | None) -> None:
    assert choose_file(FILES, quant) == chosen


def test_without_q4_k_m_q8_0_is_taken_and_then_the_first_model() -> None:
    assert choose_file(["m-Q2_K.gguf", "m-Q8_0.gguf"], None) == "m-Q8_0.gguf"
    assert choose_file(["imatrix.gguf", "m-Q2_K.gguf", "m-Q3_K.gguf"], None) == "m-Q2_K.gguf"
    assert choose_file(["README.md"], None) is None


def test_only_the_preferred_quantisation_is_surely_meant_by_a_bare_repository() -> None:
    assert prefers("m-Q4_K_M.gguf", HubReference("u/r"))
    assert not prefers("m-Q8_0.gguf", HubReference("u/r"))
    assert prefers("m-Q8_0.gguf", HubReference("u/r", "q8_0"))


def test_parts_are_found_in_order_and_missing_ones_named() -> None:
    paths = ["d/m-00003-of-00003.gguf", "d/m-00001-of-00003.gguf", "other/m-00002-of-00003.gguf"]
    assert parts_of("d/m-00003-of-00003.gguf", paths) == (
        ["d/m-00001-of-00003.gguf", "d/m-00003-of-00003.gguf"], ["d/m-00002-of-00003.gguf"])
    assert parts_of("m.gguf", ["m.gguf"]) == (["m.gguf"], [])


@pytest.mark.parametrize("name", ["m-00000-of-00002.gguf", "m-00003-of-00002.gguf", "m-00001-of-99999.gguf", "m.gguf"])
def test_part_numbers_that_make_no_sense_are_part_of_the_name(name: str) -> None:
    assert parse_split(name) is None


def test_stems_have_neither_ending_nor_part_number() -> None:
    assert stem("m-Q4.gguf") == "m-Q4"
    assert stem("m-00001-of-00002.gguf") == "m"


@pytest.mark.parametrize("path", [
    "../m.gguf", "a/../m.gguf", "/etc/m.gguf", "a//m.gguf", "./m.gguf", "a/.hidden.gguf", ".git/m.gguf", "m.txt", "",
    "a\\m.gguf", "C:m.gguf", "m\n.gguf", "m\0.gguf", "m\x1b[2J.gguf", "m\ud800.gguf", "x" * 300 + ".gguf",
    "ü" * 150 + ".gguf", "/".join("abcdefg") + "/m.gguf", None, 7, ["m.gguf"],
])
def test_hostile_paths_are_refused(path: object) -> None:
    assert safe_relative(path) is None


def test_ordinary_paths_are_kept() -> None:
    assert str(safe_relative("Q4 K/Modèle-Q4_K_M.gguf")) == "Q4 K/Modèle-Q4_K_M.gguf"


def test_companions_are_no_models() -> None:
    assert is_model("d/model.GGUF")
    assert not is_model("mmproj-model.gguf")
    assert not is_model("model.gguf.partial")


def test_texts_of_strangers_become_one_bounded_line() -> None:
    assert printable("a\x1b[31m\nb") == "a?[31m?b"
    assert len(printable("x" * 1000)) == 300
