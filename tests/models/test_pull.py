"""Pulling by name: which source and file, what is here already, space, parts, and two processes at once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fake_hub import FakeHub, drop_after, gate, status
from recorder import Recorder

from edgert.errors import DownloadError, ModelNotFound, NoSpace
from edgert.models.catalog import Catalog
from edgert.models.hub import Hub
from edgert.models.partial import SPACE_MARGIN_BYTES, partial_path
from edgert.models.pull import pull
from edgert.paths import Paths

REPO = "user/Repo-GGUF"
CONTENT = bytes(i * 11 % 241 for i in range(40_000))
PARTS = {f"Q6_K/m-Q6_K-0000{n}-of-00003.gguf": bytes([n]) * 1000 * n for n in (1, 2, 3)}


@pytest.fixture
def served(hub_server: FakeHub) -> FakeHub:
    hub_server.repos[REPO] = {"README.md": b"x", "m-Q8_0.gguf": b"eight", "m-Q4_K_M.gguf": CONTENT, **PARTS}
    return hub_server


def models(catalog: Catalog) -> Path:
    return catalog.paths.models


def test_a_repository_is_pulled_to_user_repo_file(catalog: Catalog, served: FakeHub, hub: Hub,
                                                  progress: Recorder) -> None:
    path = pull(REPO, catalog, progress, hub=hub)
    assert path == models(catalog) / REPO / "m-Q4_K_M.gguf"
    assert path.read_bytes() == CONTENT
    assert progress.totals == progress.here_at_finish == [len(CONTENT)]
    assert catalog.find(REPO) == catalog.find("M-q4_k_m") == path


def test_a_quantisation_in_any_case_is_pulled(catalog: Catalog, served: FakeHub, hub: Hub, progress: Recorder) -> None:
    assert pull(f"{REPO}:q8_0", catalog, progress, hub=hub).read_bytes() == b"eight"


def test_all_parts_are_pulled_and_the_first_is_the_model(catalog: Catalog, served: FakeHub, hub: Hub,
                                                         progress: Recorder) -> None:
    path = pull(f"{REPO}:Q6_K", catalog, progress, hub=hub)
    assert path.name == "m-Q6_K-00001-of-00003.gguf"
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == {
        name.rpartition("/")[2]: content for name, content in PARTS.items()}
    assert progress.totals == progress.here_at_finish == [6000]


def test_parts_that_are_here_are_not_fetched_again(catalog: Catalog, served: FakeHub, hub: Hub,
                                                   progress: Recorder) -> None:
    path = pull(f"{REPO}:Q6_K", catalog, progress, hub=hub)
    path.with_name("m-Q6_K-00002-of-00003.gguf").unlink()
    catalog.refresh()
    served.served_bytes = 0
    assert pull(f"{REPO}:Q6_K", catalog, progress, hub=hub) == path
    assert served.served_bytes == 2000
    assert progress.totals[-1] == progress.here_at_finish[-1] == 2000


def test_a_repository_that_lacks_a_part_is_an_error_before_the_first_byte(
        catalog: Catalog, served: FakeHub, hub: Hub, progress: Recorder) -> None:
    del served.repos[REPO]["Q6_K/m-Q6_K-00002-of-00003.gguf"]
    with pytest.raises(DownloadError, match=r"m-Q6_K-00002-of-00003\.gguf"):
        pull(f"{REPO}:Q6_K", catalog, progress, hub=hub)
    assert served.served_bytes == 0


def test_a_quantisation_that_is_not_there_names_those_that_are(catalog: Catalog, served: FakeHub, hub: Hub,
                                                               progress: Recorder) -> None:
    with pytest.raises(DownloadError) as caught:
        pull(f"{REPO}:Q2_K", catalog, progress, hub=hub)
    assert "no Q2_K" in caught.value.message
    assert "m-Q8_0.gguf, m-Q4_K_M.gguf" in caught.value.next_step


def test_a_repository_without_ggufs_says_so(catalog: Catalog, served: FakeHub, hub: Hub, progress: Recorder) -> None:
    served.repos[REPO] = {"model.safetensors": b"x"}
    with pytest.raises(DownloadError, match="no GGUF"):
        pull(REPO, catalog, progress, hub=hub)


def test_what_is_here_is_said_at_once_without_asking_the_hub(catalog: Catalog, served: FakeHub, hub: Hub,
                                                             progress: Recorder) -> None:
    path = pull(REPO, catalog, progress, hub=hub)
    served.requests.clear()
    assert pull(REPO, catalog, progress, hub=hub) == path
    assert pull("m-Q4_K_M", catalog, progress, hub=hub) == path
    assert served.requests == []
    assert progress.said(f"already here: {path}")


def test_a_bare_repository_of_which_another_file_is_here_asks_the_hub(catalog: Catalog, served: FakeHub, hub: Hub,
                                                                      progress: Recorder) -> None:
    pull(f"{REPO}:Q8_0", catalog, progress, hub=hub)
    assert pull(REPO, catalog, progress, hub=hub).name == "m-Q4_K_M.gguf"


def test_a_model_of_another_program_is_used_where_it_lies(home: Path, catalog: Catalog, served: FakeHub, hub: Hub,
                                                          progress: Recorder) -> None:
    theirs = home / ".lmstudio/models" / REPO / "m-Q4_K_M.gguf"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"GGUF")
    assert pull(f"{REPO}:Q4_K_M", catalog, progress, hub=hub) == theirs
    assert served.requests == []
    assert not models(catalog).exists()


def test_no_space_is_said_before_the_first_byte(catalog: Catalog, served: FakeHub, hub: Hub,
                                                progress: Recorder) -> None:
    with pytest.raises(NoSpace) as caught:
        pull(REPO, catalog, progress, hub=hub, free=lambda directory: len(CONTENT))
    assert caught.value.needed_bytes == len(CONTENT) + SPACE_MARGIN_BYTES
    assert served.file_requests == []
    assert not models(catalog).exists()


def test_space_is_asked_for_what_is_missing_only(catalog: Catalog, served: FakeHub, hub: Hub,
                                                 progress: Recorder) -> None:
    served.faults.extend([drop_after(30_000), status(400)])
    with pytest.raises(DownloadError):
        pull(REPO, catalog, progress, hub=hub)
    path = pull(REPO, catalog, progress, hub=hub, free=lambda directory: 10_000 + SPACE_MARGIN_BYTES)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("evil", ["../../../evil.gguf", "/tmp/evil.gguf", "a/../../../../evil.gguf"])
def test_a_listing_cannot_write_outside(home: Path, catalog: Catalog, served: FakeHub, hub: Hub, progress: Recorder,
                                        evil: str) -> None:
    served.listing = [served.entry(evil, CONTENT)]
    with pytest.raises(DownloadError, match="no GGUF"):
        pull(REPO, catalog, progress, hub=hub)
    assert list(home.iterdir()) == []


def test_a_partial_is_listed_as_unfinished_but_not_found(catalog: Catalog, served: FakeHub, hub: Hub,
                                                         progress: Recorder) -> None:
    served.faults.extend([drop_after(30_000), status(400)])
    with pytest.raises(DownloadError):
        pull(REPO, catalog, progress, hub=hub)
    catalog.refresh()
    (entry,) = catalog.list()
    assert (entry.unfinished, entry.problem, entry.size_bytes) == (True, "unfinished download", 30_000)
    with pytest.raises(ModelNotFound):
        catalog.find("m-Q4_K_M")


def test_a_name_that_no_source_has_names_those_that_are(catalog: Catalog, progress: Recorder) -> None:
    with pytest.raises(ModelNotFound) as caught:
        pull("smollm2-135n", catalog, progress)
    assert caught.value.near == ("smollm2-135m",)
    assert "user/repo[:quant]" in caught.value.next_step


def test_offline_is_said(catalog: Catalog, served: FakeHub, progress: Recorder) -> None:
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE"):
        pull(REPO, catalog, progress, environ={"HF_ENDPOINT": served.url, "HF_HUB_OFFLINE": "1"})
    assert served.requests == []


def test_the_environment_names_endpoint_and_token(catalog: Catalog, served: FakeHub, progress: Recorder) -> None:
    served.token = "hf_x"
    pull(REPO, catalog, progress, environ={"HF_ENDPOINT": served.url + "/", "HF_TOKEN": "hf_x"})
    assert served.requests[0].path == f"/api/models/{REPO}/tree/main?recursive=true"


def test_a_directory_that_cannot_be_written_is_an_error_with_a_way_out(home: Path, served: FakeHub, hub: Hub,
                                                                       progress: Recorder) -> None:
    (home / "file").write_bytes(b"")
    catalog = Catalog(Paths(home / "file/models", home, home), environ={"HOME": str(home)})
    with pytest.raises(DownloadError, match="EDGERT_HOME"):
        pull(REPO, catalog, progress, hub=hub, free=lambda directory: 2**40)


def test_two_processes_that_pull_one_file_do_not_damage_it(home: Path, served: FakeHub) -> None:
    reached, go_on = threading.Event(), threading.Event()
    served.faults.append(gate(20_000, reached, go_on))
    command = [sys.executable, str(Path(__file__).with_name("pull_in_a_process.py")), REPO, str(home)]
    environ = {**os.environ, "HF_ENDPOINT": served.url}
    first = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)
    second = None
    try:
        assert reached.wait(20)
        second = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)
        assert second.stdout is not None
        while "another process" not in (line := second.stdout.readline()):
            assert line, "the second process ended without waiting"
        assert second.poll() is None
        go_on.set()
        assert first.wait(20) == 0
        assert second.wait(20) == 0
    finally:
        go_on.set()
        for process in filter(None, (first, second)):
            process.kill()
            process.communicate()
    target = home / "models" / REPO / "m-Q4_K_M.gguf"
    assert target.read_bytes() == CONTENT
    assert list(target.parent.iterdir()) == [target]
    assert served.served_bytes == len(CONTENT)  # once


def test_a_killed_process_leaves_bytes_that_the_next_one_uses(home: Path, catalog: Catalog, served: FakeHub, hub: Hub,
                                                              progress: Recorder) -> None:
    reached, go_on = threading.Event(), threading.Event()
    served.faults.append(gate(20_000, reached, go_on))
    script = Path(__file__).with_name("pull_in_a_process.py")
    process = subprocess.Popen([sys.executable, str(script), REPO, str(home / "edgert")],
                               env={**os.environ, "HF_ENDPOINT": served.url}, stdout=subprocess.DEVNULL)
    target = models(catalog) / REPO / "m-Q4_K_M.gguf"
    try:
        assert reached.wait(20)
        while not partial_path(target).exists() or partial_path(target).stat().st_size < 20_000:
            assert process.poll() is None
    finally:
        process.kill()
        process.wait()
        go_on.set()
    before_bytes = served.served_bytes
    assert pull(REPO, catalog, progress, hub=hub).read_bytes() == CONTENT
    assert served.file_requests[-1].headers["range"] == "bytes=20000-"
    assert served.served_bytes - before_bytes <= 2 * (len(CONTENT) - 20_000)  # the killed one's rest may count too
