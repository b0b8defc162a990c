"""What the README states about models, flags and keys is so."""

import re
import shlex
from pathlib import Path

import pytest
import torch

import data
import train
from config import DataConfig, DistConfig, TrainConfig, WaveFlowConfig, load_config
from model import build_model, count_parameters

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ROWS = re.findall(r"^\| ((?:wave|nano)flow-\S+) \| ([\d,]+) \| ([\d,]+) \| ([\d.]*) ?\|", README, flags=re.MULTILINE)


def test_the_model_table_is_there():
    assert len(ROWS) == 6


@pytest.mark.parametrize(("name", "training", "synthesis", "millions"), ROWS, ids=[row[0] for row in ROWS])
def test_parameter_counts_in_the_table_are_those_of_the_models(name, training, synthesis, millions):
    with torch.device("meta"):
        model = build_model(load_config(ROOT / "configs" / f"{name}.json").waveflow_config)
    assert f"{count_parameters(model):,}" == training
    assert f"{count_parameters(model, synthesis=True):,}" == synthesis
    assert not millions or f"{count_parameters(model, synthesis=True) / 1e6:.3f}" == millions


def test_every_config_and_its_commands_exist():
    for name in re.findall(r"configs/([\w-]+)\.json", README):
        assert (ROOT / "configs" / f"{name}.json").is_file()
    for name in re.findall(r"`([a-z_]+\.py)`", README):
        assert (ROOT / name).is_file()


def test_the_python_example_runs(monkeypatch):
    [code] = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(ROOT)
    small = code.replace("model = build_model(config)", "model = build_model({**config, 'res_channels': 4})")
    assert small != code
    names = {}
    exec(small, names)  # the example is this project's own
    assert names["z"].shape == (2, 1, 16, 16128 // 16)
    assert names["audio"].shape == (2, 256 * 63)
    assert names["loss"].isfinite()


def test_every_command_is_understood():
    code = re.sub(r"\\\n\s*", "", README)
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^    python (.*)$", code, flags=re.MULTILINE)]
    jobs = [words[1:] for words in commands if words[0] == "train.py"]
    assert len(jobs) >= 6
    for words in jobs:
        train.parse_arguments(words)
    for words in (words[1:] for words in commands if words[0] == "data.py"):
        data._parser().parse_args(words)


def test_every_make_target_exists():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    named = re.findall(r"^    make ([a-z-]+)", README, flags=re.MULTILINE)
    assert {"demo", "test"} <= set(named) <= set(targets)


def test_every_config_key_is_described():
    for section in (TrainConfig, DataConfig, WaveFlowConfig, DistConfig):
        for key in section.model_fields:
            assert f"`{key}`" in README, key


def test_every_flag_is_described(capsys):
    with pytest.raises(SystemExit):
        train.parse_arguments(["--help"])
    flags = set(re.findall(r"--[a-z_]+", capsys.readouterr().out)) - {"--help"}
    assert len(flags) >= 10
    assert [flag for flag in flags if f"`{flag}" not in README] == []
