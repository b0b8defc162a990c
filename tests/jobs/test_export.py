"""python checkpoint.py export: files that strangers run with onnxruntime, or torch, and numpy alone."""

import json
import re
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import jobs.export
from config import load_config
from harness.errors import InputError
from jobs.export import as_rows, export
from jobs.files import main
from tests.support.experiments import ROOT
from tests.support.vocoders import random_vocoder
from vocoder import Vocoder

PAGE = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
CONFIG = load_config(ROOT / "configs" / "demo.json")


def config_of(model, **data):
    """The experiment of a model."""
    data = CONFIG.data_config.model_copy(update=data)
    return CONFIG.model_copy(update={"waveflow_config": model.config, "data_config": data})


def mel_of(frames, seed=0):
    """Log magnitudes such as speech has, [1, 80, frames]."""
    return (8 * np.random.default_rng(seed).random((1, 80, frames)) - 10).astype(np.float32)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The weights that come with the project, with noise as an input, by the real command."""
    out = tmp_path_factory.mktemp("export") / "nanoflow.onnx"
    command = [sys.executable, "checkpoint.py", "export", "nanoflow", str(out), "--noise", "input"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, done


def test_the_command_says_what_it_wrote_and_how_far_it_is_from_the_model(shipped):
    out, done = shipped
    first, second = done.stdout.splitlines()
    assert first == (
        f"{out}: {out.stat().st_size:,} bytes; mel [1, 80, frames], noise [1, 256 * (frames - 1)] "
        "-> audio [1, 256 * (frames - 1)]"
    )
    assert float(second.split()[-1]) < 1e-5 and "onnxruntime" in second
    assert done.stderr == ""


@pytest.mark.parametrize("frames", [2, 3, 31])
def test_the_shipped_weights_speak_as_in_pytorch(shipped, frames):
    session = onnxruntime.InferenceSession(shipped[0])
    mel, noise = mel_of(frames), np.random.default_rng(1).standard_normal((1, 256 * (frames - 1))).astype(np.float32)
    [audio] = session.run(None, {"mel": mel, "noise": noise})
    model = Vocoder.from_pretrained("nanoflow", device="cpu").model
    expected = model.reverse_fast(torch.from_numpy(mel), z=as_rows(torch.from_numpy(noise), 16))
    np.testing.assert_allclose(audio, expected.numpy(), atol=1e-4)


def test_the_file_says_what_mel_it_expects_in_the_words_of_sherpa_onnx(shipped):
    model = onnx.load(shipped[0])
    onnx.checker.check_model(model, full_check=True)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    wanted = {"model_type": "hifigan", "sample_rate": "22050", "num_mels": "80", "hop_length": "256", "n_fft": "1024"}
    assert wanted.items() <= facts.items()
    assert facts["noise"] == "input" and facts["license"] == "CC-BY-SA-3.0" and facts["iteration"] == "5689"
    assert json.loads(facts["config"])["waveflow_config"]["coupling_type"] == "nanoflow"


def test_the_example_of_the_page_runs_where_nothing_of_ours_is(tmp_path):
    [example] = re.findall(r"^```python\n(import numpy.*?onnxruntime.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    command = ["export", "nanoflow", str(tmp_path / "nanoflow.onnx"), "--temp", "0.8"]
    assert main(command) == 0
    np.save(tmp_path / "mel.npy", mel_of(7)[0])
    done = subprocess.run([sys.executable, "-I", "-c", example], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and (tmp_path / "speech.wav").stat().st_size == 44 + 2 * 256 * 6
    # What sherpa-onnx gives it is one input, the mel, and what it takes is the first output.
    session = onnxruntime.InferenceSession(tmp_path / "nanoflow.onnx")
    assert [value.name for value in session.get_inputs()] == ["mel"]
    one, other = (session.run(None, {"mel": mel_of(3)})[0] for _ in range(2))
    assert one.shape == (1, 512) and not np.array_equal(one, other)


KINDS = [
    ("waveflow", {}),
    ("waveflow", {"bipartize": True, "n_flow": 4}),
    ("waveflow", {"transform": "spline"}),
    ("nanoflow", {}),
    ("nanoflow", {"transform": "spline", "bipartize": True}),
    ("nanoflow_naive", {}),
    ("nanoflow_decomp", {}),
    ("nanoflow_decomp", {"n_height": 32, "n_layer": 4}),
    ("waveflow_official", {"bipartize": True}),
    ("waveflow_official", {"n_height": 64, "n_layer": 6}),
    ("waveflow", {"n_height": 1}),
    ("nanoflow", {"linear_prediction": 12}),
    ("nanoflow", {"linear_prediction": 300}),
    ("nanoflow", {"upsample_strides": (5, 7), "linear_prediction": 8}),
]


@pytest.mark.parametrize(("kind", "changes"), KINDS, ids=str)
def test_every_variant_sounds_as_its_model(kind, changes, tmp_path):
    hop = 35 if "upsample_strides" in changes else 256  # not a multiple of the height
    data = CONFIG.data_config.model_copy(update={"hop_length": hop})
    model = random_vocoder(kind, data_config=data, **changes).eval()
    export(tmp_path / "it.onnx", model, config_of(model, hop_length=hop), None, {})
    session, height = onnxruntime.InferenceSession(tmp_path / "it.onnx"), model.config.n_height
    for frames in (2, 5, 12):
        mel = mel_of(frames, seed=frames)
        noise = np.random.default_rng(frames).standard_normal((1, hop * (frames - 1))).astype(np.float32)
        [audio] = session.run(None, {"mel": mel, "noise": noise})
        expected = model.reverse(torch.from_numpy(mel), z=as_rows(torch.from_numpy(noise), height))
        assert audio.shape == noise.shape
        np.testing.assert_allclose(audio, expected[:, : noise.shape[1]].numpy(), atol=1e-4)


def test_loud_frames_are_turned_down_and_spoilt_ones_are_heard(tmp_path):
    """The limit of linear prediction and values that are not finite, as in the model."""
    model = random_vocoder("nanoflow", data_config=CONFIG.data_config, linear_prediction=32).eval()
    with torch.no_grad():
        model.linear_prediction.log_scale.fill_(9.0)
    export(tmp_path / "it.onnx", model, config_of(model), None, {})
    session = onnxruntime.InferenceSession(tmp_path / "it.onnx")
    mel, noise = mel_of(8), np.random.default_rng(3).standard_normal((1, 256 * 7)).astype(np.float32)
    [audio] = session.run(None, {"mel": mel, "noise": noise})
    expected = model.reverse(torch.from_numpy(mel), z=as_rows(torch.from_numpy(noise), 8)).numpy()
    assert np.abs(expected).max() == pytest.approx(8.0)
    np.testing.assert_allclose(audio, expected, atol=1e-3)
    mel[0, 3, 5] = np.inf
    assert not np.isfinite(session.run(None, {"mel": mel, "noise": noise})[0]).all()


def test_decibels_and_temperature_are_inside(tmp_path):
    model = random_vocoder("waveflow", data_config=CONFIG.data_config, linear_prediction=8).eval()
    config = config_of(model, use_dbmel=True)
    model.linear_prediction.data = config.data_config
    assert export(tmp_path / "it.onnx", model, config, 0.0, {}).difference < 1e-5
    mel = np.random.default_rng(0).random((1, 80, 4)).astype(np.float32)
    [audio] = onnxruntime.InferenceSession(tmp_path / "it.onnx").run(None, {"mel": mel})
    torch.testing.assert_close(torch.from_numpy(audio), model.reverse(torch.from_numpy(mel), temp=0.0))


def test_torch_export_gives_the_same_with_any_number_of_frames(tmp_path):
    sizes = {"n_height": 4, "n_layer": 2, "n_flow": 2, "linear_prediction": 4}
    model = random_vocoder("nanoflow", data_config=CONFIG.data_config, **sizes).eval()
    compared = export(tmp_path / "it.pt2", model, config_of(model), None, {"data": "tones"})
    assert compared.difference < 1e-5 and compared.program.startswith("torch ")
    facts = {"metadata.json": ""}
    loaded = torch.export.load(tmp_path / "it.pt2", extra_files=facts).module()
    assert {"data": "tones", "sample_rate": "22050"}.items() <= json.loads(facts["metadata.json"]).items()
    for frames in (2, 13):
        mel, noise = torch.from_numpy(mel_of(frames)), torch.randn(1, 256 * (frames - 1))
        torch.testing.assert_close(loaded(mel, noise), model.reverse(mel, z=as_rows(noise, 4)), atol=1e-4, rtol=0)


def test_a_file_that_differs_is_not_written(tmp_path, monkeypatch):
    model = random_vocoder().eval()
    monkeypatch.setattr(jobs.export, "as_rows", lambda noise, height: as_rows(noise + 1e-3, height))
    with pytest.raises(InputError, match=r"not written; its audio differs from the model.s by .*e-0"):
        export(tmp_path / "it.onnx", model, config_of(model), None, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["out.wav"], "expected a name that ends with .onnx"),
        (["there.onnx"], "exists; choose another name"),
        (["out.onnx", "--noise", "input", "--temp", "0.5"], "--temp is that of noise inside"),
    ],
)
def test_what_cannot_be_exported_is_said_in_a_line(words, message, tmp_path, capsys, monkeypatch):
    (tmp_path / "there.onnx").touch()
    monkeypatch.chdir(tmp_path)
    assert main(["export", "nanoflow", *words]) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.mark.parametrize(("missing", "status", "said"), [("onnx", 1, "onnx"), ("onnxruntime", 0, "not compared")])
def test_without_the_packages_a_line_says_what_to_install(missing, status, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "fast.onnx_graph", raising=False)
    assert main(["export", "nanoflow", str(tmp_path / "out.onnx")]) == status
    captured = capsys.readouterr()
    assert (
        said in captured.out + captured.err
        and "install the packages of requirements-extra.txt" in captured.out + captured.err
    )
    assert (tmp_path / "out.onnx").exists() == (status == 0)
