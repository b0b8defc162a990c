"""Thousands of damaged files: each is read, or refused by one line; quickly, and in bounded memory.

A part of them by default, all of them with `make soak`.
"""

import hashlib
import io
import json
import os
import random
import resource
import tarfile
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.io import savemat

import checkpoint as ckpt
from audio import MelSpectrogram, read_mel, read_wav, wav_length, write_wav
from config import load_config
from corpora.ljspeech import Corpus, prepare_corpus
from harness.checkpoints import restore_random_state
from harness.downloads import RemoteFile
from harness.errors import InputError
from image_density_experiments import checkpoint as image_ckpt
from image_density_experiments import datasets
from model import build_model
from tests.support.vocoders import random_vocoder, small_config
from training.resuming import load_optimizer

ROOT = Path(__file__).parents[2]
SECONDS, MEGABYTES = 5, 500  # for one file; for all of a kind


def amounts(quick, full):
    """The number of mutants: the quick one by default, the full one with `make soak`."""
    return pytest.mark.parametrize("n", [quick, pytest.param(full, marks=pytest.mark.soak)])


def mutant(content, dice):
    """The content with bytes changed, removed, repeated or made extreme; cut short, at times."""
    content = bytearray(content)
    for _ in range(dice.choice((0, 1, 1, 2, 4, 8))):
        at = dice.randrange(len(content)) if dice.random() < 0.5 else dice.randrange(min(len(content), 256))
        size = dice.choice((1, 1, 2, 4, 8))
        change = dice.randrange(4)
        if change == 0:
            content[at : at + size] = dice.randbytes(size)
        elif change == 1:
            content[at : at + size] = dice.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * size
        elif change == 2 and len(content) > 64:
            del content[at : at + size]
        else:
            content[at:at] = content[at : at + 16 * size]
    return bytes(content[: dice.randrange(len(content) + 1)] if dice.random() < 0.2 else content)


def read_or_refused(read, path):
    """Whether the file was read; False where one line said why not. Anything else is raised."""
    began = time.monotonic()
    try:
        with warnings.catch_warnings(action="ignore"):
            read(path)
        answer = True
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000, str(error)
        answer = False
    assert time.monotonic() - began < SECONDS, f"{path} took {time.monotonic() - began:.1f} s"
    return answer


def try_mutants(n, originals, read, tmp_path, name=lambda original: original.name):
    """Read n mutants of the originals; at least one of them must be refused. Returns how many could be read."""
    dice, before = random.Random(0), peak_megabytes()
    contents = [(original, original.read_bytes()) for original in originals]
    n_read = 0
    for number in range(n):
        original, content = contents[number % len(contents)]
        path = tmp_path / "mutants" / name(original)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(mutant(content, dice))
        try:
            n_read += read_or_refused(read, path)
        except Exception as error:
            pytest.fail(f"mutant {number} of {original.name}: {type(error).__name__}: {error}")
    assert n_read < n
    assert peak_megabytes() - before < MEGABYTES
    print(f"{n} mutants: {n_read} read, {n - n_read} refused, {peak_megabytes() - before:.0f} MB more at the peak")


def peak_megabytes():
    """The most memory this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --- wavs, configs, checkpoints, mels


@amounts(150, 1000)
def test_mutated_wavs(n, tmp_path):
    original = tmp_path / "clip.wav"
    write_wav(original, torch.randn(2_000) * 0.1, 22_050)

    def read(path):
        assert len(read_wav(path, 22_050)) == wav_length(path, 22_050) > 0

    try_mutants(n, [original], read, tmp_path)


def use_config(path):
    """Load it, and build what it describes if that is small enough to be quick."""
    config = load_config(path)
    if config.waveflow_config.weights_at_least < 10**6:
        build_model(config.waveflow_config)
    if config.data_config.filter_length * config.data_config.n_mel_channels < 10**6:
        MelSpectrogram(config.data_config)


@amounts(100, 500)
def test_configs_with_mutated_bytes(n, tmp_path):
    try_mutants(n, sorted((ROOT / "configs").glob("*.json")), use_config, tmp_path)


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20),
    st.sampled_from([2**31, 2**63, 10**400, -1]),
    st.lists(st.integers(), max_size=4), st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
)  # fmt: skip


def check_odd_config(folder, changes):
    sections = json.loads((ROOT / "configs" / "waveflow-h16-r64-spline.json").read_text())
    for place, value in changes:
        name, keys = place[0], list(sections[place[0]])
        sections[name][keys[place[1] % len(keys)]] = value
    path = folder / "config.json"
    path.write_text(json.dumps(sections))
    read_or_refused(use_config, path)


PLACES = st.tuples(st.sampled_from(["train_config", "data_config", "waveflow_config"]), st.integers(0, 40))
CHANGES = st.lists(st.tuples(PLACES, ODD), min_size=1, max_size=3)
FOLDER = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=100, deadline=None, suppress_health_check=FOLDER)
@given(changes=CHANGES)
def test_configs_with_odd_values(tmp_path, changes):
    check_odd_config(tmp_path, changes)


@pytest.mark.soak
@settings(max_examples=1000, deadline=None, suppress_health_check=FOLDER)
@given(changes=CHANGES)
def test_a_thousand_configs_with_odd_values(tmp_path, changes):
    check_odd_config(tmp_path, changes)


@amounts(60, 500)
def test_mutated_checkpoints(n, tmp_path):
    """Through everything that resuming does with them."""
    model = random_vocoder()
    optimizer = torch.optim.Adam(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    entries = {"iteration": 7, "optimizer": optimizer.state_dict(), "config": {"waveflow_config": small_config()},
               "training_state": {"bad_steps": 0, **ckpt.random_state(torch.device("cpu"))}}  # fmt: skip
    ckpt.save_checkpoint(tmp_path / "waveflow_7", model, **entries)
    legacy = tmp_path / "waveflow_8"
    torch.save(torch.load(tmp_path / "waveflow_7", weights_only=True), legacy, _use_new_zipfile_serialization=False)

    def read(path):
        start = ckpt.read_checkpoint(path)
        ckpt.load_weights(model, start.weights)
        if start.optimizer is not None:
            load_optimizer(optimizer, model, start)
        if isinstance(start.training_state, dict):
            restore_random_state(start.training_state, torch.device("cpu"), "words")
        image_ckpt.load_checkpoint(path)

    state = torch.get_rng_state()
    try_mutants(n, [tmp_path / "waveflow_7", legacy], read, tmp_path)
    torch.set_rng_state(state)


# --- archives and arrays


@amounts(40, 100)
def test_mutated_mels(n, tmp_path):
    np.save(tmp_path / "mel.npy", np.zeros((80, 30), np.float32))
    torch.save(torch.zeros(80, 30), tmp_path / "mel.pt")
    try_mutants(n, [tmp_path / "mel.npy", tmp_path / "mel.pt"], lambda path: read_mel(path, 80), tmp_path)


def stated(path, **more):
    """What the publisher of a file would say of it, damage included, so that the parsers see it."""
    content = path.read_bytes()
    return {"url": f"http://127.0.0.1:9/{path.name}", "sha256": hashlib.sha256(content).hexdigest(),
            "size": len(content), **more}  # fmt: skip


@amounts(30, 100)
@pytest.mark.parametrize("suffix", ["", "bz2"])
def test_mutated_speech_archives(n, tmp_path, suffix):
    source = tmp_path / "LJSpeech-1.1"
    write_wav(source / "wavs" / "a.wav", torch.zeros(100), 22_050)
    (source / "metadata.csv").write_text("a|b|c\n")
    original = tmp_path / f"speech.tar{suffix and '.' + suffix}"
    with tarfile.open(original, f"w:{suffix}") as tar:
        tar.add(source, arcname="LJSpeech-1.1")

    def read(path):
        facts = stated(path, folder="LJSpeech-1.1", n_clips=1, n_test=0, unpacked_size=10_000)
        target = tmp_path / f"corpus{time.monotonic_ns()}"
        try:
            prepare_corpus(target, Corpus(**facts), archive=path)
        finally:
            assert not list(target.glob("*.part"))

    before = set(os.listdir(tmp_path))
    try_mutants(n, [original], read, tmp_path)
    assert {name for name in os.listdir(tmp_path) if not name.startswith("corpus")} == before | {"mutants"}


@amounts(30, 100)
def test_mutated_cifar_archives(n, tmp_path, monkeypatch):
    original = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(original, "w:gz") as archive:
        for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            info.size = 3073
            archive.addfile(info, io.BytesIO(bytes([3]) + os.urandom(3072)))

    def read(path):
        monkeypatch.setattr(datasets, "CIFAR10", RemoteFile(**stated(path)))
        datasets.load_images("cifar10", path)

    try_mutants(n, [original], read, tmp_path)


@amounts(30, 100)
def test_mutated_svhn_files(n, tmp_path, monkeypatch):
    original = tmp_path / "train_32x32.mat"
    pictures = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 3), dtype=np.uint8)
    savemat(original, {"X": pictures, "y": np.array([[1], [2], [10]], np.uint8)})

    def read(path):
        monkeypatch.setattr(datasets, "SVHN_TRAIN", RemoteFile(**stated(path)))
        monkeypatch.setattr(datasets, "SVHN_TEST", RemoteFile(**stated(path)))
        datasets.load_images("svhn", path.parent)

    try_mutants(n, [original], read, tmp_path)


@amounts(30, 100)
@pytest.mark.parametrize("own", [False, True])
def test_mutated_image_arrays(n, tmp_path, own):
    """Downsampled ImageNet as .npz; the user's own images as .npy."""
    images = np.random.default_rng(0).integers(0, 256, (4, 32 * 32 * 3), dtype=np.uint8)
    original = tmp_path / ("images.npy" if own else "train_data_batch_1.npz")
    if own:
        np.save(original, images.reshape(4, 32, 32, 3))
    else:
        np.savez(original, data=images, labels=np.arange(1, 5))

    def read(path):
        if own:
            datasets.load_images("folder", path)
            return
        path.with_suffix(".images.npy").unlink(missing_ok=True)
        path.with_name("val_data.npz").write_bytes(original.read_bytes())
        datasets.load_images("imagenet32", path.parent)

    try_mutants(n, [original], read, tmp_path)
