"""vocoder.py: what users of Python give is taken as what it means, or refused in one line of this project's words."""

import math
import pathlib
import warnings
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

import hubconf
from audio import MAX_SAMPLES, write_mel
from config import DataConfig
from fast.engine import SynthesisEngine, engine_of
from harness.errors import InputError
from jobs.metrics import _system
from jobs.synthesis import Request
from synthesis.arguments import tensor_of
from synthesis.denoiser import bias_spectrum, denoise
from synthesis.mel_matching import MAX_PASSES, match_mel
from synthesis.streaming import Reach, _OneFlow
from tests.support.experiments import ROOT, run
from tests.support.vocoders import random_vocoder
from vocoder import Clip, Finish, Vocoder

MEL = torch.randn(80, 6, generator=torch.Generator().manual_seed(0)) - 5
ARRAY = MEL.numpy()
AUDIO = 0.1 * np.sin(np.arange(3000, dtype=np.float32) / 7)
NO_CONFIG = ROOT / "tests" / "golden" / "checkpoints_nanoflow" / "dataparallel" / "waveflow_60"
# Words in which numpy, PyTorch, librosa or Python itself would complain.
FOREIGN = ("dtype of", "can't convert", "strides", "memory format", "NestedTensorImpl", "infer", "unhashable",
           "PathLike", "not supported between", "Overflow", "manual_seed", "ambiguous", "Errno", "interpreted",
           "no data!")  # fmt: skip


@pytest.fixture(scope="module")
def vocoder():
    return Vocoder(random_vocoder(n_flow=1), DataConfig())


def refused(call, *begins):
    """The one line with which a call is refused; it begins with one of these words."""
    with warnings.catch_warnings(action="error"), pytest.raises(InputError) as error:
        call()
    line = str(error.value)
    assert "\n" not in line and len(line) <= 2_000 and not any(word in line for word in FOREIGN), line
    assert not begins or line.startswith(begins), line
    return line


def table(*rows):
    """Parameters of a test: an argument's name and a value, for each value of each row, with readable ids."""
    return pytest.mark.parametrize(
        ("name", "value"),
        [
            pytest.param(name, value, id=f"{name}-{number}-{type(value).__name__}")
            for name, values in rows
            for number, value in enumerate(values)
        ],
    )


# --- numbers ----------------------------------------------------------------------------------------------

NO_NUMBERS = ("x", "1", b"1", bytearray(b"1"), [1], {}, 1j, True, np.True_, object(), np.array([1.0]), torch.ones(2),
              np.array("1"), np.datetime64("2026-01-01"), torch.empty((), device="meta"), math.nan, -math.inf, math.inf,
              10**400, 10**5000, -1, -1e-9, np.float32(-1), torch.tensor(math.nan))  # fmt: skip
NOT_WHOLE = (*NO_NUMBERS, 1.5, 1.0, np.float64(2), torch.tensor(1.0), Fraction(1, 2))
NO_SEEDS = (-(2**63) - 1, 2**64, 10**30, *(value for value in NOT_WHOLE if type(value) is not int))
NO_LOOKAHEAD = [value for value in NOT_WHOLE if type(value) is not int or value < 0]  # as long as one likes
WRONG_NUMBERS = (
    ("temp", (None, *NO_NUMBERS)),
    ("seed", NO_SEEDS),
    ("match_mel", (None, MAX_PASSES + 1, 10**9, *NOT_WHOLE)),
    ("denoise", (None, 1e38, *NO_NUMBERS)),
)
RIGHT_NUMBERS = (
    ("temp", (1, 1.0, np.float16(1), np.float32(1), np.float64(1), np.longdouble(1), np.int8(1), np.array(1.0),
              torch.tensor(1.0), torch.tensor(1, dtype=torch.bfloat16), torch.tensor(1.0, requires_grad=True),
              Fraction(1))),
    ("seed", (3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3))),
    ("match_mel", (0, np.int32(0), torch.tensor(0))),
    ("denoise", (0, np.float32(0), -0.0, torch.tensor(0.0))),
)  # fmt: skip


@table(*WRONG_NUMBERS)
def test_what_is_no_number_of_its_kind_is_refused(vocoder, name, value):
    refused(lambda: vocoder(ARRAY, **{name: value}), f"{name} ")
    refused(lambda: vocoder([], **{name: value}), f"{name} ")  # also where there is nothing to do


@table(*WRONG_NUMBERS[:2], ("lookahead_frames", NO_LOOKAHEAD))
def test_a_stream_refuses_it_before_its_first_chunk(vocoder, name, value):
    refused(lambda: vocoder.stream(ARRAY, **{name: value}), f"{name} ")


@table(*WRONG_NUMBERS[:2])
def test_so_do_clips_and_files(vocoder, tmp_path, name, value):
    write_mel(tmp_path / "mel.npy", MEL)
    numbers = {"temp": 1.0, "seed": 0, name: value}
    refused(lambda: vocoder.clip("it", MEL, **numbers), f"{name} ")
    refused(lambda: vocoder.read(tmp_path / "mel.npy", **numbers), f"{name} ")


@table(*RIGHT_NUMBERS)
def test_a_number_of_any_library_is_one(vocoder, name, value):
    plain = {"temp": 1.0, "seed": 3, "match_mel": 0, "denoise": 0.0}
    np.testing.assert_array_equal(vocoder(ARRAY, **{**plain, name: value}), vocoder(ARRAY, **plain))


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63, 2**64 - 1])
def test_every_seed_of_pytorch_is_one(vocoder, seed):
    np.testing.assert_array_equal(vocoder(ARRAY, seed=seed), vocoder(ARRAY, seed=seed))
    assert len(np.concatenate(list(vocoder.stream(ARRAY, seed=seed)))) == 1280


def test_numbers_of_numpy_reach_what_they_are_of(vocoder):
    mel = np.repeat(ARRAY, 2, axis=1)
    wanted = vocoder(mel, seed=1, match_mel=2, denoise=0.5)
    np.testing.assert_array_equal(vocoder(mel, seed=1, match_mel=np.int64(2), denoise=np.float64(0.5)), wanted)
    assert not np.array_equal(vocoder(mel, seed=1), wanted)
    chunks = [torch.cat(list(vocoder.stream(MEL, seed=1, lookahead_frames=n))) for n in (9, np.int64(9))]
    assert torch.equal(*chunks)


# --- mels -------------------------------------------------------------------------------------------------


def big_endian(array):
    return array.astype(array.dtype.newbyteorder(">"))


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def in_a_record(array):
    """The array as a field of records of an odd size: not aligned, its strides no multiple of a number's."""
    records = np.zeros(array.shape, [("before", "i1"), ("mel", array.dtype)])
    records["mel"] = array
    return records["mel"]


SAME_ARRAYS = {
    "negative rows": lambda a: a[::-1].copy()[::-1],
    "negative columns": lambda a: a[..., ::-1].copy()[..., ::-1],
    "big-endian": big_endian,
    "big-endian double": lambda a: big_endian(a.astype("f8")),
    "Fortran": np.asfortranarray,
    "double": lambda a: a.astype(np.float64),
    "read-only": read_only,
    "every other": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "record": in_a_record,
    "mask of nothing": np.ma.array,
    "subclass": lambda a: a.view(type("Mine", (np.ndarray,), {})),
}
SAME_TENSORS = {
    "gradient": lambda m: m.clone().requires_grad_(),
    "graph": lambda m: m.clone().requires_grad_() * 1,
    "parameter": torch.nn.Parameter,
    "double": torch.Tensor.double,
    "strides": lambda m: m.repeat_interleave(2, -1)[..., ::2],
    "negative": lambda m: torch.complex(m, -m).conj().imag,
}
HALVES = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "numpy half": lambda m: m.half().numpy(),
    "numpy big-endian half": lambda m: big_endian(m.half().numpy()),
}


def same(kinds):
    return pytest.mark.parametrize("change", kinds.values(), ids=kinds)


@same(SAME_ARRAYS)
def test_an_array_is_a_mel_however_it_lies(vocoder, change):
    with warnings.catch_warnings(action="error"):
        for mel in (ARRAY, np.stack([ARRAY, ARRAY[:, ::-1]])):
            np.testing.assert_array_equal(vocoder(change(mel), seed=1), vocoder(mel, seed=1))
        np.testing.assert_array_equal(vocoder([change(ARRAY)] * 2, seed=1), vocoder([ARRAY] * 2, seed=1))
        streams = [np.concatenate(list(vocoder.stream(mel, seed=1))) for mel in (change(ARRAY), ARRAY)]
        np.testing.assert_array_equal(*streams)
        assert torch.equal(vocoder.clip("it", change(ARRAY), 1.0, 1).mel, MEL)


@same(SAME_TENSORS)
def test_a_tensor_is_a_mel_however_it_came_about(vocoder, change):
    audio = vocoder(change(MEL), seed=1)
    assert torch.equal(audio, vocoder(MEL, seed=1)) and not audio.requires_grad
    assert torch.equal(
        torch.cat(list(vocoder.stream(change(MEL), seed=1))), torch.cat(list(vocoder.stream(MEL, seed=1)))
    )


@same(HALVES)
def test_a_mel_in_half_precision_is_one(vocoder, change):
    mel = change(MEL)
    wanted = vocoder(torch.as_tensor(np.asarray(mel, "f4")) if isinstance(mel, np.ndarray) else mel.float(), seed=1)
    assert torch.equal(torch.as_tensor(vocoder(mel, seed=1)), wanted)


def test_mels_of_inference_mode_are_mels_there_and_outside(vocoder):
    wanted = vocoder(MEL, seed=1), torch.cat(list(vocoder.stream(MEL, seed=1)))
    with torch.inference_mode():
        mel = MEL.clone()
        assert torch.equal(vocoder(mel, seed=1), wanted[0])
        assert torch.equal(torch.cat(list(vocoder.stream(mel, seed=1))), wanted[1])
    assert torch.equal(vocoder(mel, seed=1), wanted[0])


def masked(array):
    return np.ma.array(array, mask=array > array.mean())


def fake(array):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        return torch.zeros(array.shape)


@pytest.fixture
def nested():
    with warnings.catch_warnings(action="ignore"):
        return torch.nested.nested_tensor([MEL, MEL])


NO_ARRAYS = {
    "nothing": lambda a: None,
    "number": lambda a: 5,
    "text": lambda a: "abc",
    "dict": lambda a: {"mel": a},
    "scalar": lambda a: np.float32(1),
    "object": lambda a: a.astype(object),
    "texts": lambda a: a.astype("U"),
    "complex": lambda a: a.astype(np.complex64),
    "long double": lambda a: a.astype(np.longdouble),
    "integers": lambda a: a.astype(np.int16),
    "booleans": lambda a: a > 0,
    "records": lambda a: np.zeros(a.shape, [("x", "f4")]),
    "masked": masked,
    "NaN": lambda a: a * np.nan,
    "infinite": lambda a: a / np.zeros((), np.float32),
    "beyond float32": lambda a: a.astype("f8") * 1e300,
    "empty": lambda a: a[..., :0],
    "no dimension": lambda a: np.array(1.0, "f4"),
    "four dimensions": lambda a: np.zeros((1, 1, *a.shape), "f4")[:, :, None],
    "endless": lambda a: np.broadcast_to(np.float32(-5), (*a.shape[:-1], 2**40)),
    "endless, to be copied": lambda a: np.broadcast_to(np.array(-5, ">f8"), (*a.shape[:-1], 2**40)),
    "endless tensor": lambda a: torch.tensor(-5.0).double().expand(*a.shape[:-1], 2**40),
    "sparse": lambda a: torch.tensor(a).to_sparse(),
    "meta": lambda a: torch.empty(a.shape, device="meta"),
    "whole tensor": lambda a: torch.tensor(a).int(),
    "complex tensor": lambda a: torch.tensor(a) * 1j,
    "eight bits": lambda a: torch.tensor(a).to(torch.float8_e4m3fn),
    "fake": fake,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", NO_ARRAYS)
def test_what_holds_no_mel_is_refused(vocoder, kind):
    with np.errstate(all="ignore"):
        wrong = NO_ARRAYS[kind](ARRAY)
    refused(lambda: vocoder(wrong), "mel: ")
    refused(lambda: vocoder([ARRAY, wrong]), "mel 1: ")
    refused(lambda: list(vocoder.stream(wrong)), "mel 0: ", "mels: ")
    refused(lambda: list(vocoder.stream([ARRAY, wrong])), "mel 1: ")
    refused(lambda: vocoder.clip("it", wrong, 1.0, 0), "it: ")


def test_nested_and_quantized_tensors_and_those_of_transforms_are_refused(vocoder, nested):
    with warnings.catch_warnings(action="ignore"):
        quantized = torch.quantize_per_tensor(MEL, 0.1, 0, torch.qint8)
    for wrong in (nested, quantized):
        refused(lambda wrong=wrong: vocoder(wrong), "mel: ")
        refused(lambda wrong=wrong: vocoder([wrong]), "mel: ")
        refused(lambda wrong=wrong: list(vocoder.stream(wrong)), "mel 0: ")
        refused(lambda wrong=wrong: vocoder.mel(wrong, 22_050), "audio: ")
    refused(lambda: torch.func.vmap(lambda mel: vocoder(mel, seed=0))(torch.stack([MEL, MEL])), "mel: ")


@pytest.mark.parametrize(
    "mel",
    [ARRAY.T, ARRAY[:40], ARRAY[:, :1], ARRAY[0], ARRAY[None, None], ARRAY[None, :40], ARRAY[None][:0]],
    ids=lambda mel: str(mel.shape),
)
def test_other_shapes_are_refused_by_their_own_name(vocoder, mel):
    line = refused(lambda: vocoder(mel), "mel: a mel of shape")
    assert str(mel.shape[-1]) in line and "expected (80, frames)" in line


# --- streams ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [None, 5, "abc", b"abc", {"mel": ARRAY}, 1.5, object(), ...], ids=type)
def test_what_is_no_stream_is_refused_at_once(vocoder, wrong):
    refused(lambda: vocoder.stream(wrong), f"mels: of type {type(wrong).__name__}, expected")


def test_frames_that_go_wrong_in_the_middle_come_after_what_could_be_made(vocoder):
    mel = np.tile(ARRAY, (1, 40))
    for wrong, words in ((mel * np.nan, "NaN"), (None, "NoneType"), (mel[:40], r"(40, 240)"), (mel[:40, 0], "(40, 1)")):
        chunks = vocoder.stream(iter([mel, wrong]), seed=0)
        made = [next(chunks)]
        assert words in refused(lambda chunks=chunks, made=made: made.extend(chunks), "mel 1: ")
        np.testing.assert_array_equal(made[0], next(vocoder.stream(mel, seed=0)))
        assert list(chunks) == []


def test_an_error_of_the_users_own_frames_stays_theirs(vocoder):
    def frames():
        yield ARRAY
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        list(vocoder.stream(frames()))


def test_frames_may_be_written_over_once_they_are_given(vocoder):
    mel, buffer = np.tile(ARRAY, (1, 40)), np.zeros(80, np.float32)

    def frames():
        for frame in mel.T:
            buffer[:] = frame
            yield buffer

    wanted = np.concatenate(list(vocoder.stream(mel, seed=0)))
    np.testing.assert_allclose(np.concatenate(list(vocoder.stream(frames(), seed=0))), wanted, atol=1e-5)
    given, made = mel.copy(), []
    for chunk in vocoder.stream(given, seed=0):
        made.append(chunk)
        given[:] = 0
    assert len(made) > 1
    np.testing.assert_array_equal(np.concatenate(made), wanted)


@pytest.mark.parametrize("kind", ["arrays", "tensors", "tuples", "mixed", "[1, M, f]"])
def test_frames_are_arrays_and_tensors_of_any_length(vocoder, kind):
    pieces = {
        "arrays": [ARRAY[:, 0], ARRAY[:, 1:2], ARRAY[:, 2:]],
        "tensors": [MEL[:, 0], MEL[:, 1:].double()],
        "tuples": (ARRAY[:, :3], ARRAY[:, 3:]),
        "mixed": [MEL[:, :1], big_endian(ARRAY)[:, 1:]],
        "[1, M, f]": [ARRAY[None]],
    }[kind]
    audio = np.concatenate([np.asarray(chunk) for chunk in vocoder.stream(pieces, seed=0)])
    np.testing.assert_allclose(audio, np.concatenate(list(vocoder.stream(ARRAY, seed=0))), atol=1e-5)


# --- recordings -------------------------------------------------------------------------------------------


@same({**SAME_ARRAYS, **SAME_TENSORS, **HALVES})
@pytest.mark.parametrize("rate", [22_050, 44_100])
def test_an_array_is_a_recording_however_it_lies(vocoder, change, rate):
    audio = change(AUDIO if change in SAME_ARRAYS.values() else torch.tensor(AUDIO))
    wanted = np.asarray(audio.detach().float().resolve_neg() if isinstance(audio, torch.Tensor) else audio, "f4")
    with warnings.catch_warnings(action="error"):
        mel = vocoder.mel(audio, rate)
    assert type(mel) is (torch.Tensor if isinstance(audio, torch.Tensor) else np.ndarray)
    np.testing.assert_array_equal(np.asarray(mel), vocoder.mel(wanted, rate))


def test_lists_and_a_leading_axis_of_one_are_recordings(vocoder):
    wanted = vocoder.mel(AUDIO, 44_100)
    for audio in (AUDIO.tolist(), tuple(AUDIO.tolist())):
        np.testing.assert_array_equal(vocoder.mel(audio, 44_100), wanted)
    np.testing.assert_array_equal(vocoder.mel(AUDIO[None], 44_100), wanted[None])
    assert torch.equal(vocoder.mel(torch.tensor(AUDIO)[None], 22_050)[0], vocoder.mel(torch.tensor(AUDIO), 22_050))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rate", [22_050, 44_100])
@pytest.mark.parametrize("kind", NO_ARRAYS)
def test_what_holds_no_recording_is_refused(vocoder, kind, rate):
    with np.errstate(all="ignore"):
        wrong = NO_ARRAYS[kind](AUDIO)
    refused(lambda: vocoder.mel(wrong, rate), "audio: ", "audio of shape ")


@pytest.mark.parametrize(
    "audio",
    [np.zeros((2, 3000), "f4"), np.zeros((3000, 2), "f4"), AUDIO[:100], [], [[0.1], [0.1, 0.2]], [0.1, None], ["x"],
     [AUDIO, None], [MEL, MEL[:2]], [10**400], AUDIO * np.float32(1e38), [1, 2, 3]],
)  # fmt: skip
@pytest.mark.parametrize("rate", [22_050, 44_100])
@pytest.mark.parametrize("rescale", [False, True])
def test_recordings_of_other_shapes_or_levels_are_refused(vocoder, audio, rate, rescale):
    with np.errstate(all="ignore"):
        vocoder = Vocoder(vocoder.model, DataConfig(rescale=rescale))
        if rescale and isinstance(audio, np.ndarray) and audio.max() > 1:
            return  # brought to its right level
        refused(lambda: vocoder.mel(audio, rate), "audio")


NO_RATES = (None, 0, 0.5, 1.5, 44_100.5, 2**31, 1e10, np.float32(0.5), torch.tensor(1.5), *NO_NUMBERS)


@table(("sampling_rate", NO_RATES))
def test_what_is_no_rate_is_refused(vocoder, name, value):
    refused(lambda: vocoder.mel(AUDIO, value), f"{name} ")


@pytest.mark.parametrize("rate", [44_100, 44_100.0, np.int64(44_100), np.uint16(44_100), np.float32(44_100),
                                  np.array(44_100), torch.tensor(44_100)], ids=repr)  # fmt: skip
def test_a_rate_of_any_library_is_one(vocoder, rate):
    np.testing.assert_array_equal(vocoder.mel(AUDIO, rate), vocoder.mel(AUDIO, 44_100))


def test_a_rate_at_which_a_recording_is_too_long_is_refused(vocoder):
    samples = np.zeros(20_000, np.float32)
    assert len(samples) * 22_050 > MAX_SAMPLES
    assert "cut it up" in refused(lambda: vocoder.mel(samples, 1), "audio: 20000 samples")
    line = refused(lambda: vocoder.mel(np.broadcast_to(np.float32(0), MAX_SAMPLES + 1), 22_050), "audio: ")
    assert "cut it up" in line


# --- where a vocoder comes from ---------------------------------------------------------------------------

NO_PATHS = (None, 5, 1.5, b"x", b"", "", [], {}, True, object(), np.array("x"), torch.zeros(2))
OPTIONS = (
    ("path", NO_PATHS),
    ("config", (*NO_PATHS[1:], "missing.json", "\0", "\ud800", "a" * 5000, pathlib.Path("b" * 5000), "/dev/zero")),
    ("device", (5, "", "x", [], b"cpu", "meta", torch.device("meta"), "cuda:99", "\ud800", True)),
    ("precision", (5, "", "x", torch.float16, [], {}, b"float32", True, np.array(["a", "b"]), torch.ones(2))),
    ("mel_preset", (5, "", "x", [], {}, b"log10", True, np.array(["a", "b"]), torch.ones(2))),
)


@pytest.mark.parametrize("load", [Vocoder.from_pretrained, hubconf.nanoflow], ids=["from_pretrained", "hub"])
@table(*OPTIONS)
def test_what_no_vocoder_can_be_had_from_is_refused(load, name, value):
    refused(lambda: load(**{"path": "nanoflow", name: value}), f"{name} ")


@pytest.mark.parametrize(
    "path",
    ["missing", "\0", "\ud800", "a" * 5000, "a" * 5000 + ".json", pathlib.Path("b" * 300), "/dev/zero", "x" * 9**5],
)
def test_names_that_no_file_has_are_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(lambda: Vocoder.from_pretrained(path), "checkpoint ", "config ", "path ")


def test_paths_are_taken_in_any_form(tmp_path):
    class Mine:
        def __fspath__(self):
            return str(tmp_path / "weights.safetensors")

    shipped = ROOT / "pretrained" / "nanoflow-lp128-r64.safetensors"
    (tmp_path / "weights.safetensors").symlink_to(shipped)
    for path in (Mine(), np.str_(shipped), pathlib.PurePath(shipped)):
        assert Vocoder.from_pretrained(path, device=torch.device("cpu")).n_mels == 80


def test_the_precisions_of_engines_are_names(vocoder):
    for wrong in ([], {}, torch.float16, "int4", 5):
        refused(lambda wrong=wrong: SynthesisEngine(vocoder.model, wrong), "precision ")


def test_a_warning_is_of_the_line_that_loads(monkeypatch):
    monkeypatch.setattr("fast.engine.fast_bfloat16", lambda: False)
    with pytest.warns(UserWarning, match="no bfloat16 products") as found:
        Vocoder.from_pretrained("nanoflow", device="cpu", precision="bfloat16")
    assert found[0].filename == __file__


def test_a_warning_of_a_mel_is_of_the_line_that_gives_it(vocoder):
    vocoder = Vocoder.from_pretrained("nanoflow", device="cpu")
    for give in (lambda: vocoder(ARRAY + 30), lambda: vocoder([MEL + 30])):
        vocoder.reader.warned = False
        with pytest.warns(UserWarning, match="it will sound like noise") as found:
            give()
        assert found[0].filename == __file__


def test_a_warning_of_broken_files_is_of_the_line_that_loads(tmp_path):
    shipped = torch.load(NO_CONFIG, weights_only=True)
    for name, content in ((f"waveflow_{shipped['iteration']}", shipped), ("waveflow_99", b"")):
        torch.save(content, tmp_path / name)
    with pytest.warns(UserWarning, match="trying the one before") as found, pytest.raises(InputError, match="config="):
        Vocoder.from_pretrained(tmp_path)
    assert found[0].filename == __file__


# --- weights that know no config --------------------------------------------------------------------------


def test_the_remedy_is_that_of_the_interface_in_use(vocoder, capsys, tmp_path):
    line = refused(lambda: Vocoder.from_pretrained(NO_CONFIG), "checkpoint ")
    assert "does not know its config; pass config=FILE" in line
    write_mel(tmp_path / "mel.npy", MEL)
    assert run("--synthesize", "--weights", NO_CONFIG, "--input", tmp_path / "mel.npy", "--output", tmp_path) == 1
    error = capsys.readouterr().err
    assert "does not know its config; give it with -c FILE" in error and "config=" not in error
    line = refused(lambda: _system(str(NO_CONFIG), vocoder, [], Request(), 0), "checkpoint ")  # --metrics
    assert "python checkpoint.py convert" in line and "config=" not in line


# --- files, clips and their sounds ------------------------------------------------------------------------


@table(("path", NO_PATHS))
def test_what_is_no_path_is_not_read(vocoder, name, value):
    refused(lambda: vocoder.read(value, 1.0, 0), "path ")


def test_files_are_read_by_paths_of_any_form(vocoder, tmp_path):
    write_mel(tmp_path / "mel.npy", MEL)
    clips = [vocoder.read(form(tmp_path / "mel.npy"), np.float32(1), np.int64(3)) for form in (str, pathlib.Path)]
    assert clips[0].source == clips[1].source == str(tmp_path / "mel.npy")
    assert torch.equal(clips[0].z, vocoder.clip("it", MEL, 1, 3).z)
    for path in ("a" * 5000, "a" * 300, "\0", "\ud800.npy", tmp_path):
        refused(lambda path=path: vocoder.read(path, 1.0, 0))


@table(
    (
        "clips",
        (
            None,
            5,
            "abc",
            [None],
            [ARRAY],
            [Clip("it", ARRAY, MEL)],
            [Clip("it", MEL[0], MEL)],
            Clip("it", MEL, MEL),
            [Clip("it", MEL[:, :1], MEL[:8])],
            [Clip("it", MEL.to_sparse(), MEL)],
            [Clip("it", MEL, MEL.to("meta"))],
            [Clip("it", MEL.int(), MEL)],
            [Clip("it", MEL[:40], MEL[:8])],
            [Clip("it", MEL, MEL[:7])],
        ),
    ),
    ("batch_seconds", NO_NUMBERS),
    ("finish", (None, 5, (1, 0.5), {})),
)
def test_what_cannot_be_synthesized_is_refused(vocoder, name, value):
    given = {"clips": [vocoder.clip("it", MEL, 1.0, 0)], name: value}
    refused(lambda: list(vocoder.synthesize(**given)), name, "clip ", "mel of ", "noise of ", "z of ")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("parts", [("mel",), ("z",), ("mel", "z")])
def test_clips_of_other_floats_are_synthesized(vocoder, parts, dtype):
    clip = vocoder.clip("it", MEL, 1.0, 0)
    rounded = replace(clip, **{part: getattr(clip, part).to(dtype).float() for part in parts})
    other = replace(clip, **{part: getattr(clip, part).to(dtype) for part in parts})
    [[expected], [sound]] = (next(vocoder.synthesize([one])) for one in (rounded, other))
    assert torch.equal(sound.audio, expected.audio)


def test_lack_of_memory_is_called_that(vocoder, monkeypatch):
    def lack(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.Tensor, "cpu", lack)
    with pytest.raises(torch.OutOfMemoryError):
        vocoder(MEL)


def test_clips_before_a_wrong_one_are_synthesized(vocoder):
    clip, made = vocoder.clip("it", MEL, 1.0, 0), []
    refused(lambda: made.extend(vocoder.synthesize([clip, clip, None], np.float64(0))), "clip None")
    assert len(made) == 2


@table(*WRONG_NUMBERS[2:])
def test_a_finish_is_of_right_numbers(name, value):
    refused(lambda: Finish(**{name: value}), f"{name} ")


# --- what is around the model -----------------------------------------------------------------------------


@table(("match_mel", WRONG_NUMBERS[2][1]), ("denoise", WRONG_NUMBERS[3][1]))
def test_filters_refuse_what_is_no_number(vocoder, name, value):
    data, audio = vocoder.data, torch.zeros(3000)
    if name == "match_mel":
        mel = vocoder.mel(audio, 22_050)
        refused(lambda: match_mel(audio[None], mel[None], vocoder.mel_spectrogram, value), "match_mel ")
    else:
        refused(lambda: denoise(audio, bias_spectrum(audio, data), value, data), "denoise ")


def test_filters_refuse_other_shapes(vocoder):
    data, audio = vocoder.data, torch.zeros(1, 3000)
    mel, bias = vocoder.mel(audio, 22_050), bias_spectrum(audio[0], data)
    for wrong in ((audio[0], mel), (audio, mel[0]), (audio, mel[:, :40]), (audio, mel[..., :5]), (audio[:0], mel)):
        refused(lambda wrong=wrong: match_mel(*wrong, vocoder.mel_spectrogram, 1), "match_mel: audio ")
    for wrong in ((audio, bias), (audio[0], bias[:, 0]), (audio[0], bias[:40])):
        refused(lambda wrong=wrong: denoise(*wrong, 0.1, data), "denoise: audio ")


def test_one_flow_is_what_engines_take(vocoder):
    model = vocoder.model
    one = _OneFlow(model, model.flows()[0])
    assert list(map(id, one.buffers())) == list(map(id, model.buffers()))
    assert engine_of(one) is engine_of(one)


def test_lookahead_is_a_whole_number(vocoder):
    for wrong in NO_LOOKAHEAD:
        refused(lambda wrong=wrong: Reach.of(vocoder.model.config, wrong), "lookahead_frames ")


def test_an_array_that_fits_is_not_copied():
    assert tensor_of(ARRAY, "it").data_ptr() == ARRAY.__array_interface__["data"][0]
    assert tensor_of(MEL, "it").data_ptr() == MEL.data_ptr()
