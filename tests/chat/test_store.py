"""The chat database and what travels in and out of it, without a server."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from apps.chat import transfer
from apps.chat.answers import asked_of, with_files
from apps.chat.attachments import safe_name, text_of
from apps.chat.downloads import suggest
from apps.chat.migrations import MIGRATIONS
from apps.chat.store import Store, title_of
from apps.server.forecast import Speeds
from apps.server.replies import Refusal
from edgert.errors import EdgertError, InvalidRequest


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "data" / "chats.sqlite3")


def test_a_branch_is_the_way_from_the_beginning(store: Store) -> None:
    chat = store.create_chat("t")
    first = store.add_message(chat.id, None, "user", "one")
    answer = store.add_message(chat.id, first.id, "assistant", "two")
    other = store.add_message(chat.id, first.id, "assistant", "another two")
    assert [one.content for one in store.branch(answer.id)] == ["one", "two"]
    assert [one.content for one in store.branch(other.id)] == ["one", "another two"]
    assert store.chat(chat.id).leaf_id == other.id and len(store.messages(chat.id)) == 3


def test_what_does_not_belong_together_is_refused(store: Store) -> None:
    chat, other = store.create_chat("a"), store.create_chat("b")
    message = store.add_message(other.id, None, "user", "x")
    for do in (lambda: store.chat("nosuch"), lambda: store.message("nosuch"), lambda: store.delete_chat("nosuch"),
               lambda: store.add_message(chat.id, message.id, "user", "x"),
               lambda: store.change_chat(chat.id, leaf_id=message.id)):
        with pytest.raises(Refusal) as caught:
            do()
        assert caught.value.status == 404


def test_a_deleted_chat_leaves_nothing(store: Store) -> None:
    chat = store.create_chat("gone")
    file = store.add_attachment("a.txt", "text", 1)
    store.add_message(chat.id, None, "user", "findme", attachment_ids=[file.id])
    store.delete_chat(chat.id)
    assert store.search("findme") == store.search("gone") == []
    for table in ("messages", "attachments", "chats"):
        assert store._db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] == 0


def test_search_finds_finished_texts_and_titles(store: Store) -> None:
    chat = store.create_chat("Über Äpfel")
    question = store.add_message(chat.id, None, "user", "What is a quince?")
    answer = store.add_message(chat.id, question.id, "assistant", "", status="writing")
    store.write(answer.id, "A quince is", "writing")
    assert [hit.message_id for hit in store.search("quince")] == [question.id]
    store.write(answer.id, "A quince is a fruit", "done")
    assert {hit.message_id for hit in store.search("quin")} == {question.id, answer.id}
    assert store.search("fruit")[0].snippet == "A quince is a \x02fruit\x03"
    assert store.search("uber apf")[0].title == "Über Äpfel"
    store.change_chat(chat.id, title="Pears")
    assert store.search("uber") == [] and store.search("pears")
    for strange in ('"', "a OR", "NEAR(", "*", "x\x00y", "'); DROP TABLE chats; --", "-", ""):
        assert isinstance(store.search(strange), list)


def test_attachments_go_with_their_message_once(store: Store) -> None:
    chat, file = store.create_chat("t"), store.add_attachment("a.txt", "the text", 3)
    message = store.add_message(chat.id, None, "user", "look", attachment_ids=[file.id])
    again = store.add_message(chat.id, None, "user", "look", attachment_ids=[file.id])
    assert [one.name for one in message.attachments] == ["a.txt"] and again.attachments == ()
    store.copy_attachments(message.id, again.id)
    assert [one.content for one in store.message(again.id).attachments] == ["the text"]
    assert with_files(message) == "File a.txt:\n\nthe text\n\n(end of a.txt)\n\nlook"


def test_an_answer_that_was_being_written_when_the_server_died_is_kept(tmp_path: Path) -> None:
    store = Store(tmp_path / "db")
    chat = store.create_chat("t")
    message = store.add_message(chat.id, None, "assistant", "", status="writing")
    store.write(message.id, "so far", "writing")
    store.close()
    again = Store(tmp_path / "db").message(message.id)
    assert (again.content, again.status) == ("so far", "interrupted")


def test_migrations_run_once_and_old_databases_are_brought_up(tmp_path: Path) -> None:
    path = tmp_path / "db"
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE migrations (number INTEGER PRIMARY KEY, at TEXT NOT NULL)")
    db.executescript(f"{MIGRATIONS[0][1]} INSERT INTO migrations VALUES (1, 'then');")
    db.execute("INSERT INTO chats VALUES ('c', 'old', '', NULL, '{}', NULL, 1, 1)")
    db.commit()
    db.close()
    for _ in range(2):
        store = Store(path)
        assert [chat.title for chat in store.chats()] == ["old"]
        store.close()
    numbers = [number for (number,) in sqlite3.connect(path).execute("SELECT number FROM migrations")]
    assert numbers == [number for number, _ in MIGRATIONS]


def test_a_file_that_is_no_database_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "db").write_bytes(b"not a database" * 100)
    with pytest.raises(EdgertError, match="Move the file away"):
        Store(tmp_path / "db")


_WRITER = """
import sys
from pathlib import Path
from apps.chat.store import Store
store = Store(Path(sys.argv[1]))
chat = store.create_chat("busy")
parent = None
for number in range(100000):
    one = store.add_message(chat.id, parent, "assistant", "", status="writing")
    for part in range(3):
        store.write(one.id, f"part {part} of {number}", "writing")
    store.write(one.id, f"answer {number}", "done")
    print(one.id, flush=True)
    parent = one.id
"""


@pytest.mark.parametrize("n_lines", [1, 7, 18])
def test_a_killed_writer_loses_no_finished_message(n_lines: int, tmp_path: Path) -> None:
    """A dose of benchmarks/chat_kill.py, which does so a hundred times."""
    process = subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path / "db")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    finished = [process.stdout.readline().strip() for _ in range(n_lines)]
    os.kill(process.pid, signal.SIGKILL)
    finished += [line.strip() for line in process.stdout if line.endswith("\n")]
    process.wait()
    process.stdout.close()
    store = Store(tmp_path / "db")
    for number, message_id in enumerate(finished):
        assert (store.message(message_id).content, store.message(message_id).status) == (f"answer {number}", "done")
    assert store._db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    store.close()


def test_a_chat_goes_out_and_comes_back_whole(store: Store) -> None:
    chat = store.create_chat("round", "be kind", "m", {"temperature": 0.5})
    file = store.add_attachment("a.txt", "text", 2)
    first = store.add_message(chat.id, None, "user", "one", attachment_ids=[file.id])
    for text in ("two", "other two"):
        answer = store.add_message(chat.id, first.id, "assistant", text, status="writing", model="m")
        store.write(answer.id, text, "done", figures={"completion_tokens": 1, "timings": {}})
    store.change_chat(chat.id, leaf_id=store.messages(chat.id)[1].id)
    exported = json.loads(json.dumps(transfer.to_json([(store.chat(chat.id), store.messages(chat.id))])))
    ((back, messages),) = transfer.from_json(exported)
    store.insert_all(back, messages)

    def told(chat_id: str) -> Any:
        chat, all_of_it = store.chat(chat_id), store.messages(chat_id)
        ids = {one.id: i for i, one in enumerate(all_of_it)}
        return (chat.title, chat.system, chat.model, chat.settings, ids.get(chat.leaf_id or ""), [
            (one.role, one.content, one.status, ids.get(one.parent_id or ""), one.model, one.figures,
             [(file.name, file.content, file.n_tokens) for file in one.attachments]) for one in all_of_it])

    assert back.id != chat.id and told(back.id) == told(chat.id)


@pytest.mark.parametrize("change", [
    {"format": "other"}, {"version": 2}, {"chats": {}}, {"chats": [3]},
    {"chats": [{"messages": [{"id": "a"}, {"id": "a"}]}]}, {"chats": [{"messages": [{"id": "a", "parent_id": "b"}]}]},
    {"chats": [{"messages": [{"id": "a", "role": "system"}]}]},
    {"chats": [{"title": "x" * 999}]}, {"chats": [{"messages": [{"id": "a", "content": 5}]}]},
    {"chats": [{"settings": []}]}, {"chats": [{"messages": [{"id": "a", "figures": "x"}]}]}])
def test_imports_are_checked(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        transfer.from_json({"format": "edgert-chats", "version": 1, "chats": [], **change})


def test_markdown_fences_hold_whatever_a_file_contains(store: Store) -> None:
    chat = store.create_chat("line\nbreak # x")
    file = store.add_attachment("a.md", "````\ncode\n````", 2)
    message = store.add_message(chat.id, None, "user", "look", attachment_ids=[file.id])
    text = transfer.to_markdown(store.chat(chat.id), [message])
    assert text.startswith("# line break # x\n") and "`````\n````\ncode\n````\n`````" in text


def test_what_is_asked_has_the_system_prompt_the_branch_and_the_parameters(store: Store) -> None:
    chat = store.create_chat("t", "be kind", None, {"temperature": 0.0, "max_tokens": 5})
    one = store.add_message(chat.id, None, "user", "hi")
    failed = store.add_message(chat.id, one.id, "assistant", "")
    two = store.add_message(chat.id, failed.id, "user", "again")
    asked = asked_of(chat, store.branch(two.id))
    assert [dict(message) for message in asked.messages] == [
        {"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"},
        {"role": "user", "content": "again"}]
    assert asked.sampling == {"temperature": 0.0} and asked.max_tokens == 5 and asked.keep_oldest
    chat = store.change_chat(chat.id, settings={"leave_out": True})
    assert not asked_of(chat, store.branch(two.id)).keep_oldest


@pytest.mark.parametrize(("name", "safe"), [
    ("a.txt", "a.txt"), ("../../etc/passwd", "passwd"), ("C:\\x\\y.txt", "y.txt"), ("a\x00\x1b[31m\u202eb", "a[31mb"),
    ("", "file"), ("/", "file"), ("x" * 999, "x" * 120)])
def test_file_names_are_only_names(name: str, safe: str) -> None:
    assert safe_name(name) == safe


@pytest.mark.parametrize(("data", "status"), [
    (b"\x00\x01", 415), (b"\xff\xfe\x00", 415), (b"  \n", 422), (b"\x80", 415), (b"%PDF-1.4 broken", 422)])
def test_files_without_text_are_refused(data: bytes, status: int) -> None:
    import asyncio

    with pytest.raises(Refusal) as caught:
        asyncio.run(text_of("f", data))
    assert caught.value.status == status


def test_text_is_read_as_it_was_written() -> None:
    import asyncio

    for data in (b"\xef\xbb\xbfh\xc3\xa9", "h\u00e9".encode("utf-16")):
        assert asyncio.run(text_of("f.txt", data)) == "h\u00e9"


def test_titles_are_one_short_line() -> None:
    assert title_of("a\n  b") == "a b" and len(title_of("word " * 99)) == 60


@pytest.mark.parametrize("budget_mib", [300, 1500, 8000, 64000])
def test_three_models_are_suggested_that_suit_the_device(budget_mib: int) -> None:
    told = suggest(budget_mib * 2**20, Speeds(memory_bytes_s=2e10, disk_bytes_s=2e9))
    sizes = [one.file_bytes for one, _ in told]
    assert len(told) == 3 and sizes == sorted(sizes) and told[0][0].model == "smollm2-135m"
    assert budget_mib < 1000 or any(predicted.verdict == "fits" for _, predicted in told[1:])
