"""The chat database's history: numbered steps, each run once. A step that has shipped is never changed."""

from __future__ import annotations

import sqlite3

_FIRST = """
CREATE TABLE chats (
    id TEXT PRIMARY KEY, title TEXT NOT NULL, system TEXT NOT NULL DEFAULT '', model TEXT,
    settings TEXT NOT NULL DEFAULT '{}', leaf_id TEXT, created_ms INTEGER NOT NULL, updated_ms INTEGER NOT NULL);
CREATE INDEX chats_by_time ON chats (updated_ms);
CREATE TABLE messages (
    serial INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
    chat_id TEXT NOT NULL REFERENCES chats (id) ON DELETE CASCADE,
    parent_id TEXT REFERENCES messages (id) ON DELETE CASCADE,
    role TEXT NOT NULL CHECK (role IN ('user', 'assistant')), content TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('done', 'writing', 'stopped', 'failed', 'interrupted')),
    error TEXT, model TEXT, figures TEXT, created_ms INTEGER NOT NULL);
CREATE INDEX messages_by_chat ON messages (chat_id, serial);
CREATE INDEX messages_by_parent ON messages (parent_id);
CREATE TABLE attachments (
    id TEXT PRIMARY KEY, message_id TEXT REFERENCES messages (id) ON DELETE CASCADE, name TEXT NOT NULL,
    content TEXT NOT NULL, n_tokens INTEGER NOT NULL, created_ms INTEGER NOT NULL);
CREATE INDEX attachments_by_message ON attachments (message_id);
CREATE TABLE presets (
    id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, system TEXT NOT NULL, settings TEXT NOT NULL);
"""
# An answer is indexed once it is whole: its text changes with every token before.
_SEARCH = """
CREATE VIRTUAL TABLE found USING fts5 (content, chat_id UNINDEXED, message_id UNINDEXED,
                                       tokenize = 'unicode61 remove_diacritics 2');
CREATE TRIGGER found_insert AFTER INSERT ON messages WHEN new.status <> 'writing' BEGIN
    INSERT INTO found (content, chat_id, message_id) VALUES (new.content, new.chat_id, new.id); END;
CREATE TRIGGER found_update AFTER UPDATE OF content, status ON messages WHEN new.status <> 'writing' BEGIN
    DELETE FROM found WHERE message_id = new.id;
    INSERT INTO found (content, chat_id, message_id) VALUES (new.content, new.chat_id, new.id); END;
CREATE TRIGGER found_delete AFTER DELETE ON messages BEGIN DELETE FROM found WHERE message_id = old.id; END;
CREATE TRIGGER found_title AFTER INSERT ON chats BEGIN
    INSERT INTO found (content, chat_id, message_id) VALUES (new.title, new.id, ''); END;
CREATE TRIGGER found_retitle AFTER UPDATE OF title ON chats BEGIN
    DELETE FROM found WHERE chat_id = new.id AND message_id = '';
    INSERT INTO found (content, chat_id, message_id) VALUES (new.title, new.id, ''); END;
CREATE TRIGGER found_untitle AFTER DELETE ON chats BEGIN DELETE FROM found WHERE chat_id = old.id; END;
"""
MIGRATIONS = ((1, _FIRST), (2, _SEARCH))


def migrate(connection: sqlite3.Connection) -> None:
    """Bring the database to the newest form, each step in a transaction of its own."""
    connection.execute("CREATE TABLE IF NOT EXISTS migrations (number INTEGER PRIMARY KEY, at TEXT NOT NULL)")
    done = {number for (number,) in connection.execute("SELECT number FROM migrations")}
    for number, script in MIGRATIONS:
        if number not in done:
            connection.executescript(f"BEGIN IMMEDIATE; {script} INSERT INTO migrations VALUES ({number}, "
                                     "datetime('now')); COMMIT;")
