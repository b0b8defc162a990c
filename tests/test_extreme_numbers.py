"""Numbers at the edge, of every flag and key that there is: refused in one line, or borne; memory asked for first."""

import argparse
import json
import math
import random
import resource

import pytest
import torch

import benchmark.__main__ as benchmark
import train
from config import DataConfig, DistConfig, TrainConfig, WaveFlowConfig, load_config
from harness import memory
from harness.errors import InputError
from image_density_experiments.model import ImageModelConfig
from image_density_experiments.options import DataOptions, TrainOptions
from tests.support.experiments import ROOT, run
from tests.support.image_command import MODEL, command, pictures
from tests.support.parsers import PARSERS
from tests.support.vocoders import small_config
from training import memory as vocoder_memory

CPU = torch.device("cpu")
TEXTS = [
    "1e300", "-1e300",
    str(2**64), str(-(2**64)), str(10**300), "nan", "-nan", "inf", "-inf", "", " ", "x" * 5000,
    "9" * 5000, "1e5000", "\x00", "\ud800", "\n", "\x1b[2J", "1\n2", "0x10", "1,5", "--", "٣" * 30, "1" + "_0" * 40,
]  # fmt: skip


def flags_with_numbers(parse):
    """(words before it, flag, action) of every flag of a parser whose values are numbers, in subcommands too."""
    seen = []

    def remember(parser, words=None, namespace=None):
        seen.append(parser)
        raise StopIteration

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", remember)
        with pytest.raises(StopIteration):
            parse([])
    found, waiting = [], [((), seen[0])]
    while waiting:
        words, parser = waiting.pop()
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                waiting += [((*words, name), inside) for name, inside in action.choices.items()]
            elif action.type in (int, float) or getattr(action.type, "__name__", "").endswith("number"):
                found.append((words, action))
    return found


FLAGS = [
    pytest.param(parse, words, action, id=f"{name} {' '.join((*words, *action.option_strings[:1]))}")
    for name, parse in PARSERS.items()
    for words, action in flags_with_numbers(parse)
]


def test_there_are_flags():
    assert len(FLAGS) > 45


@pytest.mark.parametrize(("parse", "words", "action"), FLAGS)
def test_every_number_flag_has_a_range_at_both_ends(parse, words, action, capsys):
    """And says so in one printable line of bounded length."""
    for text in TEXTS:
        with pytest.raises(SystemExit) as raised:
            parse([*words, f"{action.option_strings[0]}={text}"])
        [line] = capsys.readouterr().err.splitlines()
        assert raised.value.code == 2 and ": error: " in line and len(line) < 700 and line.isprintable(), text


@pytest.mark.parametrize("device", TEXTS)
@pytest.mark.parametrize("parse", [benchmark.parse_arguments, train.parse_arguments])
def test_odd_devices_are_refused(parse, device, config, capsys):
    if parse is train.parse_arguments and device != "--":
        assert run("-c", config(), f"--device={device}") == 1
    else:
        with pytest.raises(SystemExit):
            parse([f"--device={device}"])
    assert "device" in capsys.readouterr().err.splitlines()[-1]


# --- keys


SECTIONS = {
    TrainConfig: {}, DataConfig: {}, DistConfig: {}, WaveFlowConfig: small_config(), ImageModelConfig: {},
    TrainOptions: {}, DataOptions: {},
}  # fmt: skip
VALUES = [
    1e300,
    -1e300,
    2**64,
    -(2**64),
    10**400,
    math.nan,
    math.inf,
    -math.inf,
    "",
    "x" * 5000,
    "\0",
    "\ud800",
    [],
    {},
]
VALUES += [[2] * 20_000, [2**64] * 3, True, "9" * 5000]


def is_number(field):
    return any(kind in str(field.annotation) for kind in ("int", "float")) and "Literal" not in str(field.annotation)


KEYS = [
    pytest.param(section, values, name, id=f"{section.__name__}.{name}")
    for section, values in SECTIONS.items()
    for name, field in section.model_fields.items()
    if is_number(field)
]


@pytest.mark.parametrize(("section", "values", "name"), KEYS)
def test_every_number_key_has_a_range_at_both_ends(section, values, name):
    for value in VALUES:
        with pytest.raises(InputError) as raised:
            section(**{**values, name: value})
        assert str(raised.value).isprintable() and len(str(raised.value)) < 700
    if not isinstance(values.get(name, section.model_fields[name].default), (tuple, list)):
        low, high = limits(section.model_fields[name])
        assert low is not None and high is not None and high < 1e13


def limits(field):
    """The lowest and the highest value that a field takes, or that is just above the lowest."""
    low = high = None
    for one in field.metadata:
        low = getattr(one, "ge", low)
        low = low if getattr(one, "gt", None) is None else one.gt + 1e-300
        high = getattr(one, "le", high)
    return low, high


@pytest.mark.parametrize("text", ["x" * 5000, "\0", "\ud800", "\n", "a/b", "..", ""])
@pytest.mark.parametrize(
    ("section", "name"),
    [(WaveFlowConfig, "model_name"), (WaveFlowConfig, "coupling_type"), (ImageModelConfig, "model_type")],
)
def test_odd_names_are_refused(section, name, text):
    text += "/" * (name == "model_name" and text.isalpha())
    with pytest.raises(InputError) as raised:
        section(**{**SECTIONS[section], name: text})
    assert str(raised.value).isprintable() and len(str(raised.value)) < 700


# --- the commands at the ends of the ranges


def edges(section, left_out):
    found = [
        (name, value)
        for name, field in section.model_fields.items()
        if is_number(field) and name not in left_out
        for value in limits(field)
        if value is not None
    ]
    random.Random(1).shuffle(found)
    return found


def some_and_all(cases, n):
    """The first n by default, all of them with `make soak`."""
    return [pytest.param(*case, marks=[pytest.mark.soak] if i >= n else [], id=f"{case[-2]}={case[-1]:g}")
            for i, case in enumerate(cases)]  # fmt: skip


# Starting 256 processes is the system's business.
VOCODER = [("train_config", *edge) for edge in edges(TrainConfig, ["num_workers"])]
VOCODER += [("data_config", *edge) for edge in edges(DataConfig, [])]
VOCODER += [("waveflow_config", *edge) for edge in edges(WaveFlowConfig, ["upsample_strides"])]
random.Random(2).shuffle(VOCODER)


def borne_or_refused(status, err):
    lines = [line for line in err.splitlines() if line and not line.startswith("warning: ")]
    assert "Traceback" not in err
    assert status == 0 or (status == 1 and len(lines) == 1 and lines[0].startswith("error: ")), err[-2000:]


@pytest.mark.parametrize(("section", "name", "value"), some_and_all(VOCODER, 6))
def test_training_a_vocoder_at_the_ends_of_the_ranges(section, name, value, config, monkeypatch, capfd):
    monkeypatch.setattr(memory, "available_bytes", lambda device=None: 2e9)
    path = config(**{f"{section}__{name}": value}, train_config__with_tensorboard=False)
    before = peak_megabytes()
    capfd.readouterr()
    borne_or_refused(run("-c", path, "--max_iterations", 2), capfd.readouterr().err)
    assert peak_megabytes() - before < 3000


IMAGES = [(name, value) for name, value in edges(TrainOptions, ["n_workers"])]
IMAGES += [(name, value) for name, value in edges(ImageModelConfig, ["image_shape", "y_classes"])]
IMAGES.append(("image_size", 2))
random.Random(3).shuffle(IMAGES)


@pytest.mark.parametrize(("name", "value"), some_and_all(IMAGES, 6))
def test_training_an_image_model_at_the_ends_of_the_ranges(name, value, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(memory, "available_bytes", lambda device=None: 2e9)
    if name in ("weight_decay", "sample_every"):
        flags = [f"--{name}={value}"] if name == "sample_every" else []
    else:
        flags = [f"--{name}={value}"] if name != "amp" else []
    images = pictures(tmp_path / "images", 10)
    before = peak_megabytes()
    capfd.readouterr()
    data_flags = ["--dataset", "folder", "--dataroot", images, "--output_dir", tmp_path / "run", "--max_iterations", 2]
    size = [] if name == "batch_size" else ["--batch_size", 2]
    borne_or_refused(command(*MODEL, *data_flags, *size, *flags), capfd.readouterr().err)
    assert peak_megabytes() - before < 3000


def peak_megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --- memory


LARGE = [
    {"batch_size": 4, "hidden_channels": 4096}, {"hidden_channels": 16_384, "K": 512}, {"K": 1024, "L": 2},
    {"image_size": 4096, "batch_size": 64, "n_init_batches": 1, "hidden_channels": 64}, {"n_init_batches": 60_000},
    {"hidden_channels": 16_384, "model_type": "glow_large", "K": 32}, {"flow_embed_dim": 16_384, "image_size": 1024},
]  # fmt: skip


@pytest.mark.parametrize("sizes", LARGE, ids=str)
def test_image_models_beyond_the_memory_are_refused_before_it_is_taken(sizes, tmp_path, monkeypatch, capfd):
    images = pictures(tmp_path / "images", 4)
    sizes = {"image_size": 64, "K": 32, "hidden_channels": 256, "model_type": "glow", "L": 2, "batch_size": 2, **sizes}
    data_flags = ["--dataset", "folder", "--dataroot", images, "--output_dir", tmp_path / "run"]
    monkeypatch.setattr(memory, "available_bytes", lambda device=None: 2e9)
    before = peak_megabytes()
    assert command(*data_flags, *(f"--{name}={value}" for name, value in sizes.items())) == 1
    [line] = capfd.readouterr().err.splitlines()
    assert "GB of memory, 2 GB are free; lower " in line
    assert peak_megabytes() - before < 500


VOCODERS = [
    {"res_channels": 2048, "n_flow": 4}, {"res_channels": 1024, "n_flow": 8, "n_layer": 8},
    {"res_channels": 512, "segment_length": 2**22}, {"res_channels": 64, "n_flow": 128, "segment_length": 2**20},
]  # fmt: skip


@pytest.mark.parametrize("sizes", VOCODERS, ids=str)
def test_vocoders_beyond_the_memory_are_refused_before_it_is_taken(sizes, config, monkeypatch, capfd):
    keys = {f"{'data' if name == 'segment_length' else 'waveflow'}_config__{name}": n for name, n in sizes.items()}
    monkeypatch.setattr(memory, "available_bytes", lambda device=None: 2e9)
    before = peak_megabytes()
    assert run("-c", config(**keys)) == 1
    [line] = capfd.readouterr().err.splitlines()
    assert "res_channels" in line and "GB of memory, 2 GB are free; lower " in line
    assert peak_megabytes() - before < 500


def needed(monkeypatch, module, check):
    asked = []
    monkeypatch.setattr(module, "require_memory", lambda n, *_: asked.append(n))
    check()
    return max(asked)


def test_estimates_are_not_too_high(config, monkeypatch):
    """The published batch of the published models was measured: docs/performance.md."""
    for name, batch, kept, recomputed in (("waveflow-h16-r64", 8, 7.5, 1.7), ("nanoflow-h16-r128-emb512", 8, 14.1, 2.7),
                                          ("nanoflow-h16-r128-emb1024-f16", 4, 13.7, 1.5)):  # fmt: skip
        for checkpointed, measured in ((False, kept), (True, recomputed)):
            flags = [
                f"train_config.batch_size={batch}",
                f"train_config.checkpoint_activations={json.dumps(checkpointed)}",
            ]
            full = load_config(ROOT / "configs" / f"{name}.json", flags)
            n = needed(monkeypatch, vocoder_memory, lambda full=full: vocoder_memory.check_memory(full, CPU))
            assert 0.3 * measured < n / 1e9 < measured
    assert memory.gigabytes(1.5e9) == "1.5 GB"
