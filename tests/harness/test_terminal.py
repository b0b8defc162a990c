"""terminal.py: output that fails, at any write and in any way, neither ends the work nor changes its status."""

import errno
import io
import itertools
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

import checkpoint as ckpt
from harness import terminal
from harness.errors import MAX_MESSAGE, InputError, one_line, show
from harness.log import RunLog
from harness.stopping import exit_status
from tests.support.experiments import run

ROOT = Path(__file__).parents[2]
FORK = multiprocessing.get_context("fork")


class Failing(io.TextIOBase):
    """A stream of which some writes and flushes fail; `which` is told their number, from 0."""

    encoding = "utf-8"

    def __init__(self, error, which=lambda number: True):
        self.error, self.which, self.count = error, which, itertools.count()

    def _try(self):
        if self.which(next(self.count)):
            raise self.error

    def write(self, text):
        self._try()
        return len(text)

    def flush(self):
        self._try()


ERRORS = [
    *(OSError(getattr(errno, name), name) for name in ("EPIPE", "ENOSPC", "EIO", "EBADF", "EAGAIN")),
    ValueError("I/O operation on closed file"),
    UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range"),
]  # fmt: skip


def speak_everything():
    terminal.say("said\nin two lines")
    terminal.note("noted")
    terminal.warn("warned")
    terminal.error(InputError("wrong"))
    for _ in terminal.bar(range(3), "a bar", disable=False, mininterval=0):
        terminal.say("above the bar")
    terminal.settle()


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__ + str(error.args[0]))
def test_speaking_never_raises_whichever_write_fails(error, monkeypatch):
    failing = [lambda number, n=n: number == n for n in range(40)] + [lambda number: True, lambda number: number > 5]
    for which in failing:
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, Failing(error, which))
        speak_everything()
    for nothing in ("stdout", "stderr"):
        monkeypatch.setattr(sys, nothing, None)
    speak_everything()


@pytest.mark.parametrize(("number", "status"), [(0, 0), (1, 1), (2, 2)])
def test_a_job_keeps_its_status(number, status, monkeypatch):
    def job():
        speak_everything()
        if number == 1:
            raise InputError("wrong")
        return number

    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Failing(OSError(errno.EPIPE, "Broken pipe")))
    assert exit_status(job) == status


SCRIPT = """
import io, os, sys
from harness import terminal
from harness.errors import InputError
from harness.stopping import exit_status

def nothing(number):
    os.close(number)
    return None

def full(number):
    os.dup2(os.open("/dev/full", os.O_WRONLY), number)
    return open(number, "w")

def unread(number):
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, number)
    return open(number, "w", encoding="ascii")

def as_it_is(number):
    return (sys.stdout, sys.stderr)[number - 1]

def job(path, fails):
    for number in range(300):
        terminal.say(f"line {number} \\u00e9\\u2026 {'x' * 50}")
        terminal.warn("\\u00e9")
    for _ in terminal.bar(range(10), disable=False):
        pass
    with open(path, "w") as file:
        file.write("the work is done")
    if fails:
        raise InputError("wrong")

kinds = (nothing, full, unread, as_it_is)
cases = [(out, err, fails) for out in kinds for err in kinds for fails in (False, True)]
for out, err, fails in cases[:: int(sys.argv[2])]:
    path = os.path.join(sys.argv[1], f"{out.__name__}_{err.__name__}_{fails:d}")
    if (child := os.fork()) == 0:
        sys.stdout, sys.stderr = out(1), err(2)
        sys.exit(exit_status(lambda: job(path, fails)))
    with open(f"{path}.status", "w") as file:
        file.write(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
"""


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.soak)])
def test_the_interpreter_ends_with_the_status_of_the_work(every, tmp_path):
    """Whatever stdout and stderr are: closed, full, read by nobody."""
    command = [sys.executable, "-c", SCRIPT, tmp_path, str(every)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(command, env=environment, capture_output=True, timeout=300)
    assert result.returncode == 0 and b"Traceback" not in result.stderr, result.stderr[-2000:]
    assert b"Exception ignored" not in result.stderr
    outcomes = {path.stem: path.read_text() for path in tmp_path.glob("*.status")}
    assert len(outcomes) == -(-32 // every)
    for name, status in outcomes.items():
        assert (tmp_path / name).read_text() == "the work is done", name
        assert status == name[-1], (name, status)


def test_a_descriptor_that_was_closed_is_not_the_next_file(tmp_path):
    def job():
        os.close(2)

        def work():
            with open(tmp_path / "file", "w") as file:
                os.write(2, b"of a library in C")
                file.write("whole")
            return 0

        os._exit(exit_status(work))

    process = FORK.Process(target=job)
    process.start()
    process.join()
    assert process.exitcode == 0 and (tmp_path / "file").read_text() == "whole"


@pytest.mark.parametrize("failing", [[], [0], [1], [3], pytest.param(range(60), marks=pytest.mark.soak)])
def test_a_run_whose_output_fails_saves_what_it_would_have(config, tmp_path, monkeypatch, failing):
    """Once all of its writes fail, then the nth alone."""
    path, folder = config(), tmp_path / "runs" / "tiny"
    for number in failing or [None]:
        for name in ("stdout", "stderr"):
            which = (lambda n: True) if number is None else (lambda n, number=number: n == number)
            monkeypatch.setattr(sys, name, Failing(ERRORS[(number or 0) % len(ERRORS)], which))
        assert run("-c", path, "--max_iterations", 4, "--resume", "latest") == 0
        assert ckpt.load_checkpoint(folder / "waveflow_4")["iteration"] == 4
        (folder / "waveflow_4").unlink()


# --- TensorBoard


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), RuntimeError("odd"), ValueError("odd")])
@pytest.mark.parametrize("first", [0, 1, 5])
def test_tensorboard_may_fail_in_its_thread(error, first, tmp_path, monkeypatch, capsys):
    from tensorboard.summary.writer.record_writer import RecordWriter

    count, real = itertools.count(), RecordWriter.write

    def write(self, data):
        if next(count) >= first:
            raise error
        return real(self, data)

    monkeypatch.setattr(RecordWriter, "write", write)
    monkeypatch.setattr("threading.excepthook", lambda what: None)  # exit_status does so for what is not ours

    def job():
        log = RunLog(tmp_path, 0, ("iteration", "loss"), tensorboard=True)
        for iteration in range(1, 30):
            log.steps([(iteration, 0.5)])
            log.audio("sound", torch.zeros(100), 22_050, iteration)
        log.close()

    assert exit_status(job) == 0
    assert len((tmp_path / "losses.csv").read_text().splitlines()) == 30
    assert "Traceback" not in capsys.readouterr().err


def test_pictures_that_cannot_be_drawn_are_given_up(tmp_path, capsys):
    def draw():
        raise RuntimeError("no font\nanywhere")

    log = RunLog(tmp_path, 0, ("iteration", "loss"), tensorboard=True)
    log.figure("picture", draw, 1)
    log.steps([(1, 0.5)])
    log.close()
    assert capsys.readouterr().err == "warning: TensorBoard gets no more (RuntimeError: no font); training goes on\n"


# --- what is said


ODD = ["a\nb", "a\x1b[2Jb", "a\r\x07b", "\ud800", "\u202eabc", "\u2028", "\0", "x" * 10**6, "\n" * 10**6, "\x85"]


@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
def test_a_message_is_one_printable_line_of_bounded_length(text, capsys):
    for message in (str(InputError(f"{text}: refused")), one_line(text), one_line(show(text)), one_line(show([text]))):
        assert message.isprintable() and len(message) <= 12 * MAX_MESSAGE
    terminal.error(text)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said[:-1].isprintable()


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value, value]
    return value


LARGE = [10**5000, nested(60), {"a": nested(60)}, ["x" * 10**6] * 10**5, torch.zeros(10**6), 1 << 10**6]


@pytest.mark.parametrize("value", LARGE, ids=range(6))
def test_showing_a_value_is_quick(value):
    assert len(show(value)) <= 60


def test_what_libraries_warn_of_is_one_line_once(capsys):
    def job():
        for _ in range(3):
            warnings.warn("of a library\nin many lines", UserWarning, stacklevel=1)
            warnings.warn("old", DeprecationWarning, stacklevel=1)
            warnings.warn("overflow encountered in cast", RuntimeWarning, stacklevel=1)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        exit_status(job)
    assert capsys.readouterr().err == "warning: of a library\n"


class Terminal(io.StringIO):
    """A terminal, or with `of_a_log` a file, that remembers what was written."""

    def __init__(self, of_a_log=False):
        super().__init__()
        self.isatty = lambda: not of_a_log


def on(stream, monkeypatch, **environment):
    """What a command writes to stderr there."""
    monkeypatch.setattr(sys, "stderr", stream)
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    terminal.warn("a \x1b[2J")
    terminal.error("b")
    return stream.getvalue()


def test_warnings_and_errors_have_a_coloured_word_on_terminals_that_want_it(monkeypatch):
    plain = "warning: a \\x1b[2J\nerror: b\n"
    assert on(Terminal(), monkeypatch) == "\x1b[33mwarning:\x1b[0m a \\x1b[2J\n\x1b[31merror:\x1b[0m b\n"
    assert on(Terminal(), monkeypatch, NO_COLOR="1") == on(Terminal(), monkeypatch, TERM="dumb") == plain
    assert on(Terminal(of_a_log=True), monkeypatch) == plain


def test_a_bar_in_a_log_is_lines_and_nothing_where_the_work_is_short(monkeypatch):
    log = Terminal(of_a_log=True)
    monkeypatch.setattr(sys, "stderr", log)
    for _ in terminal.bar(range(3), "clips"):
        terminal.note("noted")
    assert log.getvalue() == 3 * "noted\n"
    monkeypatch.setattr(terminal, "LINE_SECONDS", 0.0)
    list(terminal.bar(range(3), "clips"))
    assert "\r" not in log.getvalue() and log.getvalue().count("clips:") == log.getvalue().count("\n") - 3 >= 3
    monkeypatch.setattr(sys, "stderr", Terminal())
    list(terminal.bar(range(3), "clips"))
    assert sys.stderr.getvalue().startswith("\rclips:   0%")


def test_a_quiet_command_says_warnings_errors_and_results(monkeypatch, capsys):
    def job():
        terminal.tell("under way")
        list(terminal.bar(range(3), delay=0))
        terminal.warn("careful")
        terminal.say("a result")
        raise InputError("wrong")

    assert exit_status(job, quiet=True) == 1
    assert capsys.readouterr() == ("a result\n", "warning: careful\nerror: wrong\n")
    exit_status(job)
    assert "under way\n" in capsys.readouterr().out  # quiet ends with its command


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.24, "4.2 s"), (75, "75 s"), (600, "10.0 min"), (9000, "2.5 h"), (260_000, "3.0 days")],
)
def test_durations_are_as_people_say_them(seconds, text):
    assert terminal.duration(seconds) == text


def hold_and_wait(held):
    with terminal.tqdm.get_lock():
        held.set()
        time.sleep(60)


def test_a_process_that_is_killed_while_it_speaks_silences_no_other(capsys):
    terminal.say("a lock is made now, before the processes part")
    held = FORK.Event()
    process = FORK.Process(target=hold_and_wait, args=(held,))
    process.start()
    assert held.wait(30)
    process.kill()
    process.join()
    speaking = threading.Thread(target=lambda: terminal.say("still here"), daemon=True)
    speaking.start()
    speaking.join(10)
    assert not speaking.is_alive() and "still here" in capsys.readouterr().out
