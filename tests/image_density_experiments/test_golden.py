"""The image models agree with measured inputs, weights and outputs of the published implementation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.errors import InputError
from image_density_experiments.model import build_model, load_weights

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = sorted(path.stem for path in GOLDEN.glob("image_*.npz"))


def read(name):
    with np.load(GOLDEN / f"{name}.npz") as data:
        return {key: data[key][()] if key == "config" else torch.from_numpy(data[key]) for key in data.files}


def golden_model(data):
    config = json.loads(str(data["config"]))
    return build_model(
        model_type=config["model_type"],
        image_shape=config["image_shape"],
        hidden_channels=config["hidden"],
        K=config["K"],
        L=config["L"],
        flow_permutation=config["perm"],
        flow_coupling=config["coup"],
        LU_decomposed=config["LU"],
        flow_embed_dim=config["emb"],
        learn_top=config["top"],
        y_condition=config["ycond"],
    )


def published_weights(data, with_indices=True):
    weights = {key[3:]: value for key, value in data.items() if key.startswith("sd/")}
    indices = {f"{key[8:]}.indices": value for key, value in data.items() if key.startswith("indices/")}
    return {**weights, **indices} if with_indices else weights


def loaded(data):
    model = golden_model(data)
    load_weights(model, published_weights(data))
    return model


def assert_near(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_likelihood_agrees(name, training):
    data = read(name)
    y_onehot = data.get("y_onehot")
    model = loaded(data).train(training)  # in training mode too: loaded actnorms count as initialised
    z, bits_per_dim, y_logits = model(data["x"], y_onehot, noise=data["noise"])
    assert_near(z, data["z"])
    assert_near(bits_per_dim, data["bpd"])
    mean, log_std = model.prior(len(z), y_onehot)
    assert_near(mean, data["prior_mean"])
    assert_near(log_std, data["prior_logs"])
    assert (y_logits is None) == ("y_logits" not in data)
    if y_logits is not None:
        assert_near(y_logits, data["y_logits"])


@pytest.mark.parametrize("name", [name for name in NAMES if "decoded_t0" in read(name)])  # two cannot sample, published
def test_inverse_at_temperature_zero_agrees(name):
    data = read(name)
    assert_near(loaded(data).reverse(data["z"], data.get("y_onehot"), temperature=0.0), data["decoded_t0"])


def test_published_reverse_weights_need_no_indices():
    data = read("image_glow_additive_reverse")
    model = golden_model(data)
    load_weights(model, published_weights(data, with_indices=False))
    assert_near(model(data["x"], noise=data["noise"])[1], data["bpd"])


def test_published_shuffle_weights_without_their_shuffles_are_refused():
    data = read("image_glow_shuffle_notop")
    with pytest.raises(InputError, match=r"no shuffles .* 'flow\.layers\.\d\.shuffle\.indices'"):
        load_weights(golden_model(data), published_weights(data, with_indices=False))


def test_weights_of_a_data_parallel_model_load():
    data = read("image_nanoflow")
    model = golden_model(data)
    load_weights(model, {f"module.{name}": value for name, value in published_weights(data).items()})
    assert_near(model(data["x"], noise=data["noise"])[1], data["bpd"])
