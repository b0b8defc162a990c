"""What may lie where a file is expected: every reader refuses it at once, and no writer follows or waits for it."""

import os
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint as ckpt
from audio import read_mel
from config import load_config
from corpora.ljspeech import LJSPEECH, prepare_corpus
from data import read_file_list
from harness import folder as folders
from harness.arrays import read_archive
from harness.downloads import damage_named
from harness.errors import InputError
from harness.files import Appended, RefusedFile, read_bytes
from harness.folder import locked_run, record_start
from harness.log import RunLog
from image_density_experiments import checkpoint as image_ckpt
from image_density_experiments.compare import read_run
from image_density_experiments.datasets import load_images
from image_density_experiments.options import read_options
from image_density_experiments.pictures import ImageForm, read_picture
from image_density_experiments.runs import data_options

SPARSE = 2**33


def pipe(path):
    os.mkfifo(path)


def endless(path):
    path.symlink_to("/dev/zero")


def random_device(path):
    path.symlink_to("/dev/urandom")


def socket_file(path):
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(path.parent)  # their names may not be long
        server.bind(path.name)


def sparse(path):
    with open(path, "wb") as file:
        file.truncate(SPARSE)


def dangling(path):
    path.symlink_to("nowhere")


def circular(path):
    path.symlink_to(path.name)


def unreadable_bytes(path):
    path.write_bytes(b"\xff\xfe\0" * 10)


THINGS = (pipe, endless, random_device, socket_file, sparse, dangling, circular, Path.mkdir, unreadable_bytes)


def compared(path):
    """As the table of a run, beside a checkpoint."""
    torch.save({"model": {"a": torch.zeros(1)}}, path.parent / "glow_model_1.pt")
    path.rename(path.with_name("epochs.csv"))
    read_run(path.parent)


def picture(path):
    read_picture(path, ImageForm())


def batch(path):
    """As one of CIFAR-10, unpacked."""
    folder = path.parent / "cifar"
    folder.mkdir()
    path.rename(folder / "data_batch_1")
    (folder / "test_batch").write_bytes(b"")
    load_images("cifar10", folder)


def archive(path):
    with damage_named(path, "no archive"):
        read_archive(path)


def imagenet(path):
    path.rename(path.with_name("train_data_batch_1.npz"))
    np.savez(path.with_name("val_data.npz"), data=np.zeros((1, 3072), np.uint8), labels=np.ones(1, np.int64))
    load_images("imagenet32", path.parent)


def metadata(path):
    path.rename(path.with_name("metadata.csv"))
    prepare_corpus(path.parent / "corpus", LJSPEECH, unpacked=path.parent)


def run_record(path):
    """The config beside a checkpoint that does not say on which images it was trained; it may be missing."""
    path.rename(path.with_name("config.json"))
    start = image_ckpt.Checkpoint(path=path.with_name("glow_model_1.pt"), weights={})
    data_options(read_options(["--evaluate"]), start)


READERS = {
    "picture.png": picture,
    "picture": lambda path: load_images("folder", path.parent),
    "images.npy": lambda path: load_images("folder", path),
    "images.npz": lambda path: load_images("folder", path),
    "archive": archive,
    "data_batch": batch,
    "imagenet.npz": imagenet,
    "metadata": metadata,
    "run record": run_record,
    "config": load_config,
    "list": read_file_list,
    "checkpoint": ckpt.load_checkpoint,
    "image checkpoint": image_ckpt.load_checkpoint,
    "weights.safetensors": ckpt.load_checkpoint,
    "mel.npy": lambda path: read_mel(path, 80),
    "mel.pt": lambda path: read_mel(path, 80),
    "table": compared,
}


FOLDERS = ("table", "picture", "data_batch", "imagenet.npz", "metadata", "run record")  # of files that have their names


def at_once(work):
    """The one line that refuses it, within a second."""
    began = time.monotonic()
    with pytest.raises(InputError) as raised:
        work()
    assert time.monotonic() - began < 1
    assert "\n" not in str(raised.value) and "Errno" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("thing", THINGS, ids=lambda thing: thing.__name__)
@pytest.mark.parametrize("reader", READERS)
def test_readers_refuse_what_is_no_file_of_a_sensible_size(reader, thing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = reader if "." in reader else "waveflow_1"
    thing(tmp_path / name)
    assert str(tmp_path) in at_once(lambda: READERS[reader](tmp_path / name))


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b", "x" * 300, "\n", "\x1b[2J", "y" * 10_000])
@pytest.mark.parametrize("reader", [reader for reader in READERS if reader not in FOLDERS])
def test_names_that_no_file_can_have_are_refused(reader, name):
    message = at_once(lambda: READERS[reader](name))
    assert len(message) < 3000 and message.isprintable()


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 10)
    real = os.fstat
    monkeypatch.setattr(os, "fstat", lambda number: (real(number), path.write_bytes(b"x" * 100))[0])
    with pytest.raises(RefusedFile, match="it grows"):
        read_bytes(path, 50)


# --- writing


def precious_link(path, precious):
    path.symlink_to(precious)


def hard_link(path, precious):
    os.link(precious, path)


def link_to_a_device(path, precious):
    path.symlink_to("/dev/full")


IN_THE_WAY = (
    precious_link, hard_link, link_to_a_device,
    *(lambda path, precious, thing=thing: thing(path) for thing in (pipe, endless, socket_file, dangling, Path.mkdir)),
)  # fmt: skip


def hold(folder):
    with locked_run(folder):
        pass


WRITERS = {
    folders.LOCK_NAME: hold,
    folders.RECORD_NAME: lambda folder: record_start(folder, {}),
    folders.CONFIG_NAME: lambda folder: record_start(folder, {}),
    "losses.csv": lambda folder: RunLog(folder, 0, ("iteration", "loss")).close(),
    "table": lambda folder: Appended(folder / "table").close(),
    "waveflow_1": lambda folder: ckpt.save_whole(folder / "waveflow_1", {"a": 1}),
}


@pytest.mark.parametrize("number", range(len(IN_THE_WAY)))
@pytest.mark.parametrize("name", WRITERS)
def test_writers_replace_or_refuse_what_is_in_their_way_and_leave_its_target_alone(name, number, tmp_path, monkeypatch):
    folder, precious = tmp_path / "run", tmp_path / "precious"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    precious.write_text("precious")
    IN_THE_WAY[number](folder / name, precious)
    began = time.monotonic()
    try:
        WRITERS[name](folder)
        assert (folder / name).is_file() and not (folder / name).is_symlink()
    except (InputError, OSError) as error:
        assert str(folder / name) in str(error) or str(folder) in str(error)
    assert time.monotonic() - began < 1
    assert precious.read_text() == "precious" and not (tmp_path / "nowhere").exists()


def test_a_damaged_table_begins_anew_and_says_so(tmp_path, capsys):
    (tmp_path / "losses.csv").write_text("iteration,loss\n1,0.5\n" + "9" * 5000 + ",1\n²,1\n2,0.25\n3,0.1\n1\n")
    RunLog(tmp_path, 2, ("iteration", "loss")).close()
    assert (tmp_path / "losses.csv").read_text() == "iteration,loss\n1,0.5\n2,0.25\n"
    (tmp_path / "losses.csv").unlink()
    os.mkfifo(tmp_path / "losses.csv")
    RunLog(tmp_path, 2, ("iteration", "loss")).close()
    assert "a named pipe, expected a file" in capsys.readouterr().err


@pytest.mark.parametrize("cell", ["9" * 5000, "nan", "inf", "", "x", "1.5", "-1"])
def test_odd_cells_of_a_table_are_refused(cell, tmp_path):
    torch.save({"model": {"a": torch.zeros(1)}, "config": {}}, tmp_path / "glow_model_1.pt")
    header = "iteration,epoch,train_bits_per_dim,test_bits_per_dim,images_per_second\n"
    (tmp_path / "epochs.csv").write_text(f"{header}{cell},1,1,1,1\n")
    assert "iteration is " in at_once(lambda: read_run(tmp_path))


def test_arrays_of_a_promise_are_refused(tmp_path):
    header = np.lib.format.header_data_from_array_1_0(np.zeros((1, 1), np.float32)) | {"shape": (80, 2**40)}
    with open(tmp_path / "mel.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
    at_once(lambda: read_mel(tmp_path / "mel.npy", 80))
