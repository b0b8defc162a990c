"""files.py: whole files or none, whatever goes wrong; what full disks and read-only folders do to the real command."""

import contextlib
import csv
import io
import math
import os
import resource
import subprocess

import pytest

import checkpoint as ckpt
from harness import files
from harness.errors import InputError
from harness.files import (
    Appended,
    RefusedFile,
    check_apart,
    in_a_name,
    line_blocks,
    open_file,
    read_text,
    remove_debris,
    write_keeping,
    write_table,
    written_whole,
)
from tests.support.experiments import fails, losses, run


def test_a_file_takes_its_place_in_one_step(tmp_path):
    path = tmp_path / "new folder" / "file"
    with written_whole(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists() and temporary.parent == path.parent
    assert path.read_text() == "whole" and os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_what_goes_wrong_leaves_the_old_file_alone(tmp_path, error):
    (tmp_path / "file").write_text("old")
    with pytest.raises(error), written_whole(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise error
    assert (tmp_path / "file").read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_data_reach_the_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(files.os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args)))
    with written_whole(tmp_path / "file") as temporary:
        temporary.write_text("x")
    assert calls == ["fsync", "replace", "fsync"]


@pytest.mark.parametrize("length", [253, 256])
def test_a_name_too_long_is_that_of_the_file_and_not_of_what_is_written_beside_it(tmp_path, length):
    path = tmp_path / ("n" * length)
    with pytest.raises(OSError, match="too long") as error, written_whole(path) as temporary:
        temporary.touch()
    assert error.value.filename == str(path)


def test_a_table_takes_any_name(tmp_path):
    """Names in another encoding, of control characters, of what csv quotes; the table is text in UTF-8."""
    names = ["x\udcff.wav", "a,b", 'q"', "line\nend", "\x1b[31m", "ü", ""]
    write_table(tmp_path / "table.csv", ((name, 1) for name in names))
    rows = list(csv.reader(io.StringIO(read_text(tmp_path / "table.csv", 2**20))))
    assert [name for name, _ in rows] == ["x\\udcff.wav", *names[1:]]


def test_nothing_is_written_over_what_is_read(tmp_path, monkeypatch):
    """Whatever the file is called at its two places."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("own")
    (tmp_path / "place").symlink_to(tmp_path, target_is_directory=True)
    os.link("own", "hard")
    others = [f"other {number}" for number in range(9)]
    for name in ("own", tmp_path / "own", "./folder/../own", "place/own", "link", "hard"):
        for outputs, inputs in ([*others, name], ["own", "x"]), (["own"], [*others, name]):
            with pytest.raises(InputError, match=r"which is read, and would be written over; go away$"):
                check_apart(outputs, inputs, "go away")
    check_apart([*others, "folder"], ["own", "nul\0", "\ud800", *others], "")


@pytest.mark.parametrize(
    ("number", "name"), [(1.0, "1"), (1, "1"), (0.5, "0.5"), (0.5000001, "0.5000001"), (1e-9, "1e-09"), (0.0, "0")]
)
def test_another_number_has_another_name(number, name):
    assert in_a_name(number) == name
    assert in_a_name(math.nextafter(number, 2)) != name


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def test_what_is_no_file_is_named_and_leaves_no_descriptor(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(bytes(99))
    before = descriptors()
    for name, error, words in (
        ("", IsADirectoryError, ""),
        ("pipe", RefusedFile, "a named pipe"),
        ("large", RefusedFile, "99 bytes, at most 10"),
        ("none", FileNotFoundError, ""),
    ):
        with pytest.raises(error, match=words) as raised:
            open_file(tmp_path / name, 10)
        assert error is RefusedFile or raised.value.filename in (str(tmp_path / name), tmp_path / name)
    assert descriptors() == before


@pytest.mark.parametrize("block", [1, 2, 3, 5, 7, 100])
def test_lines_come_by_blocks_whole(block, monkeypatch):
    monkeypatch.setattr(files, "BLOCK", block)
    content = b"one\n\n  \ntwo\r\nmuch too long\n1234567\n12345678\nlast\n" + b"\n" * 50 + b"unfinished"
    blocks = list(line_blocks(io.BytesIO(content), 7))
    assert [line for lines, _ in blocks for line in lines] == [b"one", b"two\r", b"1234567", b"last"]
    assert sum(overlong for _, overlong in blocks) == 2


def test_a_text_that_was_there_is_kept_beside_the_new_one(tmp_path):
    path = tmp_path / "list.txt"
    assert write_keeping(path, "a\n") is None and write_keeping(path, "a\n") is None
    assert write_keeping(path, "b\n") == tmp_path / "list.txt.1"
    assert write_keeping(path, "c\n") == tmp_path / "list.txt.2"
    path.unlink()
    (tmp_path / "own").write_text("linked")
    path.symlink_to("own")
    assert write_keeping(path, "d\n") == tmp_path / "list.txt.3"
    path.unlink()
    path.mkdir()
    assert write_keeping(path, "e\n") == tmp_path / "list.txt.4"
    found = {name: (tmp_path / name).read_text() for name in os.listdir(tmp_path) if (tmp_path / name).is_file()}
    kept = {"list.txt.1": "a\n", "list.txt.2": "b\n", "list.txt.3": "linked"}
    assert found == {"list.txt": "e\n", "own": "linked", **kept} and (tmp_path / "list.txt.4").is_dir()


def test_a_link_in_the_way_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / f".file.{os.getpid()}.tmp").symlink_to(tmp_path / "precious")
    with written_whole(tmp_path / "file") as temporary:
        temporary.write_text("x")
    assert (tmp_path / "precious").read_text() == "precious" and not (tmp_path / "file").is_symlink()


def test_debris_of_dead_processes_goes_and_everything_else_stays(tmp_path):
    (tmp_path / "samples").mkdir()
    dead = 2**22 + 1  # beyond the largest process number of Linux
    names = [f".a.{dead}.tmp", f"samples/.b.{dead}.tmp", f".c.{os.getppid()}.tmp", ".d.tmp", f"e.{dead}.tmp",
             f".f.{2**70}.tmp"]  # fmt: skip
    for name in names:
        (tmp_path / name).touch()
    removed = {str(path.relative_to(tmp_path)) for path in remove_debris(tmp_path)}
    assert removed == {names[0], names[1], names[5]}
    assert all((tmp_path / name).exists() == (name not in removed) for name in names)


# --- disks that refuse


@contextlib.contextmanager
def mounted(folder, *options):
    """A file system of its own at `folder`; the test is skipped where this user may not mount."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_during_a_save_keeps_older_checkpoints_and_later_goes_on(config, tmp_path, capsys):
    """A few MB of memory as a disk: room for the first checkpoint, then none, then room again."""
    assert run("-c", config(), "--max_iterations", 8) == 0
    expected, table = tmp_path / "runs" / "tiny" / "waveflow_8", losses(tmp_path / "runs" / "tiny")
    with mounted(tmp_path / "disk", "size=4m") as disk:
        path, folder = config(train_config__output_directory=str(disk)), disk / "tiny"
        assert run("-c", path, "--max_iterations", 4) == 0
        free = os.statvfs(disk)
        (disk / "filler").write_bytes(bytes(free.f_bavail * free.f_frsize - 20_000))
        capsys.readouterr()
        assert run("-c", path, "--max_iterations", 8, "--resume", "latest") == 1
        said = capsys.readouterr()
        assert "checkpoint of iteration 8 was not saved (No space left on device)" in said.out + said.err
        assert "error: the last checkpoint could not be saved; free some space" in said.err
        assert [p.name for p in folder.iterdir() if p.name.startswith((".", "waveflow"))] == ["waveflow_4"]
        ckpt.load_checkpoint(folder / "waveflow_4")
        (disk / "filler").unlink()
        assert run("-c", path, "--max_iterations", 8, "--resume", "latest") == 0
        assert same_weights(folder / "waveflow_8", expected)
        assert losses(folder) == table


def same_weights(one, other):
    one, other = (ckpt.load_checkpoint(path)["model"] for path in (one, other))
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def test_a_file_that_may_not_grow_is_reported_and_training_goes_on(config, tmp_path, capfd):
    """The same without a mount: a limit on the size of files, lifted after the first refused save."""
    path, folder = config(), tmp_path / "runs" / "tiny"
    real, refused = ckpt.save_checkpoint, []

    def limited(target, *arguments, **entries):
        if target.name != "waveflow_4":
            return real(target, *arguments, **entries)
        refused.append(target)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        try:
            return real(target, *arguments, **entries)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ckpt, "save_checkpoint", limited)
        assert run("-c", path, "--max_iterations", 8) == 0
    said = capfd.readouterr()
    assert refused and "checkpoint of iteration 4 was not saved (File too large)" in said.out + said.err
    assert [p.name for p in folder.iterdir() if p.name.startswith((".", "waveflow"))] == ["waveflow_8"]
    assert len(losses(folder)) == 8


def test_a_read_only_output_folder_is_one_line(config, tmp_path, capsys):
    with mounted(tmp_path / "disk", "size=1m", "ro") as disk:
        path = config(train_config__output_directory=str(disk))
        assert "cannot be written (Read-only file system)" in fails(capsys, "-c", path, "--max_iterations", 1)


def test_an_average_that_cannot_be_written_is_used_all_the_same(config, tmp_path, capsys):
    path, folder = config(train_config__iters_per_checkpoint=1), tmp_path / "runs" / "tiny"
    assert run("-c", path, "--max_iterations", 2) == 0
    with mounted(tmp_path / "disk", "size=4m") as disk:
        for number in (1, 2):
            (disk / f"waveflow_{number}").write_bytes((folder / f"waveflow_{number}").read_bytes())
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        source = ["--set", f"train_config.checkpoint_path={disk}"]
        capsys.readouterr()
        assert run("-c", path, "-a", 2, "--evaluate", *source) == 0
        assert "warning: the average could not be written" in capsys.readouterr().err
        assert "Read-only" in fails(capsys, "-c", path, "-a", 2, "--max_iterations", 3, *source)


# --- data that goes away


@pytest.mark.parametrize("workers", [0, 1])
def test_a_wav_deleted_during_training_is_named_and_the_checkpoints_stay(config, corpus, tmp_path, capsys, workers):
    clips = [tmp_path / f"own{i}.wav" for i in range(2)]
    for clip in clips:
        clip.write_bytes((corpus / "clip0.wav").read_bytes())
    (tmp_path / "own.txt").write_text("\n".join(map(str, clips)))
    changes = {"train_config__num_workers": workers, "train_config__iters_per_checkpoint": 2}
    path = config(data_config__training_files=str(tmp_path / "own.txt"), **changes)
    real = ckpt.save_checkpoint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ckpt, "save_checkpoint", lambda *args, **entries: (real(*args, **entries), clips[1].unlink()))
        message = fails(capsys, "-c", path, "--max_iterations", 100)
    assert "own1.wav: no such wav file" in message
    assert ckpt.load_checkpoint(tmp_path / "runs" / "tiny" / "waveflow_2")["iteration"] == 2


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
