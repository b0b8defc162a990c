"""The vocoder agrees with measured inputs, weights and outputs of the published implementation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoint import average_checkpoints, load_checkpoint, load_weights
from model import build_model
from modules import FlowLoss

GOLDEN = Path(__file__).parent / "golden"
VOCODERS = sorted(p.stem for p in GOLDEN.glob("*.npz") if p.stem.startswith(("waveflow_", "nanoflow_", "official_")))
CHECKPOINTS = GOLDEN / "checkpoints_nanoflow"


def read(path):
    with np.load(path) as data:
        return {
            key: torch.from_numpy(data[key]) if data[key].dtype.kind == "f" else data[key][()] for key in data.files
        }


def golden_model(data):
    model = build_model(json.loads(str(data["waveflow_config"])))
    load_weights(model, {key[3:]: value for key, value in data.items() if key.startswith("sd/")})
    return model


def assert_near(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", VOCODERS)
def test_likelihood_agrees(name):
    data = read(GOLDEN / f"{name}.npz")
    z, log_det = golden_model(data)(data["audio"], data["mel"])
    assert_near(z, data["z"])
    torch.testing.assert_close(log_det.sum(), data["logdet_batch_sum"], atol=1e-4, rtol=1e-5)
    for key in (key for key in data if key.startswith("loss_sigma")):
        assert_near(FlowLoss(float(key.removeprefix("loss_sigma")))((z, log_det)), data[key])


@pytest.mark.parametrize("name", VOCODERS)
@pytest.mark.parametrize("method", ["reverse", "reverse_fast"])
def test_synthesis_agrees(name, method):
    data = read(GOLDEN / f"{name}.npz")
    audio = getattr(golden_model(data), method)(data["mel"], z=data["z_in"])
    assert_near(audio, data["audio_out"])


def test_published_checkpoints_give_their_losses():
    data = read(CHECKPOINTS / "expected.npz")
    losses = json.loads(str(data["losses"]))
    paths = [CHECKPOINTS / f"waveflow_{i}" for i in (40, 50, 60)]
    checkpoints = {
        "last": load_checkpoint(paths[2]),
        "avg3": average_checkpoints(paths),
        "avg2": average_checkpoints(paths[1:]),
    }
    for name, checkpoint in checkpoints.items():
        model = build_model(json.loads(str(data["waveflow_config"])))
        model.load_state_dict(checkpoint["model"], strict=True)
        assert_near(FlowLoss()(model(data["audio"], data["mel"])).item(), losses[name])


def test_data_parallel_checkpoint_is_the_same_model():
    plain, parallel = (load_checkpoint(CHECKPOINTS / f / "waveflow_60")["model"] for f in ("", "dataparallel"))
    assert plain.keys() == parallel.keys()
    for key in plain:
        assert torch.equal(plain[key], parallel[key])


def test_training_follows_the_published_trajectory():
    data = read(GOLDEN / "training_nanoflow.npz")
    model = golden_model(data)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 8, 0.5)
    losses, norms = [], []
    for step in range(20):
        optimizer.zero_grad()
        loss = FlowLoss()(model(data["audio"][step % 4], data["mel"][step % 4]))
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0).item())
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    assert_near(torch.tensor(losses, dtype=torch.float64), data["losses"])
    torch.testing.assert_close(torch.tensor(norms, dtype=torch.float64), data["grad_norms"], atol=1e-3, rtol=1e-3)
