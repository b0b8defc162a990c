"""stopping.py: signals, hours, errors and the exit status; alone and by the real command."""

import contextlib
import ctypes
import io
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import checkpoint as ckpt
import train
from harness import stopping as stopping_room
from harness import terminal
from harness.errors import InputError
from harness.stopping import SAME_INTERRUPT, SharedStop, StopRequest, exit_status, safe_point, uninterrupted
from jobs import files
from jobs.report_runs import Run as ReportedRun
from jobs.synthesis import encoded
from tests.support.experiments import ROOT, log_all_to, losses, run, run_quietly

FORK = multiprocessing.get_context("fork")


def test_a_signal_is_noted_and_its_status_is_the_conventional_one(capsys, monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)  # though these tests run under nohup
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        with StopRequest() as stop:
            assert not stop
            os.kill(os.getpid(), number)
            assert stop
        assert stop.exit_status(saved=True, finished=False, resume="go on") == 128 + number
        assert stop.exit_status(saved=False, finished=False, resume="go on") == 1
    said = capsys.readouterr()
    assert said.out == "stopped by SIGINT; go on\nstopped by SIGTERM; go on\nstopped by SIGHUP; go on\n"
    assert said.err == "error: the last checkpoint could not be saved; free some space, go on\n" * 3


def test_a_process_of_a_pool_sees_a_wish_that_came_before_it_began():
    with SharedStop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        there = SharedStop(stop.shared)  # as in such a process
        assert stop.signal == there.signal == signal.SIGTERM and stop and there
    later = SharedStop()
    there = SharedStop(later.shared)
    assert not there
    later.signal = signal.SIGINT
    assert there.signal == signal.SIGINT


def test_a_hang_up_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def signalled(numbers, pause):
    """The exit status of a process that gets signals while it has a StopRequest, one after the other."""

    def run():
        with StopRequest():
            for number in numbers:
                os.kill(os.getpid(), number)
                time.sleep(pause)
        os._exit(7)

    process = FORK.Process(target=run)
    process.start()
    process.join()
    return process.exitcode


INT, TERM = signal.SIGINT, signal.SIGTERM


def test_a_second_interrupt_stops_at_once_and_handlers_are_put_back(capfd):
    before = signal.getsignal(signal.SIGINT)
    with StopRequest():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
    pause = SAME_INTERRUPT + 0.05
    assert signalled([INT, INT], pause) == 130
    assert signalled([TERM, INT, TERM, INT], pause) == 130
    assert capfd.readouterr().err.split() == ["interrupted"] * 2


@pytest.mark.parametrize(
    ("numbers", "pause"),
    [([TERM, INT], 0.3), ([INT, TERM], 0.3), ([TERM] * 5, 0), ([TERM, TERM, INT, TERM], 0), ([INT] * 5, 0),
     ([INT, TERM] * 3, 0)],
)  # fmt: skip
def test_signals_as_batch_queues_and_launchers_send_them_are_one_wish(numbers, pause):
    assert signalled(numbers, pause) == 7


def test_what_may_be_left_half_done_ends_at_its_next_safe_point_and_nowhere_else():
    done = []

    def work():
        try:
            safe_point()
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("what was begun is finished")
            safe_point()
            done.append("never reached")
        finally:
            done.append("put back")

    safe_point()
    with StopRequest() as stop:
        assert stop.unless_stopped(work) is None
        assert stop.unless_stopped(lambda: done.append("not even begun")) is None
        safe_point()  # not in such a work
        assert stop and done == ["what was begun is finished", "put back"]


def test_a_process_that_inherits_the_handler_leaves_the_signal_alone():
    with StopRequest() as stop:
        reading, writing = os.pipe()
        if os.fork() == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os.write(writing, b"1" if stop else b"0")
            os._exit(0)
        assert os.read(reading, 1) == b"0" and not stop
        os.wait()


def test_max_hours_saves_and_ends_well(config, tmp_path, capsys):
    path = config(train_config__iters_per_checkpoint=100_000)
    assert run("-c", path, "--max_iterations", 1000, "--max_hours", 1e-9) == 0
    assert "stopped after 1e-09 hours; go on with --resume latest" in capsys.readouterr().out
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
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1 and "()" not in message
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        exit_status(raises(RuntimeError("a mistake of ours")))


def swallow():
    with contextlib.suppress(KeyboardInterrupt):  # as a weakref's callback does
        os.kill(os.getpid(), signal.SIGINT)


def translate():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        raise AttributeError("as a library says it") from None


def interrupt_again_and_again():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        for _ in range(20):
            os.kill(os.getpid(), signal.SIGINT)


def swallow_and_reach_a_safe_point():
    swallow()
    safe_point()


def hold():
    with uninterrupted():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        except KeyboardInterrupt:
            os._exit(98)


def swallow_in_a_callback():
    callback = ctypes.CFUNCTYPE(None)(lambda: os.kill(os.getpid(), signal.SIGINT))
    callback()  # nothing can leave it: Python would tell of it with a traceback


def swallow_and_fail():
    swallow()
    raise InputError("nothing to be told any more")


def swallow_and_wait():
    swallow()
    time.sleep(SAME_INTERRUPT + 0.05)
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    "job",
    [
        *(translate, interrupt_again_and_again, swallow, swallow_and_reach_a_safe_point, swallow_in_a_callback),
        *(swallow_and_fail, hold, swallow_and_wait),
    ],
)
def test_an_interrupt_ends_a_command_whatever_is_made_of_it(job, tmp_path):
    def command():
        log_all_to(tmp_path / "said.txt")
        os._exit(exit_status(job))

    process = FORK.Process(target=command)
    process.start()
    process.join()
    assert process.exitcode == 130
    assert (tmp_path / "said.txt").read_text().split() == ["interrupted"]


def test_a_command_puts_the_handler_back_and_leaves_those_of_others_alone():
    python = signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) is python
    assert exit_status(lambda: int(signal.getsignal(signal.SIGINT) is python)) == 0
    assert signal.getsignal(signal.SIGINT) is python
    for other in (signal.SIG_IGN, lambda number, frame: None):
        signal.signal(signal.SIGINT, other)
        try:
            assert exit_status(lambda other=other: int(signal.getsignal(signal.SIGINT) is not other)) == 0
        finally:
            signal.signal(signal.SIGINT, python)
    found = []
    thread = threading.Thread(target=lambda: found.append(exit_status(lambda: 5)))
    thread.start()
    thread.join()
    assert found == [5]


def test_an_interrupt_lost_before_a_run_began_stops_it():
    def job():
        swallow()
        with StopRequest() as stop:
            assert stop.signal == signal.SIGINT
            safe_point()  # the request has it now
            return stop.exit_status(saved=True, finished=False, resume="go on")

    assert exit_status(job) == 130


def test_a_command_is_interrupted_without_a_traceback_wherever_it_is(tmp_path):
    """At every line of exit_status and of what it enters and leaves."""

    def work(kind):
        return {"done": lambda: 0, "failed": failing, "stopped": stopping}[kind]

    def failing():
        raise InputError("words")

    def stopping():
        with StopRequest() as stop:
            return stop.exit_status(saved=True, finished=True, resume="go on")

    def command(kind, line, log):
        log_all_to(log)
        seen = itertools.count(1)

        def trace(frame, event, argument):
            ours = frame.f_code.co_filename in (stopping_room.__file__, terminal.__file__)
            if event == "line" and ours and next(seen) == line:
                sys.settrace(None)
                os.kill(os.getpid(), signal.SIGINT)
            return trace if ours else None

        signal.signal(INT, signal.SIG_DFL)
        sys.settrace(trace)
        status = exit_status(work(kind))
        sys.settrace(None)
        os._exit(99 if next(seen) <= line else status)

    for kind, status in (("done", 0), ("failed", 1), ("stopped", 0)):
        for line in range(1, 400):
            log = tmp_path / f"{kind}{line}.txt"
            process = FORK.Process(target=command, args=(kind, line, log))
            process.start()
            process.join()
            if process.exitcode == 99:
                break
            assert process.exitcode in (status, 130, -INT), (kind, line)
            assert "Traceback" not in log.read_text(), (kind, line)
        assert 20 < line < 399


@pytest.mark.parametrize("numbers", [[INT], [INT] * 3, [TERM], [TERM, INT], [INT, TERM]], ids=str)
def test_a_signal_while_a_run_is_prepared_costs_nothing_and_is_not_lost(config, tmp_path, numbers):
    """Wherever reading the checkpoint, the corpus or making the model was."""
    path, log, folder = config(), tmp_path / "log.txt", tmp_path / "runs" / "tiny"
    assert run("-c", path, "--max_iterations", 8) == 0
    points = ["checkpoint.load_checkpoint", "training.trainer.build_model", "training.trainer.make_train_loader",
              "training.trainer.checked_state", "train.read_test_files", "train.record_start"]  # fmt: skip
    for point in points:

        def command(point=point):
            owner, _, name = point.rpartition(".")
            real = getattr(sys.modules[owner], name)

            def call(*arguments, **options):
                for number in numbers:
                    os.kill(os.getpid(), number)
                return real(*arguments, **options)

            setattr(sys.modules[owner], name, call)
            run_quietly(["-c", path, "--resume", "latest"], log)

        process = FORK.Process(target=command)
        process.start()
        process.join(60)
        assert process.exitcode in (128 + INT, 128 + TERM), point
        said = log.read_text()
        assert said.splitlines()[-1].startswith("stopped by SIG") and "Traceback" not in said, point
        assert "refused" not in said and [p.name for p in ckpt.list_checkpoints(folder)] == ["waveflow_8", "waveflow_4"]
    assert run("-c", path, "--resume", "latest", "--max_iterations", 9) == 0


def stopped_at(point, log, *arguments):
    """The exit status of train.py that gets SIGTERM when it comes to a function, and what it said."""

    def command():
        owner, _, name = point.rpartition(".")
        real = getattr(sys.modules[owner], name)

        def call(*values, **options):
            os.kill(os.getpid(), TERM)
            return real(*values, **options)

        setattr(sys.modules[owner], name, call)
        run_quietly(arguments, log)

    log.write_text("")
    process = FORK.Process(target=command)
    process.start()
    process.join(120)
    return process.exitcode, log.read_text()


def test_advice_after_a_stop_is_of_what_was_saved(config, tmp_path):
    path, log = config(), tmp_path / "log.txt"
    status, said = stopped_at("training.trainer.build_model", log, "-c", path)
    assert status == 143 and said.endswith("stopped by SIGTERM; nothing was saved yet: start it again as before\n")
    assert run("-c", path, "--max_iterations", 4) == 0
    again = ("-c", path, "--resume", "latest", "--max_iterations", 4)
    status, said = stopped_at("training.trainer.build_model", log, *again)
    assert status == 143 and "already at iteration 4" in said  # not 0, by which a chain of jobs would go on
    assert said.endswith("stopped by SIGTERM; go on with --resume latest\n")


def test_an_interrupt_while_libsndfile_writes_gives_no_sound_instead_of_a_wrong_one(monkeypatch):
    sent, results = [], []

    class Interrupting(io.BytesIO):
        def write(self, content):
            if not sent:
                sent.append(True)
                os.kill(os.getpid(), INT)
            return super().write(content)

    monkeypatch.setattr("jobs.synthesis.io.BytesIO", Interrupting)
    assert exit_status(lambda: results.append(encoded(torch.linspace(-0.9, 0.9, 50_000), 22_050, "wav"))) == 130
    assert sent and results == []


def test_an_interrupt_is_no_note_of_a_report():
    told, done = ReportedRun(Path("run"), "run"), []

    def read():
        swallow()
        raise InputError("damaged, as a library has it")

    assert exit_status(lambda: done.append(told.attempt("checkpoint", read))) == 130
    assert told.notes == done == []


@pytest.mark.parametrize("seconds", [0, 0.5, 1.5, *(pytest.param(n / 10, marks=pytest.mark.soak) for n in range(60))])
def test_ctrl_c_while_python_imports_and_a_run_begins_is_no_traceback(config, seconds):
    """The real command, from its first import of a library on."""
    begin = """
import runpy, sys
sys.addaudithook(lambda event, told: print(told[0], flush=True) if event == "import" and told[0] == "torch" else None)
runpy.run_path("train.py", run_name="__main__")
"""
    command = [sys.executable, "-c", begin, "-c", config(), "--resume", "latest"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "torch\n"
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode in (130, -INT) and "Traceback" not in err + out
    assert not err or err == "interrupted\n"


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
    iteration = int(ckpt.list_checkpoints(folder)[0].name.split("_")[1])
    assert run("-c", path, "--resume", "latest", "--max_iterations", iteration + 1) == 0


def storm_of_interrupts(command, log, after):
    """The exit status of a forked command that gets three SIGINTs some seconds after it began."""

    def start():
        torch.set_num_threads(1)
        log_all_to(log)
        sys.exit(command())

    handler = signal.signal(INT, signal.SIG_DFL)  # as harness.start has it
    process = FORK.Process(target=start)
    process.start()
    signal.signal(INT, handler)
    process.join(after)
    for pause in (0, 0.01, 0):
        if process.is_alive():
            os.kill(process.pid, INT)
            time.sleep(pause)
    process.join(120)
    return process.exitcode


@pytest.mark.parametrize("n", [4, pytest.param(60, marks=pytest.mark.soak)])
@pytest.mark.parametrize("job", ["evaluate", "synthesize", "average", "check_data", "report", "metrics", "convert"])
def test_interrupts_end_every_job_in_one_word(trained, tmp_path, job, n):
    path, folder = trained
    jobs = {
        "evaluate": lambda: train.main(["-c", path, "--evaluate"]),
        "synthesize": lambda: train.main(["-c", path, "--synthesize", "--output", str(tmp_path / "heard")]),
        "average": lambda: train.main(["-c", path, "-a", "2", "--evaluate"]),
        "check_data": lambda: train.main(["-c", path, "--check_data"]),
        "report": lambda: train.main(["-c", path, "--report", "--output", str(tmp_path / "page.html")]),
        "metrics": lambda: train.main(["-c", path, "--evaluate", "--metrics"]),
        "convert": lambda: files.main(["convert", str(folder / "waveflow_8"), str(tmp_path / "weights.safetensors")]),
    }
    log, began = tmp_path / "log.txt", time.monotonic()
    assert storm_of_interrupts(jobs[job], log, 120) == 0, log.read_text()
    whole = time.monotonic() - began
    statuses = set()
    for instant in range(n):
        log.write_text("")
        (tmp_path / "weights.safetensors").unlink(missing_ok=True)
        status = storm_of_interrupts(jobs[job], log, whole * instant / n)
        said = log.read_text()
        assert status in (0, 130, -INT) and "Traceback" not in said and "refused" not in said, said
        assert status != 130 or said.splitlines()[-1] == "interrupted"
        statuses.add(status)
    assert statuses & {130, -INT}
