"""A stream is the whole, chunk by chunk."""

import numpy as np
import pytest
import torch

from config import DataConfig
from harness.errors import InputError
from synthesis.streaming import Reach, frame_noise
from tests.support.vocoders import random_vocoder
from vocoder import Vocoder

FRAMES = 150


def mel_of(frames, bands=80):
    return torch.randn(bands, frames, generator=torch.Generator().manual_seed(0)) - 5


def whole(vocoder, mel, temp, seed):
    """The audio [T] of the whole mel with the noise of a stream."""
    height, hop = vocoder.model.config.n_height, vocoder.hop_length
    noise = temp * frame_noise(torch.Generator().manual_seed(seed), mel.size(1) - 1, hop).flatten()
    samples = torch.cat([noise, noise.new_zeros(-len(noise) % height)])
    audio = vocoder.engine(mel[None], samples.view(-1, height).t()[None, None])[0, : len(noise)]
    return audio.clamp(-1, 1)


def data_of(changes):
    strides = changes.get("upsample_strides", (16, 16))
    return DataConfig(hop_length=strides[0] * strides[1])


@pytest.mark.parametrize(
    ("coupling_type", "changes"),
    [
        ("nanoflow", {}),
        ("waveflow", {"n_layer_per_cycle": 2, "bipartize": True, "n_flow": 2}),
        ("waveflow_official", {"n_flow": 3}),
        ("nanoflow", {"linear_prediction": 24}),
        ("nanoflow_decomp", {"upsample_strides": (10, 15), "n_height": 4}),
    ],
)
def test_a_stream_is_the_whole(coupling_type, changes):
    data = data_of(changes)
    vocoder = Vocoder(random_vocoder(coupling_type, data_config=data, **changes), data)
    mel = mel_of(FRAMES)
    expected = whole(vocoder, mel, temp=0.7, seed=3)
    chunks = list(vocoder.stream(mel, temp=0.7, seed=3))
    assert len(chunks) > 3 and max(map(len, chunks)) < len(expected) / 2
    torch.testing.assert_close(torch.cat(chunks), expected, atol=1e-4, rtol=0)


def test_frames_still_being_made_are_not_waited_for_longer_than_the_context():
    vocoder, data = Vocoder(random_vocoder(), DataConfig()), DataConfig()
    mel, given, lags = mel_of(400).numpy(), 0, []

    def frames():
        nonlocal given
        for frame in mel.T:
            given += 1
            yield frame

    made = []
    for chunk in vocoder.stream(frames(), seed=0):
        made.append(chunk)
        if given < 400:
            lags.append(given - sum(map(len, made)) / data.hop_length)
    assert isinstance(made[0], np.ndarray)
    reach = Reach.of(vocoder.model.config, None)
    per_frame = data.hop_length // vocoder.model.config.n_height
    assert max(lags) <= (vocoder.model.config.n_flow * reach.context + 2 * reach.block) / per_frame + 4
    torch.testing.assert_close(
        torch.from_numpy(np.concatenate(made)), whole(vocoder, torch.from_numpy(mel), 1, 0), atol=1e-4, rtol=0
    )


def test_less_lookahead_comes_sooner_and_near(monkeypatch):
    vocoder = Vocoder(random_vocoder(n_layer=5), DataConfig())
    mel = mel_of(FRAMES)
    exact, near = (torch.cat(list(vocoder.stream(mel, 0.5, 0, frames))) for frames in (None, 12))
    assert exact.shape == near.shape == (149 * 256,)
    assert Reach.of(vocoder.model.config, 12).context < Reach.of(vocoder.model.config, None).context
    assert (exact - near).abs().mean() < 0.3 * exact.abs().mean()


def test_memory_does_not_grow_with_the_stream():
    vocoder = Vocoder(random_vocoder(), DataConfig())
    sizes = []
    from synthesis.streaming import Stream

    stream = Stream(vocoder.model, vocoder._stream_engines, Reach.of(vocoder.model.config, None), 1.0, None)
    for _ in stream.run(mel_of(16) for _ in range(80)):
        held = [stream.mel, stream.noise, *(stage.z for stage in stream.stages)]
        sizes.append(sum(sliding.columns.numel() for sliding in held))
    middle = len(sizes) // 2
    assert max(sizes[middle:]) <= max(sizes[:middle])


def test_what_is_no_stream_is_refused():
    vocoder = Vocoder(random_vocoder(), DataConfig())
    with pytest.raises(InputError, match="lookahead_frames -1: expected a whole number"):
        vocoder.stream(mel_of(9), lookahead_frames=-1)
    with pytest.raises(InputError, match="temp"):
        vocoder.stream(mel_of(9), temp=-1)
    with pytest.raises(InputError, match="a stream of 1 frame"):
        list(vocoder.stream(mel_of(1)))
    with pytest.raises(InputError, match="mel 0: a mel of shape"):
        list(vocoder.stream(mel_of(9, bands=79)))
