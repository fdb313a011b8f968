"""A text that outlives the process: the same logits as one that never stopped, and never any from damaged bytes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_head import head_selector, page_selector
from retrieving import answer, open_dense, open_retrieving, random_tokens

from edgert.engine.engine import Engine
from edgert.errors import KVStoreError, NoSpace, UsageError
from edgert.gguf.model_file import ModelFile
from retrieval import sessions
from retrieval.cache import RetrievedKVCache
from retrieval.selection import Policy
from retrieval.session_card import SessionCard
from retrieval.session_list import forget_oldest, list_sessions, remove_session
from retrieval.sessions import Session

TinyModel = Callable[..., Path]
PROMPT, SAID = random_tokens(420), [(7 * i + 3) % 250 for i in range(6)]
KINDS = pytest.mark.parametrize("kind", ["dense", "memory", "disk, head", "disk, pages"])


def opened(kind: str, path: Path, store: Path) -> Any:
    if kind == "dense":
        return open_dense(path)
    policy, selector = Policy(96, n_recent=16, least_mass=0), page_selector if "pages" in kind else head_selector
    return open_retrieving(path, None if kind == "memory" else store / "kv", policy=policy, selector=selector)


def session_of(engine: Engine, path: Path, home: Path, name: str = "book") -> Session:
    return Session(home, name, ModelFile.open(path).fingerprint(), path.name, engine.arch.hp)


def keep(kind: str, path: Path, home: Path, prompt: list[int] = PROMPT) -> Any:
    """Compute a text, save it, and go on: the logits of the never stopped one."""
    with opened(kind, path, home) as engine, closing(session_of(engine, path, home)) as session:
        answer(engine, prompt, len(SAID))
        session.save(engine.kv, engine.backend, [*prompt, *SAID], {"turn": 1})
        engine.refresh()
        return answer(engine, [5, 6, 7], 5)


@KINDS
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_restored_text_goes_on_with_the_logits_of_one_that_never_stopped(
        tiny_model: TinyModel, tmp_path: Path, kind: str, architecture: str) -> None:
    path = tiny_model(architecture)
    expected = keep(kind, path, tmp_path)
    with opened(kind, path, tmp_path) as engine, closing(session_of(engine, path, tmp_path)) as session:
        assert session.conversation == {"turn": 1}
        assert session.restore(engine.kv, engine.backend) == [*PROMPT, *SAID]
        assert engine.kv.length == len(PROMPT) + len(SAID)
        if isinstance(engine.kv, RetrievedKVCache):
            assert list(engine.kv.token_ids) == [*PROMPT, *SAID], "what repeats is found in what was restored"
        engine.refresh()
        assert np.array_equal(answer(engine, [5, 6, 7], 5), expected)


@KINDS
def test_a_text_that_goes_another_way_is_kept_from_there_on(tiny_model: TinyModel, tmp_path: Path, kind: str) -> None:
    path = tiny_model("llama")
    keep(kind, path, tmp_path)
    with opened(kind, path, tmp_path) as engine, closing(session_of(engine, path, tmp_path)) as session:
        session.restore(engine.kv, engine.backend)
        engine.kv.truncate(300)
        engine.refresh()
        answer(engine, [9] * 40, 2)
        session.save(engine.kv, engine.backend, [*PROMPT[:300], *[9] * 40, 3, 10], {})
        engine.refresh()
        expected = answer(engine, [5], 2)
    with opened(kind, path, tmp_path) as engine, closing(session_of(engine, path, tmp_path)) as session:
        assert session.restore(engine.kv, engine.backend) == [*PROMPT[:300], *[9] * 40, 3, 10]
        engine.refresh()
        assert np.array_equal(answer(engine, [5], 2), expected)


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def restored(path: Path, home: Path, kind: str = "dense") -> list[int]:
    with opened(kind, path, home) as engine, closing(session_of(engine, path, home)) as session:
        token_ids = session.restore(engine.kv, engine.backend)
        assert engine.kv.length == len(token_ids)
        rest = [*PROMPT, *SAID][len(token_ids):]
        assert np.isfinite(answer(engine, [*rest, 5], 2)).all()
        return token_ids


@pytest.mark.parametrize("kind", ["dense", "disk, pages"])
def test_a_flipped_bit_is_noticed_and_what_comes_after_it_computed_again(tiny_model: TinyModel, tmp_path: Path,
                                                                         kind: str) -> None:
    path = tiny_model("llama")
    keep(kind, path, tmp_path)
    stride = SessionCard.read(tmp_path / "book/card.json").shape[1]
    flip(tmp_path / "book/full.kv", 300 * stride + 17)
    assert restored(path, tmp_path, kind) == PROMPT[:256], "whole blocks before it are kept"


@KINDS
def test_what_was_damaged_is_whole_after_the_next_save(tiny_model: TinyModel, tmp_path: Path, kind: str) -> None:
    path, said = tiny_model("llama"), [*PROMPT, *SAID]
    keep(kind, path, tmp_path)
    flip(tmp_path / "book/full.kv", 200 * SessionCard.read(tmp_path / "book/card.json").shape[1] + 17)
    with opened(kind, path, tmp_path) as engine, closing(session_of(engine, path, tmp_path)) as session:
        n_whole = len(session.restore(engine.kv, engine.backend))
        assert n_whole == 128
        engine.refresh()
        answer(engine, [*said[n_whole:], 5], 0)
        session.save(engine.kv, engine.backend, [*said, 5], {})
    with opened(kind, path, tmp_path) as engine, closing(session_of(engine, path, tmp_path)) as session:
        assert session.restore(engine.kv, engine.backend) == [*said, 5]


def test_who_wants_exact_answers_gets_no_keys_of_steps_over_a_set(tiny_model: TinyModel, tmp_path: Path,
                                                                  caplog: pytest.LogCaptureFixture) -> None:
    path, later = tiny_model("llama"), random_tokens(30, 3)
    keep("disk, head", path, tmp_path)  # the answer's steps attended to a set

    def reopened(kind: str, *, is_exact: bool) -> tuple[int, int]:
        """How many tokens came back, and how many of all are exact once the text has gone on."""
        with opened(kind, path, tmp_path) as engine, closing(session_of(engine, path, tmp_path)) as session:
            token_ids = session.restore(engine.kv, engine.backend, is_exact=is_exact)
            text = [*PROMPT, *SAID, *later]
            engine.kv.truncate(min(len(token_ids), len(text) - 1))
            engine.refresh()
            answer(engine, text[engine.kv.length:], 0)
            session.save(engine.kv, engine.backend, text, {})
            return len(token_ids), SessionCard.read(tmp_path / "book/card.json").n_exact

    n_said = len(PROMPT) + len(SAID)
    assert reopened("disk, head", is_exact=False) == (n_said, len(PROMPT))
    assert reopened("dense", is_exact=False) == (n_said + len(later), len(PROMPT))
    assert "computed again" not in caplog.text
    assert reopened("dense", is_exact=True) == (len(PROMPT), n_said + len(later))
    assert f"{len(SAID) + len(later)} of its tokens followed steps over a set" in caplog.text
    with opened("dense", path, tmp_path) as engine, closing(session_of(engine, path, tmp_path)) as session:
        assert len(session.restore(engine.kv, engine.backend, is_exact=True)) == n_said + len(later)
        engine.refresh()
        restored_logits = answer(engine, [5], 2)
    with opened("dense", path, tmp_path) as engine:
        answer(engine, PROMPT, 0)
        answer(engine, [*SAID, *later], 0)
        assert np.abs(answer(engine, [5], 2) - restored_logits).max() < 0.5


def test_records_that_stay_keep_their_word_on_exactness(tiny_model: TinyModel, tmp_path: Path) -> None:
    path, said = tiny_model("llama"), [*PROMPT, *SAID]
    keep("disk, head", path, tmp_path)
    with opened("disk, head", path, tmp_path) as engine, closing(session_of(engine, path, tmp_path)) as session:
        session.restore(engine.kv, engine.backend)
        engine.kv.truncate(0)  # as after damage in the store
        engine.refresh()
        answer(engine, [*said, 5], 0)
        assert engine.kv.approximate_from > len(said), "the cache has been computed whole"
        session.save(engine.kv, engine.backend, [*said, 5], {})
        assert SessionCard.read(tmp_path / "book/card.json").n_exact == len(PROMPT), "the records have not"


@pytest.mark.parametrize("cut_bytes", [0, 1000, 100_000])
def test_a_file_that_was_cut_is_noticed(tiny_model: TinyModel, tmp_path: Path, cut_bytes: int) -> None:
    path = tiny_model("llama")
    keep("dense", path, tmp_path)
    stride = SessionCard.read(tmp_path / "book/card.json").shape[1]
    os.truncate(tmp_path / "book/full.kv", cut_bytes)
    assert restored(path, tmp_path) == PROMPT[:cut_bytes // stride // 128 * 128]


def test_files_that_were_deleted_are_computed_again(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = tiny_model("llama")
    keep("dense", path, tmp_path)
    (tmp_path / "book/full.kv").unlink()
    assert restored(path, tmp_path) == []
    keep("disk, head", path, tmp_path / "b")
    (tmp_path / "b/book/selector.f32").unlink()
    assert restored(path, tmp_path / "b", "disk, head") == []


@pytest.mark.parametrize("where", [0, 40, 200, -3])
def test_a_damaged_card_begins_the_session_anew(tiny_model: TinyModel, tmp_path: Path, where: int) -> None:
    path, card = tiny_model("llama"), tmp_path / "book/card.json"
    keep("dense", path, tmp_path)
    flip(card, where % card.stat().st_size)
    assert restored(path, tmp_path) == []


def test_a_session_of_another_model_is_refused_and_stays(tiny_model: TinyModel, tmp_path: Path) -> None:
    path, other = tiny_model("llama"), tiny_model("llama", seed=1)
    keep("dense", path, tmp_path)
    with open_dense(other) as engine, pytest.raises(UsageError, match=r"another model .*gguf"):
        session_of(engine, other, tmp_path)
    assert restored(path, tmp_path) == [*PROMPT, *SAID]


def test_a_session_kept_with_another_selector_is_computed_again(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = tiny_model("llama")
    keep("dense", path, tmp_path)
    assert restored(path, tmp_path, "disk, head") == []
    assert restored(path, tmp_path, "disk, pages") == [*PROMPT, *SAID], "pages are made of the keys"


def test_a_session_is_open_in_one_process_only(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = tiny_model("llama")
    with open_dense(path) as engine, closing(session_of(engine, path, tmp_path)):
        with pytest.raises(UsageError, match="open in another process"):
            session_of(engine, path, tmp_path)
        with pytest.raises(UsageError, match="open in another process"):
            remove_session(tmp_path, "book")
    with open_dense(path) as engine:
        session_of(engine, path, tmp_path).close()


@pytest.mark.parametrize("name", ["", "../x", ".hidden", "a/b", "x" * 65, "nul\0"])
def test_a_name_that_is_a_path_is_refused(tiny_model: TinyModel, tmp_path: Path, name: str) -> None:
    path = tiny_model("llama")
    with open_dense(path) as engine, pytest.raises(UsageError, match="no name"):
        session_of(engine, path, tmp_path, name)


def test_a_full_disk_is_told_and_leaves_what_was_kept(tiny_model: TinyModel, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_model("llama")
    keep("dense", path, tmp_path)
    with open_dense(path) as engine, closing(session_of(engine, path, tmp_path)) as session:
        session.restore(engine.kv, engine.backend)
        answer(engine, [1, 2], 2)
        monkeypatch.setattr(sessions.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100}))
        with pytest.raises(NoSpace):
            session.save(engine.kv, engine.backend, [*PROMPT, *SAID, 1, 2, 3, 10], {})
    monkeypatch.undo()
    assert restored(path, tmp_path) == [*PROMPT, *SAID]


def test_a_write_that_fails_leaves_what_was_kept(tiny_model: TinyModel, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_model("llama")
    keep("dense", path, tmp_path)
    with open_dense(path) as engine, closing(session_of(engine, path, tmp_path)) as session:
        session.restore(engine.kv, engine.backend)
        answer(engine, [1, 2], 2)

        def refuse(*_: Any) -> int:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "pwritev", refuse)
        with pytest.raises(KVStoreError, match="Input/output"):
            session.save(engine.kv, engine.backend, [*PROMPT, *SAID, 1, 2, 3, 10], {})
    monkeypatch.undo()
    assert restored(path, tmp_path) == [*PROMPT, *SAID]


def _save_and_die(path: Path, home: Path, fatal_call: str, n_calls: int) -> None:
    """Go another way in the session, and be killed at the n-th call of `os.fatal_call`."""
    real, left = getattr(os, fatal_call), [n_calls]

    def call(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    with open_dense(path) as engine, closing(session_of(engine, path, home)) as session:
        session.restore(engine.kv, engine.backend)
        engine.kv.truncate(300)
        answer(engine, [9] * 200, 0)
        setattr(os, fatal_call, call)
        session.save(engine.kv, engine.backend, [*PROMPT[:300], *[9] * 200], {})


@pytest.mark.parametrize(("fatal_call", "n_calls"), [("fsync", 1), ("fsync", 2), ("fsync", 3), ("fsync", 4),
                                                     ("pwritev", 1), ("pwritev", 2), ("fdatasync", 1)])
def test_a_process_that_is_killed_while_it_saves_loses_at_most_what_was_new(tiny_model: TinyModel, tmp_path: Path,
                                                                            fatal_call: str, n_calls: int) -> None:
    path = tiny_model("llama")
    keep("dense", path, tmp_path)
    process = multiprocessing.get_context("fork").Process(target=_save_and_die,
                                                          args=(path, tmp_path, fatal_call, n_calls))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    with open_dense(path) as engine, closing(session_of(engine, path, tmp_path)) as session:
        token_ids = session.restore(engine.kv, engine.backend)
    assert token_ids in ([*PROMPT, *SAID], PROMPT[:300], [*PROMPT[:300], *[9] * 200])
    assert len(token_ids) >= 300


def test_the_oldest_sessions_make_room_and_the_open_ones_stay(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = tiny_model("llama")
    with open_dense(path) as engine:
        engine.step(np.array(PROMPT, np.int32))
        held = session_of(engine, path, tmp_path, "a-open")
        for age, name in enumerate(("a-open", "b", "c", "d")):
            session = held if name == "a-open" else session_of(engine, path, tmp_path, name)
            session.save(engine.kv, engine.backend, PROMPT, {})
            for file in (tmp_path / name).iterdir():
                os.utime(file, (1000 + age, 1000 + age))
            if session is not held:
                session.close()
        sizes = {one.name: one.size_bytes for one in list_sessions(tmp_path)}
        assert [*sizes] == ["d", "c", "b", "a-open"]
        forget_oldest(tmp_path, "d", max_bytes=sum(sizes.values()) - 1)
        assert [one.name for one in list_sessions(tmp_path)] == ["d", "c", "a-open"]
        held.close()


def test_a_session_that_cannot_be_removed_is_told(tiny_model: TinyModel, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    keep("dense", tiny_model("llama"), tmp_path)

    def refused(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("retrieval.session_list.shutil.rmtree", refused)
    with pytest.raises(KVStoreError, match="cannot be removed: Permission denied"):
        remove_session(tmp_path, "book")


def test_sessions_are_listed_with_what_they_are_and_removed(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = tiny_model("llama")
    keep("dense", path, tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/card.json").write_text("{}")
    listed = {one.name: one for one in list_sessions(tmp_path)}
    assert listed["book"].n_tokens == len(PROMPT) + len(SAID)
    assert listed["book"].model == path.name
    assert listed["broken"].problem
    assert remove_session(tmp_path, "book") > 100_000
    assert remove_session(tmp_path, "broken") >= 0
    assert list_sessions(tmp_path) == []
    with pytest.raises(UsageError, match="no session"):
        remove_session(tmp_path, "book")
