import copy
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from config import TrainConfig
from fast.estimators import Execution, project
from harness.errors import InputError
from modules import FlowLoss
from tests.support.vocoders import random_input, random_vocoder
from training.precision import ApexAmp, Precision, TorchAmp, half_dtype, make_precision


def make(**settings):
    model = random_vocoder()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    return model, optimizer, make_precision(TrainConfig(**settings), model, optimizer)


def step(precision, loss):
    """Gradients and update of a whole batch; returns the gradient norm."""
    precision.backward(loss)
    return precision.update(loss)


def run(steps=3, **settings):
    model, _, precision = make(**settings)
    audio, mel = random_input(model)
    losses = []
    for _ in range(steps):
        with precision.autocast():
            outputs = model(audio, mel)
        loss = FlowLoss()(outputs)
        step(precision, loss)
        losses.append(loss.item())
    return losses


def test_bfloat16_training_stays_near_float32():
    full, half = run(), run(fp16_run=True)
    assert full != half
    assert full == pytest.approx(half, abs=0.02)
    assert full[-1] < full[0]


def test_gradients_are_clipped_to_the_configured_norm():
    model, _, precision = make(max_grad_norm=0.1)
    norm = step(precision, 1000 * FlowLoss()(model(*random_input(model))))
    clipped = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert norm > 1
    torch.testing.assert_close(clipped, torch.tensor(0.1))


def test_the_config_chooses_the_kind():
    assert type(make()[2]) is Precision
    assert type(make(fp16_run=True)[2]) is TorchAmp


def test_a_missing_apex_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(InputError, match=r'Apex is not installed.*amp_backend to "torch"'):
        make(fp16_run=True, amp_backend="apex")


def test_the_other_package_called_apex_is_detected(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    with pytest.raises(InputError, match=r"has no amp .* another project"):
        make(fp16_run=True, amp_backend="apex")


def apex_double(loss_scale=1.0):
    """A module with Apex's interface that multiplies by 1: what our side calls, and with what.

    loss_scale: as its state says.
    """
    calls = []

    @contextmanager
    def scale_loss(loss, optimizer, delay_unscale=False):
        calls.append("scale_loss")
        yield loss

    handle = types.SimpleNamespace(_enable_caching=True)

    @contextmanager
    def disable_casts():
        calls.append("disable_casts")
        yield

    apex = types.ModuleType("apex")
    apex.amp = types.SimpleNamespace(
        scale_loss=scale_loss,
        disable_casts=disable_casts,
        _amp_state=types.SimpleNamespace(handle=handle),
        initialize=lambda model, optimizer, **options: calls.append(options),
        master_params=lambda optimizer: [p for group in optimizer.param_groups for p in group["params"]],
        state_dict=lambda: {"loss_scaler0": {"loss_scale": loss_scale, "unskipped": 0}},
        load_state_dict=calls.append,
    )
    return apex, calls


def test_apex_needs_cuda(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", apex_double()[0])
    with pytest.raises(InputError, match="needs a CUDA device"):
        make(fp16_run=True, amp_backend="apex")


def test_apex_steps_as_plain_training_does_where_nothing_is_scaled(monkeypatch):
    apex, calls = apex_double()
    monkeypatch.setitem(sys.modules, "apex", apex)
    plain, _, precision = make()
    model = random_vocoder()
    audio, mel = random_input(model)
    expected = step(precision, FlowLoss()(plain(audio, mel)))

    half = ApexAmp(model, torch.optim.Adam(model.parameters(), lr=1e-3), max_grad_norm=5.0)
    norm = step(half, FlowLoss()(model(audio, mel)))
    torch.testing.assert_close(norm, expected)
    assert calls == [{"opt_level": "O1", "verbosity": 0}, "scale_loss"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_apex_keeps_no_casts_of_weights_that_flows_share_and_none_in_evaluation(monkeypatch):
    apex, calls = apex_double()
    monkeypatch.setitem(sys.modules, "apex", apex)
    model = random_vocoder()
    half = ApexAmp(model, torch.optim.Adam(model.parameters()), max_grad_norm=5.0)
    assert not apex.amp._amp_state.handle._enable_caching
    with half.full():
        assert calls[-1] == "disable_casts"


@pytest.mark.parametrize("loss_scale, blamed", [(32768.0, False), (0.5, True)])  # halved by then
def test_an_overflow_of_apex_scaled_gradient_is_no_bad_step(loss_scale, blamed, monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", apex_double(loss_scale)[0])
    model = random_vocoder()
    half = ApexAmp(model, torch.optim.Adam(model.parameters(), fused=True), max_grad_norm=5.0)
    loss = FlowLoss()(model(*random_input(model)))
    half.backward(loss)
    next(model.parameters()).grad.fill_(torch.inf)
    assert half.update(loss).isfinite().item() is not blamed


def test_apex_leaves_the_transforms_parameters_in_float32(monkeypatch):
    def cast(*arguments, **options):  # as Apex patches it
        return conv2d(*(a.half() if isinstance(a, torch.Tensor) else a for a in arguments), **options)

    conv2d, model = F.conv2d, random_vocoder()
    monkeypatch.setattr(F, "conv2d", cast)
    features = torch.randn(1, 6, 2, 4).half()
    assert project(model.transforms[0], features).dtype == torch.float32


@pytest.mark.parametrize("changes", [{"transform": "spline"}, {"linear_prediction": 8}])
def test_apex_leaves_products_in_float64_alone(changes, monkeypatch):
    matmul, model = torch.Tensor.__matmul__, random_vocoder(data_config={}, **changes)
    model.execution = Execution(plain=True)
    audio, mel = random_input(model)
    z, log_det = model(audio, mel)
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: matmul(a.half(), b.half()))  # as Apex patches it
    assert all(torch.equal(*pair) for pair in zip(model(audio, mel), (z, log_det), strict=True))


@pytest.mark.parametrize(
    "name, device, has_bfloat16, dtype",
    [
        ("auto", "cuda", True, torch.bfloat16),
        ("auto", "cuda", False, torch.float16),
        ("float16", "cuda", True, torch.float16),
        ("bfloat16", "cuda", False, torch.bfloat16),
        ("auto", "cpu", False, torch.bfloat16),
    ],
)
def test_half_precision_is_what_the_chip_has_or_the_config_says(name, device, has_bfloat16, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    assert half_dtype(name, torch.device(device)) is dtype


def test_float16_training_on_a_cpu_is_refused():
    with pytest.raises(InputError, match=r'amp_dtype "float16" needs a CUDA device'):
        make(fp16_run=True, amp_dtype="float16")


def test_only_float16_is_scaled():
    model = random_vocoder()
    optimizer = torch.optim.Adam(model.parameters())
    for dtype in (torch.bfloat16, torch.float16):
        assert TorchAmp(model, optimizer, 5.0, dtype).scaler.is_enabled() is (dtype is torch.float16)


def test_any_thread_computes_in_the_precision_of_the_step():
    model, _, precision = make(fp16_run=True)
    audio, mel = random_input(model)
    with torch.no_grad():
        full = model(audio, mel)[0]
        with precision.autocast():
            half = model(audio, mel)[0]
            with ThreadPoolExecutor(1) as thread:  # nn.DataParallel has one for each device
                threads = thread.submit(torch.no_grad()(lambda: model(audio, mel)[0])).result()
        assert torch.equal(threads, half) and not torch.equal(half, full)
        assert torch.equal(model(audio, mel)[0], full)  # evaluation


def test_an_overflow_of_the_scaled_gradient_is_no_bad_step():
    model = random_vocoder()
    half = TorchAmp(model, torch.optim.Adam(model.parameters(), fused=True), 5.0, torch.float16)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    loss = FlowLoss()(model(*random_input(model)))
    half.backward(loss)
    scale = half.scaler.get_scale()
    next(model.parameters()).grad.fill_(torch.inf)
    assert half.update(loss) == 0  # not what BadSteps takes for one
    assert half.scaler.get_scale() == scale / 2
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    half.scaler.update(1.0)  # a gradient that overflows unscaled is one
    half.backward(FlowLoss()(model(*random_input(model))))
    next(model.parameters()).grad.fill_(torch.inf)
    assert not torch.isfinite(half.update(loss))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("spoil", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(fused, spoil):
    model = random_vocoder()
    optimizer = torch.optim.Adam(model.parameters(), fused=fused)
    precision = Precision(model, optimizer, max_grad_norm=5.0)
    audio, mel = random_input(model)
    step(precision, FlowLoss()(model(audio, mel)))
    before = [p.clone() for p in model.parameters()]
    state = copy.deepcopy(optimizer.state_dict()["state"])

    loss = FlowLoss()(model(audio, mel))
    if spoil == "loss":
        loss = loss + torch.tensor(float("inf"))  # whose gradient is finite
    else:
        handle = model.upsampler.convs[0].bias.register_hook(lambda gradient: gradient * float("nan"))
    step(precision, loss)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for index, entries in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state[index][name]) for name, value in entries.items())

    if spoil == "gradient":
        handle.remove()
    step(precision, FlowLoss()(model(audio, mel)))
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
