"""The engine gives what the plain inverse gives, for every model and however the work is cut."""

import copy
import gc
import os
import pickle
import subprocess
import sys
import weakref
from functools import cache
from pathlib import Path

import pytest
import torch

from config import DataConfig, load_config
from fast import engine as engines
from fast.cpu_queues import DirectQueue, Window, WinogradQueue
from fast.engine import SynthesisEngine, engine_of, receptive_field, slow_precision_warning
from harness.errors import InputError
from tests.support.vocoders import plain_inverse, random_input, random_vocoder

QUEUES = pytest.mark.parametrize("queue", [WinogradQueue, DirectQueue])
ROOT = Path(__file__).parents[2]
COUPLINGS = ["waveflow", "waveflow_official", "nanoflow_naive", "nanoflow_decomp", "nanoflow"]
SHAPES = {  # height, rows of dilation_h per cycle, layers, flows
    "height 8, odd flows": {"n_height": 8, "n_flow": 3},
    "height 16, even flows": {"n_height": 16, "n_flow": 4, "n_layer": 4},
    "height 16, cycle 2": {"n_height": 16, "n_layer_per_cycle": 2, "n_layer": 4},
    "height 32, cycle 3": {"n_height": 32, "n_layer_per_cycle": 3, "n_layer": 4, "n_flow": 2},
    "height 64, cycle 5": {"n_height": 64, "n_layer_per_cycle": 5, "n_layer": 6, "n_flow": 2},
    "height 64, odd flows": {"n_height": 64, "n_layer_per_cycle": 2, "n_layer": 2},
    "height 8, cycle 5": {"n_height": 8, "n_layer_per_cycle": 5, "n_layer": 6},
    "height 32, odd flows": {"n_height": 32, "n_flow": 3},
    "one flow of one layer": {"n_flow": 1, "n_layer": 1},
    "bipartite, odd flows": {"bipartize": True, "n_flow": 3},
    "bipartite, six flows": {"bipartize": True, "n_flow": 6},
    "one row": {"n_height": 1, "n_flow": 2, "n_layer": 2},
}


GRID = pytest.mark.parametrize(
    ("coupling", "shape", "transform"),
    [
        (coupling, shape, transform)
        for coupling in COUPLINGS
        for shape in SHAPES
        for transform in ("affine", "spline")
        if (coupling, transform) != ("waveflow_official", "spline")  # which there is not
    ],
)


def case(coupling="nanoflow", frames=3, batch=2, **changes):
    """A model, a mel and noise."""
    model = random_vocoder(coupling, **changes)
    _, mel = random_input(model, frames=frames, batch=batch)
    torch.manual_seed(3)
    return model, mel, model.sample_noise(mel, 0.7)


@cache
def plain_case(coupling, shape, transform):
    """A model in float64, a mel and noise of 24 columns at least, and what the plain inverse makes of them."""
    small = {"cin_channels": 6, "upsample_strides": (16, 8)}
    model, mel, z = case(coupling, 13, dtype=torch.float64, transform=transform, **small, **SHAPES[shape])
    z = z[..., : max(24, 256 // model.config.n_height)].contiguous()
    return model, mel, z, plain_inverse(model, mel, z)


def assert_same(actual, expected, tolerance=1e-10):
    assert expected.abs().max() > 0.5  # something to compare
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


@GRID
def test_engine_gives_the_plain_inverse(coupling, shape, transform):
    model, mel, z, expected = plain_case(coupling, shape, transform)
    for queue in (WinogradQueue, DirectQueue):
        assert_same(SynthesisEngine(model, queue=queue)(mel, z), expected)


@QUEUES
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_linear_prediction_is_inverted_too(coupling, queue):
    prediction = {"linear_prediction": 8, "data_config": DataConfig()}
    model, mel, z = case(coupling, dtype=torch.float64, **prediction)
    assert_same(SynthesisEngine(model, queue=queue)(mel, z), plain_inverse(model, mel, z))


@QUEUES
@pytest.mark.parametrize("transform", ["affine", "spline"])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_single_precision_stays_near(coupling, transform, queue):
    model, mel, z = case(coupling, transform=transform, n_height=16, n_layer=4, n_flow=4)
    audio = SynthesisEngine(model, queue=queue)(mel, z)
    assert audio.dtype == torch.float32
    assert_same(audio.double(), plain_inverse(model.double(), mel.double(), z.double()), 2e-5)


@QUEUES
@pytest.mark.parametrize("shape", SHAPES)
def test_leaning_tiles_change_nothing(shape, queue):
    model, mel, z = case(frames=4, batch=1, dtype=torch.float64, **SHAPES[shape])
    whole = SynthesisEngine(model)(mel, z)
    unit = 2**model.config.n_layer
    for tile in (unit, 3 * unit):
        assert_same(SynthesisEngine(model, tile=tile, queue=queue)(mel, z), whole)


@QUEUES
def test_buffers_roll_on_through_a_long_input(queue):
    model, mel, z = case("waveflow", frames=20, batch=1, n_height=4, n_flow=2, dtype=torch.float64)
    assert z.size(3) > 20 * 16 + (4 + 1) * 8  # far more than the buffers hold
    assert_same(SynthesisEngine(model, tile=16, queue=queue)(mel, z), plain_inverse(model, mel, z))


@QUEUES
@pytest.mark.parametrize("transform", ["affine", "spline"])
@pytest.mark.parametrize("spoilt", [0, 1, 2])
def test_a_clip_that_is_not_finite_spoils_no_other(queue, transform, spoilt):
    model, mel, z = case(batch=3, frames=6, transform=transform, n_flow=2)
    engine = SynthesisEngine(model, queue=queue, tile=16)  # buffers roll on between the clips
    expected = engine(mel, z)
    mel[spoilt] = float("nan")
    audio = engine(mel, z)
    assert not torch.isfinite(audio[spoilt]).any()
    others = [clip for clip in range(3) if clip != spoilt]
    assert torch.equal(audio[others], expected[others])


@QUEUES
def test_a_step_looks_only_at_the_silence_it_meets(queue):
    flow = SynthesisEngine(random_vocoder(), queue=queue).back_end.flows[0]
    silent = [range(start, start + 3) for start in range(5, 100, 8)]
    held = queue(flow, width=64, tile=16, margin=4, silent=silent)
    held.base = 30
    for start, stop, expected in ((8, 18, [38, 39, 45, 46, 47]), (16, 32, [46, 47, 53, 54, 55, 61]), (10, 15, [])):
        after = torch.ones(stop - start, 1)
        held._silence(after, Window(start, stop))
        assert (after.flatten() == 0).nonzero().flatten().add(30 + start).tolist() == expected


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_stays_near(precision):
    model, mel, z = case(n_flow=4)
    expected = plain_inverse(model, mel, z)
    audio = SynthesisEngine(model, precision=precision, even_if_slow=True)(mel, z)
    assert audio.dtype == torch.float32
    error = (audio - expected).std() / expected.std()
    assert 1e-5 < error < (0.03 if precision == "bfloat16" else 0.005)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_cpu_without_half_precision_products_computes_in_float32(precision, monkeypatch):
    model, mel, z = case()
    monkeypatch.setattr("fast.engine.fast_bfloat16", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)
    assert f"no {precision} products" in slow_precision_warning(precision, torch.device("cpu"))
    assert torch.equal(SynthesisEngine(model, precision=precision)(mel, z), SynthesisEngine(model)(mel, z))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_cpu_with_half_precision_products_uses_them(precision, monkeypatch):
    monkeypatch.setattr("fast.engine.fast_bfloat16", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: True)
    assert slow_precision_warning(precision, torch.device("cpu")) is None
    engine = SynthesisEngine(case()[0], precision=precision)
    assert engine.dtype == getattr(torch, precision)
    assert engine.back_end.queue is DirectQueue
    assert SynthesisEngine(case()[0], precision="float32").back_end.queue is WinogradQueue


def test_no_warning_in_full_precision_or_elsewhere(monkeypatch):
    monkeypatch.setattr("fast.engine.fast_bfloat16", lambda: False)
    assert slow_precision_warning("float32", torch.device("cpu")) is None
    assert slow_precision_warning(None, torch.device("cpu")) is None
    assert slow_precision_warning("bfloat16", torch.device("cuda")) is None


@QUEUES
@pytest.mark.parametrize("tile", [2048, 16])
def test_clips_of_a_batch_sound_as_they_do_alone(tile, queue):
    model = random_vocoder(dtype=torch.float64)
    engine = SynthesisEngine(model, tile=tile, queue=queue)
    clips = []
    for frames in (5, 2, 4, 1):
        _, mel = random_input(model, frames=frames + 1, batch=1, seed=frames)
        columns = frames * 256 // model.config.n_height - frames  # not always a multiple of anything
        clips.append((mel[0], torch.randn(model.config.n_height, columns, dtype=mel.dtype)))
    for (mel, z), audio in zip(clips, engine.synthesize_many(clips), strict=True):
        assert_same(audio, plain_inverse(model, mel[None], z[None, None])[0])
        assert_same(audio, engine(mel[None], z[None, None])[0])


def test_engine_leaves_the_model_alone_and_does_not_follow_it():
    model, mel, z = case()
    model.train()
    before = copy.deepcopy(model.state_dict())
    flags = [parameter.requires_grad for parameter in model.parameters()]
    engine = SynthesisEngine(model)
    audio = engine(mel, z)
    assert model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert torch.equal(engine(mel, z), audio)


def test_engine_can_be_used_again_with_other_lengths():
    model, mel, z = case()
    engine = SynthesisEngine(model)
    first = engine(mel, z)
    engine(mel[:, :, :2], z[..., :40])
    assert torch.equal(engine(mel, z), first)


def test_receptive_field_bounds_what_a_sample_depends_on():
    model, mel, z = case(frames=12, batch=1, n_height=4, n_layer=2, n_flow=2, dtype=torch.float64)
    engine = SynthesisEngine(model)
    reach = receptive_field(model.config)
    changed = z.clone()
    middle = z.size(3) // 2
    changed[..., middle] += 1.0
    sounds = [engine(mel, noise)[0] for noise in (z, changed)]
    moved = (sounds[0] != sounds[1]).nonzero().flatten()
    height = model.config.n_height
    distance = max(middle - moved.min() // height, moved.max() // height - middle) * height
    assert reach.per_flow == (4 - 1) * 3 * 4  # rows below the first, columns to a side, samples in a column
    assert reach.per_flow < distance <= reach.total == 2 * reach.per_flow


@pytest.mark.parametrize(
    ("name", "samples"),
    [
        ("waveflow-h16-r64", 489_600),
        ("nanoflow-h16-r128-emb512", 489_600),
        ("nanoflow-h16-r128-emb1024-f16", 979_200),
        ("waveflow-h32-r64", 2_023_680),
        ("waveflow-h64-r64", 8_225_280),
    ],
)
def test_latency_of_the_published_configs(name, samples):
    assert receptive_field(load_config(f"{ROOT}/configs/{name}.json").waveflow_config).total == samples


PEAK = """
import resource, sys, torch
from fast.engine import SynthesisEngine
from tests.support.vocoders import random_vocoder
model = random_vocoder(n_height=16, n_layer=2, n_flow=1, res_channels=2)
mel = torch.randn(1, 80, int(sys.argv[1]))
SynthesisEngine(model)(mel, model.sample_noise(mel, 1.0))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.soak
def test_memory_does_not_grow_with_the_length():
    short, long = 1_300, 10_400  # frames: 15 s, more than the buffers hold, and two minutes
    kilobytes = []
    for frames in (short, long):
        command = [sys.executable, "-c", PEAK, str(frames)]
        paths = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        kilobytes.append(int(subprocess.run(command, env=paths, check=True, capture_output=True, text=True).stdout))
    grown = 1024 * (kilobytes[1] - kilobytes[0]) / ((long - short) * 256)  # bytes for each sample
    assert grown < 48  # noise, audio, their copies and the mel; the upsampled mel alone would be 320


def test_wrong_input_is_named():
    model, mel, z = case()
    engine = SynthesisEngine(model)
    with pytest.raises(InputError, match=r"expected \[batch, bands, frames\]"):
        engine(mel[0], z)
    with pytest.raises(InputError, match=r"expected \[80, frames\]"):
        engine(mel[:, :40], z)
    with pytest.raises(InputError, match=r"expected \[8, columns\]"):
        engine(mel, z[:, :, :4])
    with pytest.raises(InputError, match="3 frames covers 768 samples, but z has 1024"):
        engine(mel, torch.cat([z, z], dim=3))
    with pytest.raises(InputError, match="no clips"):
        engine.synthesize_many([])
    with pytest.raises(InputError, match="precision 'int8': expected one of float32"):
        SynthesisEngine(model, precision="int8")


# --- a model's own engine ---------------------------------------------------------------------------------


def test_fast_inverse_folds_once_until_a_weight_changes(monkeypatch):
    made, make = [], SynthesisEngine.__init__
    monkeypatch.setattr(SynthesisEngine, "__init__", lambda self, model: (made.append(1), make(self, model))[1])
    model, mel, z = case()
    first = model.reverse_fast(mel, z=z)
    torch.testing.assert_close(model.reverse_fast(mel, z=z), first, atol=0, rtol=0)
    assert len(made) == 1
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    sum(parameter.square().sum() for parameter in model.parameters()).backward()
    changes = [
        optimizer.step,
        optimizer.step,
        lambda: model.load_state_dict(random_vocoder(seed=3).state_dict()),
        lambda: model.load_state_dict(random_vocoder(seed=4).state_dict(), assign=True),
        model.double,
    ]
    for count, change in enumerate(changes, start=2):
        change()
        to = next(model.parameters()).dtype
        assert_same(model.reverse_fast(mel.to(to), z=z.to(to)), plain_inverse(model, mel.to(to), z.to(to)), 1e-4)
        assert len(made) == count


def test_an_engine_goes_with_its_model():
    model, mel, z = case()
    model.reverse_fast(mel, z=z)
    engine = weakref.ref(engine_of(model))
    assert engine() is not None
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(twin.reverse_fast(mel, z=z), model.reverse_fast(mel, z=z))
        assert engine_of(twin) is not engine()
    del model, twin
    gc.collect()
    assert engine() is None and not engines._kept


def test_a_kept_engine_does_not_mind_inference_mode():
    model, mel, z = case()
    expected = plain_inverse(model, mel, z)
    for mode in (True, False, True):
        with torch.inference_mode(mode):
            assert_same(model.reverse_fast(mel, z=z), expected, 1e-4)
    with torch.inference_mode():
        model, mel, z = case()
        assert_same(model.reverse_fast(mel, z=z), expected, 1e-4)
