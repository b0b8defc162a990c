import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import solve_toeplitz

import linear_prediction
from audio import MelSpectrogram
from checkpoint import Checkpoint, load_checkpoint
from config import DataConfig, load_config
from data import first_batch, make_train_loader
from fast.estimators import Execution
from harness.errors import InputError
from harness.stopping import StopRequest
from linear_prediction import PEAK_LIMIT, LinearPrediction, levinson
from model import build_model
from modules import FlowLoss, squeeze
from tests.support.experiments import fails, run
from tests.support.vocoders import random_vocoder, small_config
from training.loop import VocoderLoop
from training.trainer import Trainer

TINY = DataConfig(
    sampling_rate=8000, filter_length=64, hop_length=16, win_length=48, n_mel_channels=10, mel_fmax=3500.0
)
SETTINGS = {
    "published": DataConfig(),
    "dbmel": DataConfig(use_dbmel=True),
    "narrow bands": DataConfig(filter_length=256, win_length=256, hop_length=64, n_mel_channels=120),  # some are empty
    "odd hop": DataConfig(sampling_rate=16_000, filter_length=512, win_length=400, hop_length=125, n_mel_channels=40),
    "tiny": TINY,
}


def speech_like(samples, seed=0):
    """Noise through a resonance, in bursts: audio [samples] whose spectrum is neither flat nor constant."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(samples, generator=generator, dtype=torch.float64)
    audio = torch.zeros(samples + 2, dtype=torch.float64)
    for t in range(samples):
        audio[t + 2] = noise[t] + 1.6 * audio[t + 1] - 0.9 * audio[t]
    envelope = 0.01 + torch.sin(torch.arange(samples) * 2 * math.pi / 3000).square()
    return 0.02 * audio[2:] * envelope


def case(data, order, samples=None, batch=2):
    """A transform, audio [B, T] whose length is no multiple of the hop, and the mel [B, M, F]."""
    samples = samples or 20 * data.hop_length + 5
    audio = torch.stack([speech_like(samples, seed) for seed in range(batch)])
    transform = LinearPrediction(data, order)
    torch.nn.init.constant_(transform.log_scale, 0.3)
    return transform, audio, MelSpectrogram(data)(audio.float()).double()


def by_hand(transform, audio, mel):
    """The residual of one clip, sample after sample as the formula says."""
    coefficients, gain = (tensor[0].detach().numpy() for tensor in transform.filters(mel.unsqueeze(0)))
    scale, hop, residual = math.exp(transform.log_scale.item()), transform.data.hop_length, []
    for t in range(len(audio)):
        frame = min((2 * t + hop) // (2 * hop), len(gain) - 1)
        predicted = sum(c * audio[t - k] for k, c in enumerate(coefficients[frame], 1) if t >= k)
        residual.append((audio[t] - predicted) / (scale * gain[frame]))
    return torch.stack(residual)


# --- the filter -----------------------------------------------------------------------------------------------


def test_levinson_solves_the_normal_equations():
    spectrum = np.exp(np.random.default_rng(0).normal(size=(5, 33)) * 2)
    lags = np.fft.irfft(spectrum)[:, :13]
    predictors, errors = levinson(torch.tensor(lags.T))
    for index, row in enumerate(lags):
        expected = solve_toeplitz(row[:-1], row[1:])
        np.testing.assert_allclose(predictors[:, index], expected, rtol=1e-9)
        np.testing.assert_allclose(errors[index], row[0] - expected @ row[1:], rtol=1e-9)


@pytest.mark.parametrize("data", SETTINGS.values(), ids=SETTINGS)
def test_white_noise_has_a_flat_filter_of_its_own_level(data):
    audio = 0.1 * torch.randn(1, 200 * data.hop_length, generator=torch.Generator().manual_seed(0))
    mel = MelSpectrogram(data)(audio).mean(2, keepdim=True)  # of magnitudes: some 1 dB below the mean power
    coefficients, gain = LinearPrediction(data, 8).filters(mel)
    assert gain.item() == pytest.approx(0.1, rel=0.5)
    assert coefficients.abs().max() < 0.7


def test_resonances_of_the_filter_are_those_of_the_audio():
    transform, _, mel = case(DataConfig(), 16, 60 * 256)
    coefficients, _ = transform.filters(mel)
    response = 1 / torch.fft.rfft(torch.cat([torch.ones(1), -coefficients[0, 5]]), n=1024).abs()
    assert response.argmax().item() == pytest.approx(math.acos(1.6 / 2 / math.sqrt(0.9)) / math.pi * 512, abs=12)


@pytest.mark.parametrize("data", SETTINGS.values(), ids=SETTINGS)
def test_residual_is_that_of_the_formula(data):
    transform, audio, mel = case(data, 11)
    residual, log_det = transform(audio, mel)
    for item in range(2):
        torch.testing.assert_close(residual[item], by_hand(transform, audio[item], mel[item]), rtol=1e-9, atol=1e-9)
    _, gain = transform.filters(mel)
    frame = ((2 * torch.arange(audio.size(1)) + data.hop_length) // (2 * data.hop_length)).clamp(max=mel.size(2) - 1)
    torch.testing.assert_close(log_det, -(gain.log() + transform.log_scale)[:, frame].sum(1))


@pytest.mark.parametrize("context", [1, 7, 128, 256, 300])
@pytest.mark.parametrize("data", [DataConfig(), TINY], ids=["published", "tiny"])
def test_context_is_the_past_of_the_rest_and_not_counted(data, context):
    transform, audio, mel = case(data, 11)
    residual, log_det = transform(audio, mel, context)
    whole, of_all = transform(audio, mel)
    torch.testing.assert_close(residual, whole[:, context:], rtol=0, atol=0)
    torch.testing.assert_close(of_all - log_det, transform(audio[:, :context], mel)[1])


def test_initial_scale_gives_unit_variance_and_silence_keeps_it_finite():
    transform, audio, mel = case(DataConfig(), 24)
    transform.initialise(audio, mel)
    assert transform(audio, mel)[0].square().mean().item() == pytest.approx(1, rel=1e-5)
    transform.initialise(torch.zeros_like(audio), mel)
    assert transform.log_scale.item() == 0


# --- the flow contract ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 7, 16, 40])
def test_log_det_is_that_of_the_jacobian(order):
    transform, audio, mel = case(TINY, order, samples=70)
    _, log_det = transform(audio, mel)
    for item in range(2):
        jacobian = torch.autograd.functional.jacobian(
            lambda x, item=item: transform(x.unsqueeze(0), mel[item : item + 1])[0][0], audio[item]
        )
        assert jacobian.triu(1).abs().max() < 1e-9 * jacobian.abs().max()
        torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], log_det[item], atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("data", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("order", [1, 24, 63])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_inverse_inverts(data, order, dtype):
    transform, audio, mel = case(data, order)
    residual, _ = transform(audio.to(dtype), mel.to(dtype))
    assert residual.dtype == dtype
    back = transform.inverse(residual, mel.to(dtype))
    torch.testing.assert_close(back, audio.to(dtype), rtol=0, atol=1e-10 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("order", [1, 16, 40])  # below, at and above the hop
@pytest.mark.parametrize("kind", ["_invert_by_blocks", "_invert_by_samples"])
def test_a_stream_is_the_whole(order, kind, monkeypatch):
    monkeypatch.setattr(linear_prediction, "_invert_by_samples", getattr(linear_prediction, kind))
    monkeypatch.setattr(linear_prediction, "FRAMES_AT_ONCE", 3)
    transform, _, mel = case(TINY, order)
    residual = torch.randn(2, 16 * 24 + 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    whole, past, start, pieces = transform.inverse(residual, mel), None, 0, []
    for length in (1, 7, 8, 16, 100, 3, 252):
        piece = transform.inverse(residual[:, start : start + length], mel, start, past)
        past = torch.cat([torch.zeros(2, order) if past is None else past, piece], dim=1)[:, -order:]
        start += length
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("order", [1, 15, 16, 40])
@pytest.mark.parametrize("level", [1.0, 100.0], ids=["within the limit", "beyond the limit"])
def test_blocks_give_what_samples_give(order, level):
    generator = torch.Generator().manual_seed(0)
    transform = LinearPrediction(TINY, order)
    coefficients, _ = transform.filters(torch.randn(2, 10, 9, generator=generator))
    excitation = level * torch.randn(2, 131, generator=generator, dtype=torch.float64)
    past = torch.randn(2, order, generator=generator, dtype=torch.float64)
    spans = [(0, 3), *((3 + 16 * i, 19 + 16 * i) for i in range(8))]
    arguments = excitation, coefficients.detach(), past, spans
    expected = linear_prediction._invert_by_samples(*arguments)
    assert (expected.abs().max() >= PEAK_LIMIT - 1e-9) == (level > 1)
    torch.testing.assert_close(linear_prediction._invert_by_blocks(*arguments), expected, rtol=0, atol=1e-9)


def test_gradients_reach_audio_mel_and_scale():
    transform, audio, mel = case(TINY, 4, samples=40, batch=1)

    def likelihood_terms(x, m, log_scale):
        return torch.func.functional_call(transform, {"log_scale": log_scale}, (x, m))

    inputs = (audio.requires_grad_(), mel.requires_grad_(), transform.log_scale.detach().double().requires_grad_())
    torch.autograd.gradcheck(likelihood_terms, inputs)


# --- every mel ----------------------------------------------------------------------------------------------------

values = st.sampled_from([-1e30, -100.0, -11.6, -5.0, 0.0, 2.0, 30.0, 1e30]) | st.floats(-15, 5)


@settings(max_examples=60, deadline=None)
@given(
    frames=st.lists(st.lists(values, min_size=10, max_size=10), min_size=1, max_size=12),
    order=st.sampled_from([1, 8, 24, 63]),
    use_dbmel=st.booleans(),
    seed=st.integers(0, 9),
)
def test_inverse_never_diverges(frames, order, use_dbmel, seed):
    transform = LinearPrediction(TINY.model_copy(update={"use_dbmel": use_dbmel}), order)
    mel = torch.tensor(frames).t().unsqueeze(0).repeat(1, 1, 20)  # heard over and over: what grows has the time to
    coefficients, gain = transform.filters(mel)
    assert coefficients.isfinite().all() and gain.isfinite().all() and (gain > 0).all()
    radii = [np.abs(np.roots([1, *-filters])).max() for filters in coefficients[0, : len(frames)].detach().numpy()]
    assert max(radii) < 1 + 1e-6  # what roots can tell of a polynomial of this order
    noise = torch.randn(1, mel.size(2) * 16, generator=torch.Generator().manual_seed(seed))
    for audio in (transform.inverse(noise, mel), blockwise(transform, noise, mel)):
        assert audio.isfinite().all() and audio.abs().max() <= PEAK_LIMIT + 1e-6


def blockwise(transform, residual, mel):
    """The inverse as accelerators compute it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_prediction, "_invert_by_samples", linear_prediction._invert_by_blocks)
        return transform.inverse(residual, mel)


@pytest.mark.parametrize("order", [12, 24, 128, 256])
@pytest.mark.parametrize("seed", range(3))
def test_noise_through_a_plausible_mel_has_the_power_that_the_mel_tells(order, seed):
    transform = LinearPrediction(DataConfig(), order)
    smooth = torch.randn(1, 1, 20, 30, generator=torch.Generator().manual_seed(seed))
    mel = torch.nn.functional.interpolate(smooth, size=(80, 120), mode="bicubic")[0] * 2 - 4
    audio = transform.inverse(torch.randn(1, 119 * 256, generator=torch.Generator().manual_seed(seed)), mel)
    expected = transform.power(mel.transpose(1, 2)).mean().sqrt()
    assert 0.3 < audio.square().mean().sqrt() / expected < 3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_clip_and_is_never_heard_as_sound(value):
    transform, audio, mel = case(DataConfig(), 24)
    clean = transform.inverse(audio, mel)
    mel[0, 7, 9] = value
    spoilt = transform.inverse(audio, mel)
    torch.testing.assert_close(spoilt[1], clean[1])
    first = 9 * 256 - 128
    torch.testing.assert_close(spoilt[0, :first], clean[0, :first])
    assert spoilt[0, first:].isnan().all()


def test_silence_stays_silence():
    transform = LinearPrediction(DataConfig(), 128)
    audio = torch.zeros(1, 2560)
    mel = MelSpectrogram(DataConfig())(audio)
    residual, log_det = transform(audio, mel)
    assert (residual == 0).all() and log_det.isfinite().all()
    assert (transform.inverse(residual, mel) == 0).all()
    hiss = transform.inverse(torch.randn(1, 2560), mel)
    assert hiss.abs().max() < 1e-3


def test_orders_and_bands_that_cannot_work_are_refused():
    with pytest.raises(InputError, match="order from 1 to 63"):
        LinearPrediction(TINY, 64)
    nowhere = DataConfig(
        sampling_rate=8000, filter_length=8, win_length=8, n_mel_channels=1, mel_fmin=10.0, mel_fmax=20.0
    )
    with pytest.raises(InputError, match="wider bands"), pytest.warns(UserWarning):
        LinearPrediction(nowhere, 2)


# --- in the vocoder -------------------------------------------------------------------------------------------------


def predicting_vocoder(dtype=torch.float32, **changes):
    """A random vocoder behind linear prediction, with audio [2, T], mel [2, 80, F]."""
    data = DataConfig()
    model = random_vocoder(dtype=dtype, data_config=data, linear_prediction=24, **changes)
    audio = torch.stack([speech_like(8 * 256, seed) for seed in range(2)]).to(dtype)
    mel = MelSpectrogram(data)(audio.float()).to(dtype)
    model.initialise(audio, mel)
    return model, audio, mel


@pytest.mark.parametrize("coupling_type", ["waveflow", "nanoflow_naive", "nanoflow_decomp", "nanoflow"])
@pytest.mark.parametrize("transform", ["affine", "spline"])
def test_both_inverses_of_a_vocoder_invert_it(coupling_type, transform):
    model, audio, mel = predicting_vocoder(coupling_type=coupling_type, transform=transform)
    z, log_det = model(audio, mel)
    assert z.dtype == log_det.dtype == torch.float32 and z.shape == (2, 1, 8, 256)
    plain, fast = model.reverse(mel, z=z.detach()), model.reverse_fast(mel, z=z.detach())
    torch.testing.assert_close(plain, audio, atol=1e-4, rtol=0)
    torch.testing.assert_close(fast, plain, atol=1e-4, rtol=0)


def test_log_determinants_add_up():
    model, audio, mel = predicting_vocoder(torch.float64, n_layer=2)
    residual, own = model.linear_prediction(audio, mel)
    plain = build_model({**small_config(n_layer=2)}).double()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("linear")})
    z, log_det = plain(residual, mel)
    torch.testing.assert_close(model(audio, mel), (z, log_det + own))


@pytest.mark.parametrize(("n_height", "context"), [(8, 256), (8, 264), (4, 4)])
def test_given_a_context_the_likelihood_is_that_of_the_rest(n_height, context):
    model, audio, mel = predicting_vocoder(torch.float64, n_layer=2, n_height=n_height)
    audio, mel = audio[:1, : context + 32], mel[:1, :, : (context + 32) // 256 + 2]
    z, log_det = model(audio, mel, context)
    assert z.shape == (1, 1, n_height, 32 // n_height)

    def noise(rest):
        return model(torch.cat([audio[:, :context], rest], dim=1), mel, context)[0].flatten()

    jacobian = torch.autograd.functional.jacobian(noise, audio[:, context:])[:, 0]
    torch.testing.assert_close(log_det[0], torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-9, atol=1e-9)
    model.execution = Execution(plain=True)
    torch.testing.assert_close(model(audio, mel, context), (z, log_det), rtol=1e-9, atol=1e-9)


def test_without_linear_prediction_a_context_is_cut_off():
    model = random_vocoder(n_layer=2)
    audio, mel = torch.rand(2, 1024) - 0.5, torch.randn(2, 80, 5)
    z, log_det = model(audio, mel, 504)
    x = squeeze(audio[:, None, 504:], 8)
    conditioning, expected = model.condition(mel, 1024)[..., 504 // 8 :], 0
    for flow in model.flows():
        x, change = flow.forward(x, conditioning)
        expected = expected + change
    torch.testing.assert_close((z, log_det), (x, expected), rtol=1e-4, atol=1e-4)


def test_after_a_context_the_flows_are_conditioned_on_the_frames_they_stand_at():
    model, audio, mel = predicting_vocoder()
    whole = model.condition(mel, audio.size(1))
    assert torch.equal(model.condition(mel, audio.size(1), 264), whole[..., 264 // 8 :])


def test_half_precision_leaves_the_filter_alone():
    model, audio, mel = predicting_vocoder()
    expected, _ = model.linear_prediction(audio, mel)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        residual, _ = model.linear_prediction(audio, mel)
        z, log_det = model(audio, mel)
    assert torch.equal(residual, expected)
    assert z.dtype == log_det.dtype == torch.float32


def test_a_vocoder_asks_what_its_mels_are():
    with pytest.raises(InputError, match="data_config"):
        build_model(small_config(linear_prediction=24))
    model = build_model(small_config(linear_prediction=24), {"use_dbmel": True})
    assert model.linear_prediction.data.use_dbmel


# --- in a run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [0, 256])
def test_a_run_trains_resumes_evaluates_and_synthesizes_with_it(config, tmp_path, capsys, context):
    order = {
        "waveflow_config__linear_prediction": 24,
        "train_config__ema_decay": 0.9,
        "train_config__crop_context": context,
    }
    path = config(**order)
    assert run("-c", path, "--max_iterations", 4) == 0
    checkpoint = load_checkpoint(tmp_path / "runs" / "tiny" / "waveflow_4")
    assert checkpoint["model"]["linear_prediction.log_scale"].abs() > 0
    assert "linear_prediction.log_scale" in checkpoint["ema"]
    assert run("-c", path, "--max_iterations", 8, "--resume", "latest") == 0
    assert run("-c", path, "--evaluate") == run("-c", path, "--synthesize") == 0
    capsys.readouterr()
    assert run("-c", config(**{**order, "waveflow_config__linear_prediction": 12}), "--evaluate") == 1
    assert "linear_prediction 24, the config says 12" in capsys.readouterr().err


def test_a_step_with_a_context_has_the_loss_of_the_rest(config, tmp_path):
    settings = load_config(config(waveflow_config__linear_prediction=24, train_config__crop_context=264))
    trainer = Trainer(settings, torch.device("cpu"), tmp_path, None, warm=False)
    audio, mel = first_batch(make_train_loader(settings))
    with torch.no_grad():
        expected = FlowLoss()(trainer.model(audio, mel, 264))
        of_all = FlowLoss()(trainer.model(audio, mel))
    loop = VocoderLoop(1, trainer, [], StopRequest())
    loop.close()
    assert loop.samples_per_step == settings.train_config.batch_size * (settings.data_config.segment_length - 264)
    loss, *_ = trainer.step(audio, mel)
    torch.testing.assert_close(loss, expected)
    assert abs(loss - of_all) > 1e-3


@pytest.mark.parametrize(
    ("context", "order"), [(12, 24), (2048, 24), (2056, 24), (256, 0)], ids=["height", "all", "more", "no prediction"]
)
def test_contexts_that_cannot_be_are_refused(config, capsys, context, order):
    keys = {"train_config__crop_context": context, "waveflow_config__linear_prediction": order}
    said = fails(capsys, "-c", config(**keys))
    assert f"train_config.crop_context {context}" in said and "waveflow_config.n_height 8" in said


@pytest.mark.parametrize("context", [0, 256])
def test_the_scale_comes_from_the_first_batch_of_fresh_runs_only(config, tmp_path, context):
    path = config(waveflow_config__linear_prediction=24, train_config__crop_context=context)
    settings = load_config(path)
    fresh = Trainer(settings, torch.device("cpu"), tmp_path, None, warm=False)
    expected = LinearPrediction(settings.data_config, 24)
    expected.initialise(*first_batch(make_train_loader(settings)), context)
    assert torch.equal(fresh.model.linear_prediction.log_scale, expected.log_scale)
    weights = {name: value + 1 for name, value in fresh.model.state_dict().items()}
    start = Checkpoint(path=tmp_path, name="other", iteration=0, weights=weights)
    warm = Trainer(settings, torch.device("cpu"), tmp_path, start, warm=True)
    assert torch.equal(warm.model.linear_prediction.log_scale, expected.log_scale + 1)


def test_order_beyond_the_filter_is_refused(config, capsys):
    path = config(waveflow_config__linear_prediction=64, data_config__filter_length=64, data_config__win_length=64)
    assert "data_config.filter_length 64" in fails(capsys, "-c", path)
