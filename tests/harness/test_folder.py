"""folder.py: the lock, the record, refusing and clearing; alone and by the real command."""

import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import time

import pytest
import torch

from config import load_config
from harness import folder as folders
from harness.errors import InputError
from harness.folder import clear, git_commit, locked_run, record_more, record_start, require_empty, require_only
from tests.support.experiments import fails, run

FORK = multiprocessing.get_context("fork")


# --- the lock


def hold(folder, ready):
    with locked_run(folder):
        ready.set()
        time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path / "run"."""
    ready = FORK.Event()
    process = FORK.Process(target=hold, args=(tmp_path / "run", ready))
    process.start()
    assert ready.wait(30)
    yield process
    process.kill()
    process.join()


def test_a_second_run_in_the_same_folder_is_refused_and_told_whose_it_is(holder, tmp_path):
    named = rf"another run is writing there \(process {holder.pid} on "
    with pytest.raises(InputError, match=named), locked_run(tmp_path / "run"):
        pass


def test_the_command_refuses_a_folder_that_is_in_use(config, tmp_path, capsys):
    path, ready = config(), FORK.Event()
    other = FORK.Process(target=hold, args=(tmp_path / "runs" / "tiny", ready))
    other.start()
    try:
        assert ready.wait(30)
        assert "another run is writing there" in fails(capsys, "-c", path, "--max_iterations", 1)
        assert not (tmp_path / "runs" / "tiny" / "losses.csv").exists()
    finally:
        other.kill()
        other.join()


def test_a_killed_process_leaves_no_lock(holder, tmp_path):
    holder.kill()
    holder.join()
    with locked_run(tmp_path / "run"):
        assert f"process {os.getpid()} " in (tmp_path / "run" / folders.LOCK_NAME).read_text()


def test_a_lock_clears_away_what_killed_runs_left_half_written(holder, tmp_path):
    holder.kill()
    holder.join()
    folder = tmp_path / "run"
    debris, own, alive = (folder / f".waveflow_4.{number}.tmp" for number in (holder.pid, os.getpid(), os.getppid()))
    for path in (debris, own, alive, folder / ".hidden.tmp"):
        path.touch()
    with locked_run(folder):
        left = {path.name for path in folder.iterdir()}
    assert left == {folders.LOCK_NAME, alive.name, ".hidden.tmp"}


def test_a_folder_that_cannot_be_made_is_one_line(config, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    path = config(train_config__output_directory=str(tmp_path / "file" / "below"))
    assert "cannot be written" in fails(capsys, "-c", path, "--max_iterations", 1)


# --- the record


def test_a_run_folder_says_what_was_run(config, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "-c", "a b.json"])
    path, folder = config(), tmp_path / "runs" / "tiny"
    assert run("-c", path, "--max_iterations", 4) == 0
    assert run("-c", path, "--max_iterations", 5, "--resume", "latest") == 0
    lines = map(json.loads, (folder / folders.RECORD_NAME).read_text().splitlines())
    first, second = (line for line in lines if "started" in line)
    assert first["config"] == json.loads(json.dumps(load_config(path).to_dict()))
    assert first["command"].endswith("train.py -c 'a b.json'") and first["directory"] == os.getcwd()
    assert (first["python"], first["torch"], first["version"]) == (
        platform.python_version(), torch.__version__, folders.VERSION)  # fmt: skip
    assert (first["iterations"][0], second["iterations"]) == (0, [4, 5])
    assert load_config(folder / folders.CONFIG_NAME) == load_config(path)  # every key spelt out, and usable as it is


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_the_checkout_itself(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, "-C", tmp_path, *arguments], check=True, capture_output=True)

    assert git_commit(tmp_path) is None
    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "first")
    clean = git_commit(tmp_path)
    assert len(clean) == 40
    (tmp_path / "file").write_text("two")
    assert git_commit(tmp_path) == f"{clean}-dirty"
    (tmp_path / "inside").mkdir()
    assert git_commit(tmp_path / "inside") is None


def test_a_record_of_facts_is_appended_whole(tmp_path):
    for number in range(3):
        record_start(tmp_path, {"a": number}, processes=2)
    records = [json.loads(line) for line in (tmp_path / folders.RECORD_NAME).read_text().splitlines()]
    assert [(record["config"], record["processes"]) for record in records] == [({"a": n}, 2) for n in range(3)]


# --- refusing and clearing


def test_what_turns_out_later_is_added_to_the_record_of_a_run_only(tmp_path):
    record_more(tmp_path, synthesis={"queue": "one"})
    assert list(tmp_path.iterdir()) == []
    record_start(tmp_path, {})
    record_more(tmp_path, synthesis={"queue": "one"})
    first, second = (json.loads(line) for line in (tmp_path / folders.RECORD_NAME).read_text().splitlines())
    assert "started" in first and "started" not in second and second["synthesis"] == {"queue": "one"}


def test_the_kernels_of_synthesis_are_in_the_record(trained):
    path, folder = trained
    record = folder / folders.RECORD_NAME
    [once] = [more for more in map(json.loads, record.read_text().splitlines()) if "synthesis" in more]
    assert once["iteration"] == 4 and once["synthesis"]["queue"] == "WinogradQueue"  # of the first of two samples
    assert run("-c", path, "--synthesize", "--precision", "bfloat16") == 0
    last = json.loads(record.read_text().splitlines()[-1])
    assert last["synthesis"]["queue"] in ("DirectQueue", "WinogradQueue")  # the former where there are such products
    assert str(folder / "synthesis") in last["output"]


def test_a_new_run_needs_an_empty_folder(tmp_path):
    folder = tmp_path / "run"
    require_empty(folder, "words")
    folder.mkdir()
    (folder / folders.LOCK_NAME).touch()
    (folder / ".model_4.1.tmp").touch()
    require_empty(folder, "words")
    (folder / "model_1").touch()
    with pytest.raises(InputError, match="not empty; name another"):
        require_empty(folder, "name another")
    with pytest.raises(InputError, match="is a file, not a folder; name another"):
        require_empty(folder / "model_1", "name another")


def test_only_files_of_a_run_are_cleared(tmp_path):
    patterns = ("model_*", "samples")
    for name in ("model_1", "samples/1.png", "elsewhere/kept"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"also holds 'elsewhere', .* remove it yourself"):
        require_only(tmp_path, patterns)
    (tmp_path / "model_2").symlink_to(tmp_path / "elsewhere")
    clear(tmp_path, patterns)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["elsewhere", "elsewhere/kept"]
    require_only(tmp_path / "none", patterns)
