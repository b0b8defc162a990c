"""The subproject's README states commands that parse, and parameter counts that are so."""

import re
from pathlib import Path

import pytest
import torch

from image_density_experiments.model import ImageModelConfig, build_model, count_parameters
from image_density_experiments.options import TrainOptions, parse_arguments, read_options

README = (Path(__file__).parents[2] / "image_density_experiments" / "README.md").read_text(encoding="utf-8")
HEADER = re.search(r"^\| row \|.*?train\.py (--.*?)` and \|$", README, re.MULTILINE)[1].split()
ROWS = re.findall(r"^\| (.+?) \| ([\d,]+)(?: \(ours\))? \| `(--model_type .+?)` \|$", README, re.MULTILINE)
COMMANDS = re.findall(r"^python image_density_experiments/train\.py ([^#\n]*)", README, re.MULTILINE)


def test_the_table_has_all_rows():
    assert len(ROWS) == 10 and len(COMMANDS) == 3


@pytest.mark.parametrize(("name", "count", "flags"), ROWS)
def test_the_command_of_a_row_builds_a_model_of_its_size(name, count, flags):
    options = vars(parse_arguments([*HEADER, *flags.split()]))
    assert (options["dataset"], options["epochs"], options["seed"]) == ("cifar10", 3000, 1234)
    given = {name: options[name] for name in ImageModelConfig.model_fields if options.get(name) is not None}
    with torch.device("meta"):
        assert count_parameters(build_model(**given)) == int(count.replace(",", ""))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_commands_parse(command):
    assert TrainOptions(**read_options(command.split()).train).epochs == 3000


def test_the_demo_compares_models_of_one_size():
    """The flags of `make demo-images`, and the table that says what they gave."""
    makefile = (Path(__file__).parents[2] / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    common = re.search(r"^IMAGE_DEMO := (.*)$", makefile, re.MULTILINE)[1].split()
    runs = re.findall(r"\$\(IMAGE_TRAIN\) (--model_type .*?) \$\(IMAGE_DEMO\) (.*?) --output_dir", makefile)
    counts = []
    for flags, more in runs:
        options = read_options([*flags.split(), *common, *more.split()])
        with torch.device("meta"):
            model = build_model(image_shape=(8, 8, 1), y_classes=10, **options.model)
        counts.append(count_parameters(model))
        row = f"| `{options.model['model_type']}`, hidden {options.model['hidden_channels']}, K 8, L 2 "
        assert f"{row}| {counts[-1]:,} | {options.train['epochs']} |" in README
    assert len(counts) == 2 and max(counts) < 1.01 * min(counts)
