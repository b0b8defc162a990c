"""A training on silence, through the real command: its likelihood has no bound, and that is said once."""

import re

import pytest
import torch

from audio import write_wav
from tests.support.experiments import RATE, losses, run, write_config, write_corpus


def train_on(folder, corpus, *flags, **changes):
    config = write_config(folder / "config.json", corpus, folder / "runs", **changes)
    assert run("-c", config, "--max_iterations", 12, "--set", "train_config.learning_rate=0.1", *flags) == 0
    return folder / "runs" / "tiny"


@pytest.mark.parametrize("order", [0, 24])
def test_likelihoods_beyond_16_bit_audio_are_said_once(tmp_path, capsys, order):
    corpus = write_corpus(tmp_path)
    for path in tmp_path.glob("*.wav"):
        write_wav(path, torch.zeros(RATE // 4), RATE)
    folder = train_on(tmp_path, corpus, waveflow_config__linear_prediction=order)
    [iteration] = re.findall(
        r"iteration (\d+): [\d.]+ nats/sample are beyond what 16-bit audio can have \(10\.4\), as for silence; "
        r"look at the files with --check_data",
        capsys.readouterr().err,
    )
    beyond = [int(number) for number, loss, _ in losses(folder) if float(loss) < -10.4]
    assert len(beyond) > 1 and int(iteration) == beyond[0]


def test_speech_is_believed(tmp_path, capsys):
    train_on(tmp_path, write_corpus(tmp_path))
    assert "16-bit audio" not in capsys.readouterr().err
