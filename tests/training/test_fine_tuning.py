"""Fine-tuning: from the weights of another rate, mel or upsampling; of some parts only."""

import json

import pytest
import torch

from audio import write_wav
from checkpoint import load_checkpoint
from config import load_config
from tests.support.experiments import ROOT, fails, run
from tests.support.vocoders import small_config
from vocoder import Vocoder


@pytest.fixture
def other(tmp_path):
    """A function that writes an experiment on clips of another rate, with changes."""
    (tmp_path / "other").mkdir()
    for number in range(3):
        write_wav(tmp_path / "other" / f"{number}.wav", 0.1 * torch.randn(9_000), 16_000)
    (tmp_path / "other" / "list.txt").write_text("0.wav\n1.wav\n2.wav\n")

    def make(model=(), **data):
        lists = dict.fromkeys(("training_files", "test_files"), str(tmp_path / "other" / "list.txt"))
        sections = {
            "train_config": {"output_directory": str(tmp_path / "tuned"), "batch_size": 2, "num_workers": 0},
            "data_config": {**lists, "segment_length": 2_000, "sampling_rate": 16_000, **data},
            "waveflow_config": small_config(model_name="tiny", **dict(model)),
        }
        (tmp_path / "other.json").write_text(json.dumps(sections))
        return tmp_path / "other.json"

    return make


def start(path):
    return ["--set", f"train_config.checkpoint_path={path}"]


def test_weights_of_another_rate_are_a_beginning_with_a_warning(trained, other, tmp_path, capsys):
    path, before = other(mel_fmax=None), trained[1] / "waveflow_8"
    assert "sampling_rate 22050, the config says 16000; make them equal" in fails(capsys, "-c", path, *start(before))
    assert run("-c", path, "-w", "--max_iterations", 1, *start(before), "--set", "train_config.learning_rate=1e-9") == 0
    said = capsys.readouterr()
    assert said.err.count("its weights are only a beginning") == 1  # half of 16,000 Hz is the 8,000 of before
    assert "iterations 0 to 1" in said.out
    old, new = (load_checkpoint(name)["model"] for name in (before, tmp_path / "tuned" / "tiny" / "waveflow_1"))
    for name, value in old.items():
        torch.testing.assert_close(new[name], value, atol=1e-6, rtol=0)


def test_where_the_mel_has_another_shape_what_takes_it_in_begins_anew(trained, other, tmp_path, capsys):
    path = other({"cin_channels": 40, "upsample_strides": [20, 10]}, hop_length=200, n_mel_channels=40)
    before = trained[1] / "waveflow_8"
    assert run("-c", path, "-w", "--max_iterations", 1, *start(before), "--set", "train_config.learning_rate=1e-9") == 0
    assert "layers that take in the mel have other shapes and begin anew" in capsys.readouterr().err
    old, new = (load_checkpoint(name)["model"] for name in (before, tmp_path / "tuned" / "tiny" / "waveflow_1"))
    for name, value in old.items():
        if "upsampler" not in name and "cond_conv" not in name:
            torch.testing.assert_close(new[name], value, atol=1e-6, rtol=0)
    capsys.readouterr()
    path = other({"n_height": 4})
    assert "n_height 8, the config says 4; make them equal" in fails(capsys, "-c", path, "-w", *start(before))
    path = other({"res_channels": 7})
    assert "res_channels 6, the config says 7" in fails(capsys, "-c", path, "-w", *start(before))


def test_only_gates_embedding_and_projections_change_if_asked(trained, tmp_path):
    path, run_folder = trained
    parts = ["--set", "train_config.trained_parts=gates-embedding-projections"]
    assert run("-c", path, "--resume", "latest", "--max_iterations", 12, *parts) == 0
    assert run("-c", path, "--resume", "latest", "--max_iterations", 14, *parts) == 0
    old, new = (load_checkpoint(run_folder / f"waveflow_{n}")["model"] for n in (8, 14))
    changed = {name.partition(".")[0] for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"gates", "flow_embedding", "transforms"}
    fresh = ["--set", f"train_config.output_directory={tmp_path / 'more'}", "-w", *start(run_folder / "waveflow_8")]
    assert run("-c", path, "--max_iterations", 2, *parts, *fresh) == 0
    assert run("-c", path, "--max_iterations", 4, "--resume", "latest", *fresh[:2]) == 0  # now all parts, from these


def test_nothing_left_to_train_is_said_with_the_way_out(trained, capsys):
    assert run("-c", trained[0], "--resume", "latest", "--max_iterations", 8) == 0
    said = capsys.readouterr().out
    assert "already at iteration 8; there is nothing to train" in said and "--warm_start counts anew" in said


def test_weights_to_begin_with_may_be_named(config, trained, tmp_path, capsys):
    """By a run's folder here; those that come with the project by their name."""
    _, folder = trained
    path = config(train_config__output_directory=str(tmp_path / "tuned"))
    assert run("-c", path, "--weights", folder, "--warm_start", "--max_iterations", 1) == 0
    kept = json.loads((tmp_path / "tuned" / "tiny" / "config.json").read_text())["train_config"]
    assert kept["checkpoint_path"] == str(folder / "waveflow_8")
    assert "iterations 0 to 1" in capsys.readouterr().out
    line = fails(capsys, "-c", path, "--weights", "nanoflow", "--warm_start", "--max_iterations", 1)
    assert "nanoflow-lp128-r64.safetensors" in line


@pytest.mark.parametrize("flags", [["--weights", "nanoflow", "-w"], ["-c", "x.json", "--weights", "nanoflow"]])
def test_training_from_named_weights_is_a_warm_start_with_a_config(capsys, flags):
    with pytest.raises(SystemExit):
        run(*flags)
    assert "with -c and --warm_start what to train from" in capsys.readouterr().err


def test_the_experiment_file_of_the_weights_that_come_with_the_project_fits_them():
    own, file = Vocoder.from_pretrained("nanoflow"), load_config(ROOT / "configs" / "nanoflow-lp128-r64.json")
    assert own.model.config == file.waveflow_config
    assert mel_of(own.data) == mel_of(file.data_config)


def mel_of(data):
    """What the mels depend on."""
    lists = ("training_files", "test_files")
    return {key: value for key, value in data.model_dump().items() if key not in lists}
