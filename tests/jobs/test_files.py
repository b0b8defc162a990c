"""python checkpoint.py info and convert, and every kind of file wherever a checkpoint is taken."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open

import checkpoint as ckpt
from config import WaveFlowConfig, load_config
from harness.errors import InputError
from jobs.files import main
from model import build_model
from tests.support.experiments import ROOT, fails, run, write_config, write_corpus
from tests.support.vocoders import random_vocoder
from vocoder import Vocoder

MEL = torch.randn(80, 6, generator=torch.Generator().manual_seed(0)) - 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run's folder with a checkpoint and its evaluation."""
    top = tmp_path_factory.mktemp("files")
    corpus = top / "corpus"
    corpus.mkdir()
    path = write_config(top / "config.json", write_corpus(corpus), top / "runs")
    assert run("-c", path, "--max_iterations", 4) == 0
    assert run("-c", path, "--evaluate") == 0
    return top / "runs" / "tiny"


@pytest.fixture(scope="module")
def expected(folder):
    return Vocoder.from_pretrained(folder, device="cpu")(MEL, seed=0)


def test_the_command_tells_what_a_file_holds():
    done = subprocess.run(
        [sys.executable, "checkpoint.py", "info", "nanoflow"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for word in ("5,689", "nanoflow, ", "linear prediction of order 128", "CC-BY-SA-3.0", "22050 Hz, natural log"):
        assert word in done.stdout


def test_safetensors_hold_config_and_mel_statistics_and_come_with_a_card(folder, expected, tmp_path, capsys):
    out = tmp_path / "weights.safetensors"
    assert main(["convert", str(folder), str(out), "--card", "--data", "tones", "--licence", "CC0"]) == 0
    with safe_open(out, framework="pt") as file:
        facts = file.metadata()
    assert json.loads(facts["config"])["waveflow_config"]["model_name"] == "tiny"
    assert json.loads(facts["mel_statistics"])["clips"] == 6
    assert torch.equal(Vocoder.from_pretrained(out, device="cpu")(MEL, seed=0), expected)
    card = (tmp_path / "weights.md").read_text()
    for word in (
        "# tiny",
        "| tones |",
        "| CC0 |",
        "| 4 |",
        "nats/sample (mean over 2 test clips)",
        "x real time",
        "for synth",
    ):
        assert word in card
    capsys.readouterr()
    assert main(["info", str(out)]) == 0
    assert "training mels:" in capsys.readouterr().out
    assert main(["convert", str(folder), str(out)]) == 1
    assert "exists" in capsys.readouterr().err


LINE = "clip,samples,log_likelihood,prior,log_det\n"
DAMAGED_TABLES = {
    "empty": b"",
    "header only": LINE,
    "another column": LINE.replace("log_likelihood", "loss") + "a.wav,9,1.0,1.0,0.0\n",
    "text": LINE + "a.wav,9,1.0,1.0,0.0\nb.wav,9,much,1.0,0.0\n",
    "short row": LINE + "a.wav,9,1.0,1.0,0.0\nb.wav,9\n",
    "nan": LINE + "a.wav,9,1.0,1.0,0.0\nb.wav,9,nan,1.0,0.0\n",
    "infinite": LINE + "a.wav,9,-inf,1.0,0.0\n",
    "binary": bytes(range(256)) * 9,
    "long field": LINE + "a" * 200_000 + ",9,1.0,1.0,0.0\n",
}


@pytest.mark.parametrize("what", [*DAMAGED_TABLES, "missing", "folder", "pipe"])
def test_a_card_beside_a_damaged_evaluation_says_not_evaluated(what, folder, tmp_path, capsys):
    shutil.copy(folder / "waveflow_4", tmp_path)
    table = tmp_path / "evaluation" / "waveflow_4.csv"
    table.parent.mkdir()
    if what in DAMAGED_TABLES:
        content = DAMAGED_TABLES[what]
        table.write_bytes(content if isinstance(content, bytes) else content.encode())
    elif what != "missing":
        {"folder": os.mkdir, "pipe": os.mkfifo}[what](table)
    assert main(["convert", str(tmp_path / "waveflow_4"), str(tmp_path / "w.safetensors"), "--card"]) == 0
    assert "| log-likelihood | not evaluated |" in (tmp_path / "w.md").read_text()
    assert capsys.readouterr().err.count("the weights were not evaluated") == (what != "missing")


def test_a_page_of_the_cards_name_is_not_written_over(folder, tmp_path, capsys):
    (tmp_path / "w.md").write_text("my notes")
    assert main(["convert", str(folder), str(tmp_path / "w.safetensors"), "--card"]) == 1
    assert "w.md: exists; choose another name, or remove it" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["w.md"] and (tmp_path / "w.md").read_text() == "my notes"


def test_texts_in_a_card_are_no_markdown_and_lines_of_info_are_lines(folder, tmp_path, capsys):
    out = tmp_path / "w.safetensors"
    data = "a|b\n# heading <b>\x1b[31m `code` [link](x) *bold* _it_"
    assert main(["convert", str(folder), str(out), "--card", "--data", data, "--licence", "CC0-1.0 (see ü)"]) == 0
    card = (tmp_path / "w.md").read_text()
    [row] = [line for line in card.splitlines() if line.startswith("| training data |")]
    assert row.isprintable() and not re.search(r"(?<!\\)[`*_<\[]", row) and len(re.findall(r"(?<!\\)\|", row)) == 3
    assert "| licence of the weights | CC0-1.0 (see ü) |" in card
    capsys.readouterr()
    assert main(["info", str(out)]) == 0
    lines = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert sorted(lines[-2:]) == ["data", "license"]  # the format keeps no order


@pytest.mark.parametrize("flag", ["--data", "--licence"])
@pytest.mark.parametrize("suffix", [".safetensors", ""])
def test_texts_that_are_not_utf8_are_refused_before_anything_is_written(flag, suffix, folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["convert", str(folder), str(tmp_path / f"w{suffix}"), "--card", flag, "x\udcff"])
    assert f"argument {flag}: x\\udcff: expected text in UTF-8" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_files_may_have_names_that_are_not_utf8(folder, expected, tmp_path, capsys):
    for name in ("b\udcff.safetensors", "waveflow_4\udcff"):
        assert main(["convert", str(folder), str(tmp_path / name), "--card"]) == 0
        assert main(["info", str(tmp_path / name)]) == 0
        assert torch.equal(Vocoder.from_pretrained(tmp_path / name, device="cpu")(MEL, seed=0), expected)


def test_safetensors_become_a_file_that_the_published_code_takes_up(folder, expected, tmp_path):
    assert main(["convert", str(folder), str(tmp_path / "a.safetensors")]) == 0
    assert main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "waveflow_4")]) == 0
    content = torch.load(tmp_path / "waveflow_4", weights_only=True)  # what their code reads of it
    assert content["iteration"] == 4 and content["learning_rate"] > 0
    parameters = [torch.nn.Parameter(value) for value in content["model"].values()]
    optimizer = torch.optim.Adam(parameters, lr=1)
    optimizer.load_state_dict(content["optimizer"])
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    schedule.load_state_dict(content["scheduler"])
    assert schedule.last_epoch == 4 and optimizer.param_groups[0]["lr"] == content["learning_rate"]
    assert content["model"].keys() == torch.load(folder / "waveflow_4", weights_only=True)["model"].keys()
    assert torch.equal(Vocoder.from_pretrained(tmp_path / "waveflow_4", device="cpu")(MEL, seed=0), expected)
    assert run("-c", folder.parents[1] / "config.json", "--evaluate", "--weights", tmp_path / "waveflow_4") == 0


def test_a_bare_state_dict_loads_where_a_checkpoint_does(folder, expected, tmp_path):
    weights = torch.load(folder / "waveflow_4", weights_only=True)["model"]
    torch.save(weights, tmp_path / "bare.pt")
    shutil.copy(folder / "config.json", tmp_path)
    assert torch.equal(Vocoder.from_pretrained(tmp_path / "bare.pt", device="cpu")(MEL, seed=0), expected)
    ours = {ckpt.from_published(name): value for name, value in weights.items()}
    torch.save(ours, tmp_path / "ours.pt")
    start = f"train_config.checkpoint_path={tmp_path / 'ours.pt'}"
    config = folder.parents[1] / "config.json"
    output = f"train_config.output_directory={tmp_path / 'runs'}"
    assert run("-c", config, "--set", start, "--set", output, "--warm_start", "--max_iterations", 1) == 0
    assert main(["convert", str(tmp_path / "bare.pt"), str(tmp_path / "b.safetensors"), "-c", str(config)]) == 0
    assert torch.equal(Vocoder.from_pretrained(tmp_path / "b.safetensors", device="cpu")(MEL, seed=0), expected)


@pytest.fixture
def released(tmp_path):
    """A file of the released WaveFlow, and an experiment file that calls it waveflow, as theirs do."""
    golden = np.load(ROOT / "tests" / "golden" / "official_h16_bipartize.npz")
    weights = {
        name.removeprefix("sd/"): torch.from_numpy(golden[name]) for name in golden.files if name.startswith("sd/")
    }
    torch.save({"model": weights, "iteration": 5}, tmp_path / "waveflow_5")
    (tmp_path / "corpus").mkdir()
    kind = {**json.loads(str(golden["waveflow_config"])), "coupling_type": "waveflow", "bipartize": True}
    path = write_config(tmp_path / "theirs.json", write_corpus(tmp_path / "corpus"), tmp_path / "runs")
    sections = json.loads((tmp_path / "theirs.json").read_text())
    sections["waveflow_config"] = {"model_name": "theirs", **kind}
    (tmp_path / "theirs.json").write_text(json.dumps(sections))
    return tmp_path / "waveflow_5", path, golden


def test_the_released_waveflow_is_known_by_what_it_lacks(released, tmp_path, capsys):
    path, config, golden = released
    message = fails(capsys, "-c", config, "--evaluate", "--set", f"train_config.checkpoint_path={path}")
    assert "waveflow_5: weights of the WaveFlow that its authors released" in message
    assert message.endswith("set waveflow_config.coupling_type to waveflow_official")
    vocoder = Vocoder.from_pretrained(path, config=config, device="cpu")
    assert vocoder.model.config.coupling_type == "waveflow_official"
    z, _ = vocoder.model(torch.from_numpy(golden["audio"]), torch.from_numpy(golden["mel"]))
    torch.testing.assert_close(z, torch.from_numpy(golden["z"]), atol=1e-4, rtol=1e-4)
    assert main(["convert", str(path), str(tmp_path / "w.safetensors"), "-c", config]) == 0
    again = Vocoder.from_pretrained(tmp_path / "w.safetensors", device="cpu")
    assert torch.equal(again(MEL, seed=0), vocoder(MEL, seed=0))
    assert not ckpt.is_released(random_vocoder("waveflow").state_dict())
    assert not ckpt.is_released(random_vocoder("nanoflow").state_dict())


def test_their_name_of_the_bipartite_model_is_understood():
    config = WaveFlowConfig(res_channels=4, coupling_type="waveflow_bipartize")
    assert (config.coupling_type, config.bipartize) == ("waveflow_official", True)


@pytest.mark.parametrize(("height", "cycle"), [(8, 1), (16, 1), (32, 3), (64, 5)])
def test_the_released_heights_have_configs(height, cycle):
    config = load_config(ROOT / "configs" / f"waveflow-official-h{height}-r64.json").waveflow_config
    assert (config.n_height, config.n_layer_per_cycle, config.couples_first) == (height, cycle, True)
    with torch.device("meta"):
        build_model(config)


def test_weights_without_a_config_are_described_and_not_converted(tmp_path, capsys):
    golden = ROOT / "tests" / "golden" / "checkpoints_nanoflow" / "waveflow_60"
    assert main(["info", str(golden)]) == 0
    assert "none: give -c with every use" in capsys.readouterr().out
    assert main(["convert", str(golden), str(tmp_path / "x")]) == 1
    assert "give it with -c" in capsys.readouterr().err
    with pytest.raises(InputError, match="no such file"):
        ckpt.load_checkpoint(tmp_path / "x")
