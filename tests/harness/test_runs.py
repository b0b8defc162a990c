"""runs.py: the lock, the record, stopping, bad steps, the exit status; alone and by the real command."""

import json
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import checkpoint as ckpt
from config import load_config
from harness import runs
from harness.errors import InputError
from harness.files import Appended
from harness.runs import BadSteps, StopRequest, exit_status, locked_run, record_start
from tests.support.experiments import ROOT, fails, losses, run

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
        assert f"process {os.getpid()} " in (tmp_path / "run" / runs.LOCK_NAME).read_text()


def test_a_lock_clears_away_what_killed_runs_left_half_written(holder, tmp_path):
    holder.kill()
    holder.join()
    folder = tmp_path / "run"
    debris, own, alive = (folder / f".waveflow_4.{number}.tmp" for number in (holder.pid, os.getpid(), os.getppid()))
    for path in (debris, own, alive, folder / ".hidden.tmp"):
        path.touch()
    with locked_run(folder):
        left = {path.name for path in folder.iterdir()}
    assert left == {runs.LOCK_NAME, alive.name, ".hidden.tmp"}


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
    first, second = map(json.loads, (folder / runs.RECORD_NAME).read_text().splitlines())
    assert first["config"] == json.loads(json.dumps(load_config(path).to_dict()))
    assert first["command"].endswith("train.py -c 'a b.json'") and first["directory"] == os.getcwd()
    assert (first["python"], first["torch"], first["version"]) == (
        platform.python_version(), torch.__version__, runs.VERSION)  # fmt: skip
    assert (first["iterations"][0], second["iterations"]) == (0, [4, 5])
    assert load_config(folder / runs.CONFIG_NAME) == load_config(path)  # every key spelt out, and usable as it is


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_the_checkout_itself(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, "-C", tmp_path, *arguments], check=True, capture_output=True)

    assert runs.git_commit(tmp_path) is None
    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "first")
    clean = runs.git_commit(tmp_path)
    assert len(clean) == 40
    (tmp_path / "file").write_text("two")
    assert runs.git_commit(tmp_path) == f"{clean}-dirty"
    (tmp_path / "inside").mkdir()
    assert runs.git_commit(tmp_path / "inside") is None


def test_a_full_disk_keeps_the_rows_for_later(tmp_path):
    table = Appended(tmp_path / "table")
    table.write("first\n")
    real, table._file = table._file, open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with pytest.raises(OSError, match="No space left"):
        table.write("second\n")
    table.close()
    table._file = real
    table.write("third\n")
    table.close()
    assert (tmp_path / "table").read_text() == "first\nsecond\nthird\n"


def test_a_record_of_facts_is_appended_whole(tmp_path):
    for number in range(3):
        record_start(tmp_path, {"a": number}, processes=2)
    records = [json.loads(line) for line in (tmp_path / runs.RECORD_NAME).read_text().splitlines()]
    assert [(record["config"], record["processes"]) for record in records] == [({"a": n}, 2) for n in range(3)]


# --- stopping


def test_a_signal_is_noted_and_its_status_is_the_conventional_one(capsys):
    for number in (signal.SIGINT, signal.SIGTERM):
        with StopRequest() as stop:
            assert not stop
            os.kill(os.getpid(), number)
            assert stop
        assert stop.exit_status(saved=True, finished=False) == 128 + number
        assert stop.exit_status(saved=False, finished=False) == 1
    assert "could not be saved" in capsys.readouterr().err


def test_a_second_interrupt_stops_at_once_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_what_may_be_left_half_done_ends_at_the_first_signal():
    done = []

    def work():
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("never reached")

    with StopRequest() as stop:
        stop.unless_stopped(work)
        stop.unless_stopped(lambda: done.append("not even begun"))
        assert stop and done == []


def test_max_hours_saves_and_ends_well(config, tmp_path, capsys):
    path = config(train_config__iters_per_checkpoint=100_000)
    assert run("-c", path, "--max_iterations", 1000, "--max_hours", 1e-9) == 0
    assert "stopped after --max_hours; go on with --resume latest" in capsys.readouterr().out
    [saved] = ckpt.list_checkpoints(tmp_path / "runs" / "tiny")
    assert ckpt.load_checkpoint(saved)["iteration"] == len(losses(saved.parent)) == 1


def test_errors_become_one_line_and_a_status(capsys):
    def raises(error):
        def job():
            raise error

        return job

    assert exit_status(lambda: None) == 0
    assert exit_status(lambda: 3) == 3
    assert exit_status(raises(KeyboardInterrupt())) == 130
    for error in (InputError("words"), OSError(28, "No space left"), MemoryError(), torch.OutOfMemoryError("a\nb"),
                  RuntimeError("DefaultCPUAllocator: can't allocate memory")):  # fmt: skip
        capsys.readouterr()
        assert exit_status(raises(error)) == 1
        assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        exit_status(raises(RuntimeError("a mistake of ours")))


# --- bad steps


def test_bad_steps_in_a_row_are_reported_and_then_end_the_run():
    said = []
    judge = BadSteps(3, lambda step: [f"clip{step}.wav", "shared.wav"], said.append)
    nan, inf = float("nan"), float("inf")
    assert judge.judge(1, 0.5, 1.0)
    assert not judge.judge(2, nan, 1.0) and not judge.judge(3, 0.5, inf)
    assert judge.judge(4, 0.5, 1.0) and judge.in_a_row == 0
    assert not judge.judge(5, nan, nan) and not judge.judge(6, nan, nan)
    assert [line.split(":")[1].strip() for line in said] == [f"iteration {n}" for n in (2, 3, 5, 6)]
    assert "clip1.wav, shared.wav" in said[0]
    with pytest.raises(InputError) as error:
        judge.judge(7, nan, nan)
    for words in ("3 steps in a row, up to iteration 7", "clip4.wav, shared.wav, clip5.wav, clip6.wav"):
        assert words in str(error.value)


def test_bad_steps_of_before_a_resumption_count_and_long_lists_are_cut():
    judge = BadSteps(3, lambda step: [f"{step}-{i}.wav" for i in range(20)], lambda line: None, in_a_row=2)
    with pytest.raises(InputError, match=r"3 steps in a row, up to iteration 9; .* and 44 more"):
        judge.judge(9, float("nan"), 1.0)


# --- the same twice, and how many checkpoints stay


def test_deterministic_runs_have_the_same_losses(config, tmp_path):
    tables = []
    try:
        for name in ("one", "two"):
            path = config(train_config__output_directory=str(tmp_path / name))
            assert run("-c", path, "--deterministic", "--max_iterations", 4) == 0
            assert torch.are_deterministic_algorithms_enabled()
            tables.append(losses(tmp_path / name / "tiny"))
            torch.rand(7)  # whatever happened in between
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(tables[0]) == 4 and tables[0] == tables[1]


def iterations(folder):
    return [int(path.name.split("_")[1]) for path in ckpt.list_checkpoints(folder)]


def test_only_the_newest_checkpoints_stay_and_those_being_averaged(config, tmp_path):
    path, folder = config(train_config__iters_per_checkpoint=1), tmp_path / "runs" / "tiny"
    assert run("-c", path, "--max_iterations", 3) == 0
    assert iterations(folder) == [3, 2, 1]
    keep = ["--set", "train_config.keep_checkpoints=2"]
    assert run("-c", path, *keep, "-a", 2, "--max_iterations", 6) == 0
    assert iterations(folder) == [6, 5, 3, 2]  # of the average: 3 and 2
    assert run("-c", path, *keep, "--resume", "latest", "--max_iterations", 7) == 0
    assert iterations(folder) == [7, 6]


def test_interrupts_in_quick_succession_leave_a_run_that_goes_on(config, tmp_path):
    path, folder = config(train_config__iters_per_checkpoint=2), tmp_path / "runs" / "tiny"
    command, quietly = [sys.executable, ROOT / "train.py", "-c", path], {"stdout": subprocess.DEVNULL, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, **quietly)
    for _ in range(600):
        if ckpt.list_checkpoints(folder):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert run("-c", path, "--resume", "latest", "--max_iterations", iterations(folder)[0] + 1) == 0
