"""The baseline of the published speed-ups is the synthesis that the engine is faster than."""

import pytest
import torch

from benchmark.baseline import eager_conv_queue
from tests.support.vocoders import plain_inverse, random_input, random_vocoder

SHAPES = [
    {"n_height": 16, "n_layer_per_cycle": 2, "n_layer": 4},
    {"transform": "spline", "n_flow": 2},
    {"bipartize": True, "n_flow": 4},
    {"n_flow": 1, "n_layer": 1},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("coupling", ["waveflow", "waveflow_official", "nanoflow_naive", "nanoflow_decomp", "nanoflow"])
def test_the_queue_gives_the_plain_inverse(coupling, shape):
    model = random_vocoder(coupling, dtype=torch.float64, **shape)
    _, mel = random_input(model, frames=3)
    z = model.sample_noise(mel, 0.7)
    expected = plain_inverse(model, mel, z)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(eager_conv_queue(model, mel, z), expected, atol=1e-10, rtol=0)
