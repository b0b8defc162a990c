"""The graph engine gives what the plain inverse gives; without a GPU all but the capture is tested."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from fast import gpu as graphs
from fast.engine import PRECISIONS, SynthesisEngine
from fast.gpu import GraphEngine
from fast.gpu_plan import Plan, quickest
from fast.gpu_tiles import HALF, TF32, TF32X3, Tile, kind_of
from harness.devices import choose_device
from tests.fast.test_engine import GRID, assert_same, case, plain_case
from tests.support.vocoders import plain_inverse, random_input, random_vocoder

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="captures graphs on a GPU")


def engine_of(model, dtype=None, **options):
    return GraphEngine(model.flows(), model.upsampler, dtype or next(model.parameters()).dtype, **options)


def run(engine, mel, z):
    return torch.stack(engine.synthesize_many([(m, noise[0]) for m, noise in zip(mel, z, strict=True)]))


def clips_of(model, lengths):
    """Clips of so many frames, less a few columns."""
    clips = []
    for frames in lengths:
        _, mel = random_input(model, frames=frames + 1, batch=1, seed=frames)
        columns = frames * 256 // model.config.n_height - frames
        clips.append((mel[0], torch.randn(model.config.n_height, columns, dtype=mel.dtype)))
    return clips


@GRID
def test_graph_engine_gives_the_plain_inverse(coupling, shape, transform):
    model, mel, z, expected = plain_case(coupling, shape, transform)
    assert_same(run(engine_of(model), mel, z), expected)


@pytest.mark.parametrize("height, n_flow, frames", [(8, 3, 13), (16, 2, 36), (32, 1, 140)])
def test_segments_of_a_long_clip_change_nothing(height, n_flow, frames):
    model, mel, z = case(frames=frames, batch=1, n_height=height, n_flow=n_flow, dtype=torch.float64)
    engine = engine_of(model, max_columns=1)
    assert 2 * engine.reach < engine.max_columns == graphs.bucket(4 * engine.reach) < z.size(3)
    assert_same(run(engine, mel, z), run(engine_of(model), mel, z))


def test_segments_need_all_of_their_overlap():
    model, mel, z = case("waveflow", frames=13, batch=1, n_flow=1, dtype=torch.float64)
    whole, engine = run(engine_of(model), mel, z), engine_of(model, max_columns=1)
    engine.reach = engine.reach // model.config.n_height  # what the first row sees
    assert (run(engine, mel, z) - whole).abs().max() > 1e-9


def test_clips_side_by_side_sound_as_they_do_alone():
    model = random_vocoder(dtype=torch.float64)
    engine, clips = engine_of(model, max_columns=1), clips_of(model, (5, 2, 4, 9, 1))
    for (mel, z), audio in zip(clips, engine.synthesize_many(clips), strict=True):
        assert_same(audio, plain_inverse(model, mel[None], z[None, None])[0])


def test_a_bucket_used_before_by_longer_clips_changes_nothing():
    model, mel, z = case(frames=4, dtype=torch.float64)
    engine = engine_of(model)
    engine.synthesize_many([(mel[0], z[0, 0])])
    ((held,),) = [engine._buckets.values()]
    for buffer in (held.state.noise, held.state.conditioning, held.state.params):
        buffer.fill_(torch.nan)  # as a synthesis that failed would leave them
    for length in (90, 81):
        assert engine._bucket(length) is held
        assert_same(run(engine, mel, z[..., :length])[:1], plain_inverse(model, mel, z[..., :length])[:1])


def test_buckets_are_few_and_little_is_padded():
    sizes = [graphs.bucket(n) for n in range(1, 2**15)]
    assert all(size >= n and size % graphs.BLOCK == 0 for n, size in enumerate(sizes, start=1))
    assert all(size <= max(1.25 * n, n + graphs.BLOCK) for n, size in enumerate(sizes, start=1))
    assert len(set(sizes)) <= 4 * 8


def test_columns_held_by_graphs_are_bounded():
    model, mel, z = case("waveflow", frames=17, batch=1, n_flow=1, n_layer=1, dtype=torch.float64)
    engine = engine_of(model, max_columns=256)
    for length in (100, 200, 300, 120, 512, 50):
        assert_same(run(engine, mel, z[..., :length]), plain_inverse(model, mel, z[..., :length]))
        assert sum(size for size, _ in engine._buckets) <= 2 * engine.max_columns
    assert [size for size, _ in engine._buckets] == [256, 128]  # the oldest first


def test_half_precision_stays_near():
    model, mel, z = case(n_flow=4)
    expected = plain_inverse(model, mel, z)
    for precision, tolerance in (("bfloat16", 0.03), ("float16", 0.005)):
        audio = run(engine_of(model, PRECISIONS[precision]), mel, z)
        assert audio.dtype == torch.float32
        assert 1e-5 < (audio - expected).std() / expected.std() < tolerance


@pytest.mark.parametrize("transform", ["affine", "spline"])
def test_engine_runs_on_the_fused_kernel(transform):
    pytest.importorskip("triton")
    model, mel, z = case(frames=2, batch=1, transform=transform, n_flow=2, n_layer_per_cycle=2)
    expected = plain_inverse(model, mel, z)
    device = choose_device()
    engine = engine_of(model.to(device), fused=True)
    assert_same(run(engine, mel.to(device), z.to(device)).cpu(), expected, 1e-4)
    assert all("blocks" in choice for choice in engine.choices.values())


# --- what is chosen -----------------------------------------------------------------------------------------


@pytest.fixture
def tf32():
    """TF32 allowed by the newer interface, after which reading the older one raises."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def test_tf32_may_be_allowed_through_the_newer_interface(tf32):
    with pytest.raises(RuntimeError):
        print(torch.backends.cuda.matmul.allow_tf32)
    model, mel, z = case()
    engine = engine_of(model)
    assert_same(run(engine, mel, z), plain_inverse(model, mel, z), 1e-4)
    assert [kind for _, kind in engine._buckets] == [TF32]


def test_kinds_of_products():
    assert kind_of(torch.float16, False) == kind_of(torch.bfloat16, True) == HALF
    assert (kind_of(torch.float32, True), kind_of(torch.float32, False)) == (TF32, TF32X3)


def test_the_first_plan_is_taken_untimed_where_results_must_not_vary():
    plans, timed = [Plan(HALF), Plan(TF32)], []

    def seconds(plan):
        timed.append(plan)
        return {HALF: 2.0, TF32: 1.0}[plan.kind]

    assert quickest(iter(plans), seconds) == plans[1] and timed == plans
    torch.use_deterministic_algorithms(True)
    try:
        assert quickest(iter(plans), seconds) == plans[0] and timed == plans
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_was_chosen_can_be_recorded():
    model, mel, z = case(frames=2)
    engine = engine_of(model)
    run(engine, mel, z)
    assert engine.choices == {"128 columns": "plain steps"}
    assert (
        str(Plan(HALF, Tile(64, 64, 32, 4, 3), 264))
        == "half, columns 64, depth 64, residual 32, warps 4, stages 3, 264 blocks"
    )


class FakeGraph:
    """CUDAGraph that runs nothing."""

    def pool(self):
        return 7


def test_capture_is_of_this_thread_and_on_a_stream_of_its_own(monkeypatch):
    asked, stream = [], SimpleNamespace(wait_stream=lambda other: None)

    @contextmanager
    def graph(graph, **options):
        asked.append(options)
        yield

    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(wait_stream=lambda other: None))
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    model, mel, z = case(n_flow=2)
    engine = engine_of(model)
    run(engine, mel, z)
    ((held,),) = [engine._buckets.values()]
    assert len(held._capture(None)) == 2
    assert [options["pool"] for options in asked] == [None, 7]
    assert all(options["capture_error_mode"] == "thread_local" and options["stream"] is stream for options in asked)


# --- on a GPU ---------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "coupling, transform", [("waveflow", "affine"), ("nanoflow", "affine"), ("nanoflow", "spline")]
)
def test_captured_graphs_match_plain_inverse(coupling, transform, fused):
    model, mel, z = case(coupling, transform=transform, n_height=16, n_layer=4, n_flow=4, res_channels=64)
    expected = plain_inverse(model, mel, z)
    engine = engine_of(model.cuda(), fused=fused)
    for _ in range(2):  # a graph is replayed
        assert_same(run(engine, mel.cuda(), z.cuda()).cpu(), expected, 2e-4)


@needs_gpu
@pytest.mark.parametrize("res_channels", [64, 128])
@pytest.mark.parametrize("precision, tolerance", [("tf32", 0.01), ("bfloat16", 0.06), ("float16", 0.01)])
def test_lower_precision_on_a_gpu_stays_near(precision, tolerance, res_channels, monkeypatch):
    model, mel, z = case(n_height=16, n_layer=8, n_flow=4, res_channels=res_channels)
    expected = plain_inverse(model, mel, z)
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32" if precision == "tf32" else "ieee")
    engine = SynthesisEngine(model.cuda(), precision="float32" if precision == "tf32" else precision)
    audio = engine(mel.cuda(), z.cuda()).cpu()
    assert 1e-6 < (audio - expected).std() / expected.std() < tolerance


@needs_gpu
def test_clips_and_long_clips_on_a_gpu():
    model, _, _ = case()
    clips = clips_of(model, (5, 2, 4, 9, 1))
    expected = [plain_inverse(model, mel[None], z[None, None])[0] for mel, z in clips]
    engine = engine_of(model.cuda(), max_columns=1)
    for audio, plain in zip(
        engine.synthesize_many([(mel.cuda(), z.cuda()) for mel, z in clips]), expected, strict=True
    ):
        assert_same(audio.cpu(), plain, 2e-4)
