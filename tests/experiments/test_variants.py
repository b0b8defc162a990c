"""Variants of the vocoder: exact log-determinants and inverses, gradients to all that is new, costs as stated."""

import math

import pytest
import torch

from config import DataConfig, config_from_dict, parse_section
from experiments.measures import multiply_adds, synthesis_of
from experiments.variants import INT16_STEP, VARIANTS, GaussianPrior, StudentPrior, Subject, build_subject
from fast.engine import SynthesisEngine
from fast.estimators import Execution
from model import count_parameters
from tests.support.vocoders import small_config

MODELS = ["conditioner", "adapters", "separable"]
FILTERS = ["interpolated", "constants", "bands", "gain"]
NEW = {  # parameters that the plain model does not have
    "conditioner": ["upsampler.conditioner.up.weight", "upsampler.conditioner.depthwise.weight"],
    "adapters": ["up", "down"],
    "separable": ["estimators.0.layers.0.gate_conv.depthwise"],
    "interpolated": [],
    "constants": [f"linear_prediction.log_{name}" for name in ("above", "floor", "bandwidth")],
    "bands": ["linear_prediction.bands"],
    "gain": ["linear_prediction.weight"],
}


def subject_of(variant, order=None, dtype=torch.float64, **changes):
    """A small subject whose every parameter matters."""
    order = (6 if variant in FILTERS else 0) if order is None else order
    model = small_config(linear_prediction=order, **changes)
    lists = {"training_files": "none", "test_files": "none", "segment_length": 2048}
    config = config_from_dict({"train_config": {}, "data_config": lists, "waveflow_config": model})
    subject = build_subject(config, variant).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in subject.model.named_parameters():
            if name.startswith("transforms") or name in NEW.get(variant, ()):
                scale = 0.1 if name.startswith("transforms") else 0.05
                parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return subject


def speech(samples=512, batch=1, dtype=torch.float64):
    """Audio [B, T] and the mel [B, 80, F] of louder and softer bands."""
    generator = torch.Generator().manual_seed(2)
    audio = 0.1 * torch.randn(batch, samples, generator=generator, dtype=dtype)
    mel = torch.randn(batch, 80, samples // 256 + 1, generator=generator, dtype=dtype) - 3
    return audio, mel


@pytest.mark.parametrize("variant", MODELS + FILTERS)
def test_the_log_determinant_is_that_of_the_jacobian(variant):
    subject = subject_of(variant)
    audio, mel = speech()

    def noise(x):
        return subject.model(x, mel)[0].transpose(2, 3).flatten()

    jacobian = torch.autograd.functional.jacobian(noise, audio)[:, 0]
    expected = torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(subject.model(audio, mel)[1][0], expected, rtol=1e-8, atol=1e-6)


@pytest.mark.parametrize("variant", MODELS + FILTERS)
@torch.no_grad()
def test_synthesis_inverts_the_likelihood(variant):
    subject = subject_of(variant)
    audio, mel = speech()
    z, _ = subject.model(audio, mel)
    torch.testing.assert_close(subject.model.reverse(mel, z=z), audio, rtol=0, atol=1e-9)
    torch.testing.assert_close(SynthesisEngine(subject.model)(mel, z), audio, rtol=0, atol=1e-8)


@pytest.mark.parametrize("variant", MODELS)
@torch.no_grad()
def test_the_fast_way_gives_the_numbers_of_the_plain_one(variant):
    model = subject_of(variant).model
    fast = model(*speech(batch=2))
    model.execution = Execution(plain=True)
    for value, expected in zip(fast, model(*speech(batch=2)), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", NEW)
def test_gradients_reach_all_that_is_new(variant):
    subject = subject_of(variant)
    subject.log_likelihood(subject(*speech())).sum().backward()
    parameters = dict(subject.model.named_parameters())
    for name in NEW[variant]:
        assert parameters[name].grad.abs().sum() > 0, name


@pytest.mark.parametrize("variant", ["conditioner", "adapters", "bands", "gain"])
@torch.no_grad()
def test_these_begin_as_the_plain_model(variant):
    order = 6 if variant in FILTERS else 0
    lists = {"training_files": "none", "test_files": "none", "segment_length": 2048}
    sections = {"train_config": {}, "data_config": lists, "waveflow_config": small_config(linear_prediction=order)}
    plain, changed = (build_subject(config_from_dict(sections), name).double() for name in ("", variant))
    for value, expected in zip(changed.model(*speech()), plain.model(*speech()), strict=True):
        torch.testing.assert_close(value, expected)


def test_parameters_are_counted():
    n_flow, n_layer, n_res = 3, 3, 6
    plain = count_parameters(subject_of("", order=6).model)
    gates = n_flow * n_layer * n_res
    assert count_parameters(subject_of("adapters", order=6).model) == plain - gates + 2 * gates  # rank 1
    conditioner = 80 * 5 + 80 + 80 * 16 + 16 + 16 * 80 + 80
    assert count_parameters(subject_of("conditioner", order=6).model) == plain + conditioner
    full, separable = 2 * n_res * n_res * 9, 2 * n_res * n_res + n_res * 9
    assert count_parameters(subject_of("separable", order=6).model) == plain - n_layer * (full - separable)
    assert [count_parameters(subject_of(name).model) - plain for name in FILTERS] == [0, 3, 80, 80]


def test_multiply_adds_are_counted():
    n_flow, n_layer, n_res, order = 3, 3, 6, 6
    others = 80 * 2 * n_res + 2 * n_res * n_res  # conditioning, residual and skip
    flow = n_layer * (9 * 2 * n_res * n_res + others) + n_res + 2 * n_res
    plain = multiply_adds(subject_of("", order=order).model)
    upsampler = 80 * 3 * 2 * (1 + 1 / 16)
    assert plain == pytest.approx(n_flow * flow + upsampler + order, rel=0.15)  # edges of few frames
    saved = n_flow * n_layer * (9 * 2 * n_res * n_res - 2 * n_res * n_res - 9 * n_res)
    assert plain - multiply_adds(subject_of("separable", order=order).model) == pytest.approx(saved, rel=1e-6)


def test_students_density_is_one_and_its_noise_has_variance_one():
    prior = StudentPrior().double()
    z = torch.linspace(-400, 400, 800_001, dtype=torch.float64)
    density = prior.log_density(z.view(-1, 1, 1, 1)).exp()
    assert torch.trapezoid(density, z).item() == pytest.approx(1, abs=1e-4)
    torch.manual_seed(0)
    assert prior.sample((200_000,)).var().item() == pytest.approx(1, abs=0.05)
    prior.log_density(torch.ones(1, 1, 1, 1, dtype=torch.float64)).sum().backward()
    assert prior.log_freedom.grad.abs() > 0


def test_the_gaussian_density_is_the_published_one():
    z = torch.randn(2, 1, 4, 3)
    expected = -(z.square() / 2 + math.log(2 * math.pi) / 2).flatten(1).sum(1)
    torch.testing.assert_close(GaussianPrior().log_density(z), expected)


def test_dither_is_a_step_of_the_audio_wide_and_only_in_training():
    class Kept(torch.nn.Module):
        def forward(self, audio, mel, context):
            return audio, mel

    subject = Subject(Kept(), GaussianPrior(), VARIANTS["dither"].dither)
    change = subject(torch.zeros(1, 10_000), None)[0]
    assert 0.45 * INT16_STEP < change.abs().max() <= 0.5 * INT16_STEP
    assert subject.eval()(torch.zeros(1, 100), None)[0].abs().max() == 0


def test_a_subject_speaks_with_the_noise_of_its_prior():
    subject = subject_of("student", dtype=torch.float32)
    torch.manual_seed(0)
    audio = synthesis_of(subject)(speech(dtype=torch.float32)[1][0], 0.5)
    assert audio.shape == (512,) and audio.isfinite().all()


def test_data_settings_of_a_filter_in_between_are_half_as_far_apart():
    data = parse_section(DataConfig, {}, "data_config.")
    filtering = VARIANTS["interpolated"].prediction(data, 6)
    mel = torch.randn(1, 80, 5)
    coefficients, _ = filtering.filters(filtering._between(mel))
    assert coefficients.shape == (1, 9, 6)
    whole, _ = VARIANTS["interpolated"].prediction.__base__(data, 6).filters(mel)
    torch.testing.assert_close(coefficients[:, ::2], whole, rtol=1e-5, atol=1e-6)
