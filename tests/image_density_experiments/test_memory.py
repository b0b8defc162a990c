"""The memory modes give the plain values and gradients, and keep what they promise."""

import pytest
import torch
from torch import nn

from image_density_experiments import memory
from tests.support.image_models import random_images, random_model

MODEL_TYPES = ["glow", "nanoflow_naive", "nanoflow", "nanoflowalt"]


def loss_and_gradients(model, mode, x, noise):
    model.memory = mode
    model.zero_grad(set_to_none=True)
    inputs = (x + noise).requires_grad_()
    y_onehot = torch.eye(4, dtype=x.dtype) if model.config.y_condition else None
    _, bits_per_dim, y_logits = model(inputs, y_onehot, noise=torch.zeros_like(x))
    loss = bits_per_dim.mean() if y_logits is None else bits_per_dim.mean() + y_logits.square().mean()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss.detach(), {**gradients, "x": inputs.grad}


@pytest.mark.parametrize("mode", ["checkpoint", "reversible"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("coupling", ["affine", "spline"])
def test_gradients_equal_the_plain_ones(model_type, coupling, mode):
    model = random_model(model_type, dtype=torch.float64, flow_coupling=coupling, y_condition=True, y_classes=4)
    x = random_images(model)
    noise = model.draw_noise(x)
    expected_loss, expected = loss_and_gradients(model, "plain", x, noise)
    loss, gradients = loss_and_gradients(model, mode, x, noise)
    torch.testing.assert_close(loss, expected_loss)
    assert any(gradient is not None and gradient.abs().max() > 1e-3 for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-8, rtol=1e-8, msg=name)


@pytest.mark.parametrize("mode", ["checkpoint", "reversible"])
@pytest.mark.parametrize("coupling", ["affine", "additive", "spline"])
def test_decoding_inverts_encoding_in_float64(mode, coupling):
    model = random_model("nanoflow", dtype=torch.float64, flow_coupling=coupling)
    x = 4 * random_images(model)  # far enough out for the spline's bins
    expected = model.encode(x)
    model.memory = mode
    latents, log_det = model.encode(x)
    torch.testing.assert_close((latents, log_det), expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(model.decode(latents), x, atol=1e-10, rtol=0)


def kept_elements(model, mode, x):
    """Elements of the distinct tensors that autograd holds between the two passes, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    model.memory = mode
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(tensor.numel() for tensor in kept.values())


def test_reversible_memory_does_not_grow_with_the_steps():
    growth = {}
    for mode in memory.MEMORY_MODES:
        few, many = (random_model("glow", K=K, hidden_channels=16) for K in (2, 8))
        growth[mode] = kept_elements(many, mode, random_images(many)) / kept_elements(few, mode, random_images(few))
    assert growth["reversible"] == 1
    assert growth["plain"] > 2
    few, many = (random_model("glow", K=8, hidden_channels=hidden) for hidden in (8, 64))
    for model in (few, many):
        assert kept_elements(model, "checkpoint", random_images(model)) < kept_elements(
            model, "plain", random_images(model)
        )


@pytest.mark.parametrize("mode", ["checkpoint", "reversible"])
def test_the_first_data_initialise_actnorms_in_every_mode(mode):
    states = []
    for chosen in ("plain", mode):
        model = random_model("nanoflow")
        for name, buffer in model.named_buffers():
            if name.endswith("initialised"):
                buffer.fill_(False)
        x = random_images(model, n=8)
        loss_and_gradients(model, chosen, x, torch.zeros_like(x))
        states.append(model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value)


def test_reversible_under_autocast_follows_the_plain_gradients():
    model = random_model("nanoflow", hidden_channels=16)
    x = random_images(model)
    noise = model.draw_noise(x)
    results = []
    for mode in ("plain", "reversible"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results.append(loss_and_gradients(model, mode, x, noise))
    torch.testing.assert_close(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        assert (results[1][1][name] - gradient).norm() <= 0.02 * gradient.norm(), name


def test_autocast_keeps_log_determinants_and_latents_in_float32():
    model = random_model("nanoflow", flow_coupling="affine")
    x = random_images(model)
    noise = model.draw_noise(x)
    _, expected, _ = model(x, noise=noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, bits_per_dim, _ = model(x, noise=noise)
    assert z.dtype == bits_per_dim.dtype == torch.float32
    assert not torch.equal(bits_per_dim, expected)  # the estimators did run in bfloat16
    torch.testing.assert_close(bits_per_dim, expected, atol=0.05, rtol=0)


def test_gradients_of_a_data_parallel_replica_reach_its_parameters():
    # nn.parallel.replicate needs several GPUs; this makes one replica as it does.
    model = random_model("nanoflow")
    copies = {parameter: parameter.detach().clone().requires_grad_() for parameter in model.parameters()}
    modules = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in modules.items():
        replica._former_parameters = {}
        for name, child in module._modules.items():
            if child is not None:
                setattr(replica, name, modules[child])
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                replica._former_parameters[name] = copies[parameter]
                replica.__dict__[name] = copies[parameter]
    replica = modules[model]
    assert isinstance(replica, nn.Module) and not list(replica.parameters())
    x = random_images(model)
    noise = model.draw_noise(x)
    _, expected = loss_and_gradients(model, "plain", x, noise)
    replica.memory = "reversible"
    replica(x, noise=noise)[1].mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(copies[parameter].grad, expected[name], atol=1e-5, rtol=1e-4, msg=name)
