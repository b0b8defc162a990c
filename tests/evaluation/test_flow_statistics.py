"""Statistics of flows are those of the likelihood's own pass."""

import pytest
import torch

from config import DataConfig
from evaluation.flow_statistics import LINEAR_PREDICTION, NoiseStatistics, flow_statistics
from fast.estimators import Execution
from tests.support.vocoders import random_input, random_vocoder

CPU = torch.device("cpu")


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(
    ("coupling_type", "changes"),
    [
        ("nanoflow", {"linear_prediction": 8}),
        ("waveflow", {"bipartize": True}),
        ("waveflow_official", {}),
        ("nanoflow_naive", {"transform": "spline"}),
    ],
)
def test_the_shares_of_the_flows_are_the_whole(coupling_type, changes, plain):
    model = random_vocoder(coupling_type, data_config=DataConfig(), **changes).eval()
    model.execution = Execution(plain=plain)
    audio, mel = random_input(model, frames=5, batch=3)
    flows, z = flow_statistics(model, zip(audio, mel, strict=True), CPU)
    with torch.no_grad():
        expected, log_det = model(audio, mel)
    torch.testing.assert_close(z, expected.flatten(), atol=1e-5, rtol=1e-5)
    assert sum(flow.log_det for flow in flows) == pytest.approx(log_det.sum().item() / audio.numel(), abs=1e-5)
    names = [flow.name for flow in flows]
    assert names == ([LINEAR_PREDICTION] if "linear_prediction" in changes else []) + ["flow 0", "flow 1", "flow 2"]
    assert flows[-1].output_std == pytest.approx(z.std().item(), rel=1e-3)
    for flow in flows[-3:]:
        assert flow.low < flow.mean < flow.high and 0 < flow.std < flow.high - flow.low
        if coupling_type != "waveflow_official":  # whose first row passes as it is
            assert flow.mean == pytest.approx(flow.log_det, abs=1e-6)


def test_the_moments_of_noise():
    normal = NoiseStatistics.of(2 * torch.randn(200_000, generator=torch.Generator().manual_seed(0)), sigma=2.0)
    assert normal.mean == pytest.approx(0, abs=0.02) and normal.std == pytest.approx(2, abs=0.02)
    assert normal.skewness == pytest.approx(0, abs=0.03) and normal.excess_kurtosis == pytest.approx(0, abs=0.06)
    assert normal.beyond == pytest.approx(0.0027, abs=0.0005)
    uniform = NoiseStatistics.of(torch.linspace(-1, 1, 10_001))
    assert uniform.excess_kurtosis == pytest.approx(-1.2, abs=0.01)
