"""What the README states about models, flags and keys is so."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

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


def test_every_config_key_is_described():
    for section in (TrainConfig, DataConfig, WaveFlowConfig, DistConfig):
        for key in fields(section):
            assert f"`{key.name}`" in README, key.name


def test_every_flag_is_described(capsys):
    with pytest.raises(SystemExit):
        train.parse_arguments(["--help"])
    flags = set(re.findall(r"--[a-z_]+", capsys.readouterr().out)) - {"--help"}
    assert len(flags) >= 10
    assert [flag for flag in flags if f"`{flag}" not in README] == []
