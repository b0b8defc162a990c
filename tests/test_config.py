import json
import time
from pathlib import Path

import pytest

from config import (
    Config,
    DataConfig,
    DistConfig,
    TrainConfig,
    WaveFlowConfig,
    config_from_dict,
    load_config,
    reference_markdown,
)
from harness.errors import InputError
from harness.settings import parse_section

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.json"))


def sections(**changes):
    """A valid experiment with `section__key=value` changes."""
    values = {
        "train_config": {},
        "data_config": {"training_files": "train.txt", "test_files": "test.txt"},
        "waveflow_config": {"res_channels": 8, "coupling_type": "waveflow"},
    }
    for name, value in changes.items():
        section, key = name.split("__")
        values[section][key] = value
    return values


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path):
    config = load_config(path)
    assert config.waveflow_config.model_name == path.stem or path.stem == "demo"


PUBLISHED = ("waveflow-h16-r64", "waveflow-h16-r128", "nanoflow-h16-r128-emb512", "nanoflow-h16-r128-emb1024-f16",
             "nanoflow-naive-h16-r128", "nanoflow-decomp-h16-r128")  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_have_the_published_values(name):
    config = load_config(CONFIGS[0].with_name(f"{name}.json"))
    assert config.train_config == TrainConfig()  # the defaults are the published values
    assert config.train_config.to_dict() == TrainConfig().to_dict() | {
        "epochs": 100_000, "learning_rate": 1e-3, "lr_decay_step": 200_000, "lr_decay_gamma": 0.5, "sigma": 1.0,
        "iters_per_checkpoint": 5_000, "batch_size": 8, "seed": 1234, "output_directory": "experiments",
    }  # fmt: skip
    data, model = config.data_config, config.waveflow_config
    assert (data.segment_length, data.sampling_rate, data.filter_length, data.hop_length, data.win_length) == (
        16_000, 22_050, 1_024, 256, 1_024)  # fmt: skip
    assert (data.mel_fmin, data.mel_fmax) == (0.0, 8_000.0)
    assert (model.n_height, model.n_layer, model.n_layer_per_cycle, model.cin_channels) == (16, 8, 1, 80)
    assert model.n_flow == (16 if name.endswith("f16") else 8)
    assert model.res_channels == (64 if name.endswith("r64") else 128)
    assert model.size_flow_embed == (1_024 if "emb1024" in name else 512 if "emb512" in name else 0)
    assert not model.bipartize
    assert model.transform == "affine"


def test_overrides_take_json_and_text(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(sections()))
    config = load_config(path, ["train_config.batch_size=3", "train_config.checkpoint_path=runs/a=b/waveflow_1"])
    assert config.train_config.batch_size == 3
    assert config.train_config.checkpoint_path == "runs/a=b/waveflow_1"


def test_published_boolean_strings_are_accepted():
    model = parse_section(WaveFlowConfig, {"res_channels": 8, "coupling_type": "waveflow", "bipartize": "True"})
    assert model.bipartize is True


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train_config__batch_sise": 4}, ["train_config.batch_sise", "'batch_size'"]),
        ({"train_config__batch_size": "4"}, ["train_config.batch_size", "whole number", "'4'"]),
        ({"train_config__batch_size": True}, ["train_config.batch_size", "whole number"]),
        ({"train_config__batch_size": 0}, ["train_config.batch_size", "at least 1"]),
        ({"train_config__learning_rate": float("nan")}, ["train_config.learning_rate", "finite"]),
        ({"train_config__fp16_run": "yes"}, ["train_config.fp16_run", "true or false"]),
        ({"train_config__amp_backend": "amp"}, ["amp_backend", "torch, apex"]),
        ({"data_config__training_files": ""}, ["data_config.training_files", "missing"]),
        ({"data_config__segment_length": 16001}, ["segment_length", "16001", "n_height", "16000"]),
        ({"data_config__filter_length": 1025}, ["filter_length", "even"]),
        ({"data_config__mel_fmax": 20000.0}, ["mel_fmax", "11025"]),
        ({"waveflow_config__coupling_type": "glow"}, ["coupling_type", "nanoflow_naive"]),
        ({"waveflow_config__coupling_type": "nanoflow"}, ["size_flow_embed"]),
        ({"waveflow_config__upsample_strides": [16, 8]}, ["hop_length", "256", "128"]),
        ({"waveflow_config__cin_channels": 40}, ["cin_channels", "n_mel_channels"]),
        ({"waveflow_config__model_name": "../evil"}, ["model_name", "folder"]),
    ],
)
def test_bad_values_are_named(change, words):
    with pytest.raises(InputError) as error:
        config_from_dict(sections(**change))
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"train_config": 3}', "\x00"])
def test_files_that_are_no_config_give_one_line(tmp_path, text):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        load_config(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_and_missing_keys_are_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_config(tmp_path / "none.json")
    values = sections()
    del values["waveflow_config"]["res_channels"]
    with pytest.raises(InputError, match=r"waveflow_config\.res_channels: missing"):
        config_from_dict(values)


@pytest.mark.parametrize(
    "override", ["batch_size=4", "train_config.batch_size", "train_config.=4", "nothing.batch_size=4"]
)
def test_bad_overrides_are_refused(tmp_path, override):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(sections()))
    with pytest.raises(InputError):
        load_config(path, [override])


def test_a_config_survives_its_own_dict():
    config = config_from_dict(sections())
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert isinstance(config, Config)


def test_a_key_given_twice_is_refused(tmp_path):
    path = tmp_path / "config.json"
    text = json.dumps(sections())
    path.write_text(text.replace('"train_config": {}', '"train_config": {"seed": 1, "seed": 2}'))
    with pytest.raises(InputError, match=r"config .*'seed' is given twice"):
        load_config(path)
    path.write_text(text)
    with pytest.raises(InputError, match="'seed' is given twice"):
        load_config(path, ['train_config.x={"seed": 1, "seed": 2}'])


def test_the_reference_is_up_to_date():
    assert (ROOT / "docs" / "config.md").read_text() == reference_markdown()  # python config.py > docs/config.md


def test_every_key_is_described():
    for section in (TrainConfig, DataConfig, WaveFlowConfig, DistConfig):
        for name, field in section.model_fields.items():
            assert field.description, name


def test_a_changed_section_is_checked_again():
    assert DataConfig().replace(segment_length=512) == DataConfig(segment_length=512)
    with pytest.raises(InputError, match="filter_length 1023 is odd"):
        DataConfig().replace(filter_length=1023)
    with pytest.raises(InputError, match="segment_length: expected at least 1, got 0"):
        DataConfig(segment_length=0)
    with pytest.raises(ValueError, match="frozen"):
        DataConfig().segment_length = 512


@pytest.mark.parametrize(
    "values", [{f"key{i}": 1 for i in range(80_000)}, {"k" * 10**6: 1}, {"upsample_strides": ["a"] * 250_000},
               {"upsample_strides": [1] * 400_000}, {"model_name": "/" * 10**6}]
)  # fmt: skip
def test_a_config_of_a_megabyte_is_refused_in_a_moment_and_in_one_line(values):
    began = time.monotonic()
    with pytest.raises(InputError) as error:
        config_from_dict(sections() | {"waveflow_config": {"res_channels": 8, "coupling_type": "waveflow", **values}})
    assert time.monotonic() - began < 1
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key", ["train_config.output_directory", "train_config.checkpoint_path", "data_config.training_files",
            "data_config.test_files", "waveflow_config.model_name", "dist_config.dist_url"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["\\ud800", "a\\u0000b", "a\\udfffb"])
def test_names_that_no_file_can_have_are_refused_by_key(key, name):
    for value in (f'"{name}"', *([f'["a", "{name}"]'] if key.endswith("test_files") else [])):
        with pytest.raises(InputError, match=rf"{key.split('.')[1]}:? .*expected (text that|a plain folder name)"):
            load_config(ROOT / "configs" / "demo.json", [f"{key}={value}"])
