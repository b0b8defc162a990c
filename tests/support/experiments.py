"""A corpus of made-up speech, experiment files on it, and the real command in this process."""

import csv
import json
import math
import os
import sys
from pathlib import Path

import librosa.filters  # noqa: F401 (slow to import: done once, before the killed runs are forked off)
import torch

import train
from audio import read_wav, write_wav
from tests.support.vocoders import small_config

ROOT = Path(__file__).parents[2]
RATE = 22_050


def tone(path, seconds, pitch):
    """A vowel-like sound: harmonics under a moving envelope, with a little noise."""
    time_axis = torch.arange(int(seconds * RATE)) / RATE
    harmonics = sum(torch.sin(2 * math.pi * pitch * k * time_axis) / k for k in range(1, 12))
    envelope = 0.5 + 0.4 * torch.sin(2 * math.pi * 3 * time_axis)
    noise = torch.randn(len(time_axis), generator=torch.Generator().manual_seed(int(pitch)))
    write_wav(path, 0.1 * envelope * harmonics + 0.01 * noise, RATE)
    return path


def write_corpus(folder):
    """Eight wavs and their two lists."""
    clips = [tone(folder / f"clip{i}.wav", 0.25 + 0.02 * i, 100 + 17 * i) for i in range(8)]
    (folder / "train.txt").write_text("\n".join(map(str, clips[:6])))
    (folder / "test.txt").write_text("\n".join(map(str, clips[6:])))
    return folder


def write_config(path, corpus, output, **changes):
    """An experiment file of a tiny model; changes are section__key=value. Returns its path."""
    sections = {
        "train_config": {
            "output_directory": str(output),
            "iters_per_checkpoint": 4,
            "batch_size": 2,
            "num_workers": 0,
            "with_tensorboard": False,
        },
        "data_config": {
            "training_files": str(corpus / "train.txt"),
            "test_files": str(corpus / "test.txt"),
            "segment_length": 2048,
        },
        "waveflow_config": small_config(model_name="tiny"),
    }
    for name, value in changes.items():
        section, key = name.split("__")
        sections[section][key] = value
    path.write_text(json.dumps(sections))
    return str(path)


def run(*arguments):
    """train.py; returns the exit status."""
    return train.main([str(argument) for argument in arguments])


def run_quietly(arguments, log):
    """train.py as a process of its own: what it says goes to the end of a file, and its status to the shell."""
    log_all_to(log)
    sys.exit(run(*arguments))


def log_all_to(path):
    """Send this process's output to the end of a file, that of Python and of libraries in C."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = open(path, "a", buffering=1)  # noqa: SIM115 (pytest had put its own in their place)


def losses(folder):
    """The training log: (iteration, loss, gradient norm) as text."""
    with open(folder / "losses.csv", newline="") as file:
        return [(row["iteration"], row["loss"], row["grad_norm"]) for row in csv.DictReader(file)]


def fails(capsys, *arguments):
    """Run a job that must fail; return the one line that it says."""
    assert run(*arguments) == 1
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


def wavs(folder):
    """What was synthesized, in steps of 16 bits; the wavs are removed."""
    found = {}
    for path in sorted((folder / "synthesis").rglob("*.wav")):
        found[path.stem] = (read_wav(path, RATE) * 32_768).round().int()
        path.unlink()
    return found


def assert_same_wavs(found, expected):
    """To one step of 16 bits."""
    assert found.keys() == expected.keys()
    for name, audio in expected.items():
        torch.testing.assert_close(found[name], audio, atol=1, rtol=0)
