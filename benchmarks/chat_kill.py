"""Kills a process that writes chats without pause, at random moments: is every finished message still there?

    python benchmarks/chat_kill.py --times 100
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from apps.chat.store import Store

WRITER = """
import sys
from pathlib import Path
from apps.chat.store import Store
store = Store(Path(sys.argv[1]))
chat = store.create_chat("busy")
number = 0
while True:
    one = store.add_message(chat.id, None, "assistant", "", status="writing")
    for part in range(3):
        store.write(one.id, f"part {part}", "writing")
    store.write(one.id, f"answer {number}", "done")
    print(one.id, number, flush=True)
    number += 1
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance, n_finished, n_lost = random.Random(args.seed), 0, 0
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "chats.sqlite3"
        for _ in range(args.times):
            process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(chance.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
            finished = [line.split() for line in process.stdout if line.endswith("\n")]
            process.wait()
            store = Store(path)
            n_lost += sum(store.message(one).content != f"answer {number}" for one, number in finished)
            n_finished += len(finished)
            store.close()
    print(f"{args.times} kills, {n_finished} finished messages, {n_lost} lost")
    sys.exit(n_lost > 0)


if __name__ == "__main__":
    main()
