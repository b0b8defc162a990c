"""What the README and the pages of docs/ state about files, imports, models, commands, flags and keys is so."""

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import benchmark.__main__ as benchmark
import data
import experiments.__main__ as experiments
import image_density_experiments.options as image_options
import jobs.files
import train
from config import DataConfig, DistConfig, TrainConfig, WaveFlowConfig, load_config
from model import build_model, count_parameters
from tests.test_house import COMMAND_LINES, FILES, PACKAGES, area, imported, name_of

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
README, ALL = TEXTS[PAGES[0]], "\n".join(TEXTS.values())
ROWS = re.findall(r"^\| ((?:wave|nano)flow-\S+) \| ([\d,]+) \| ([\d,]+) \| ([\d.]*) ?\|", README, flags=re.MULTILINE)
AREAS = {area(name_of(path)) for path in FILES}
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def named(text: str) -> Iterator[tuple[str, str]]:
    """(folder, name) of whatever stands in backticks; in a table, rows below that of a folder are about it."""
    folder = ""
    for line in text.splitlines():
        if row := re.match(r"\| (?:`(\w+/)`)?", line):
            folder = row[1] or (folder if line.startswith("| |") else "")
        else:
            folder = ""
        for name in re.findall(r"`([^`]+)`", line):
            yield folder, name


def commands() -> list[list[str]]:
    """Words of each indented line of the pages, lines that go on with a backslash joined."""
    code = re.sub(r"\\\n\s*", "", ALL)
    return [shlex.split(line, comments=True) for line in re.findall(r"^    ([a-z].*)$", code, flags=re.MULTILINE)]


# --- the map ----------------------------------------------------------------------------------------------


@by_page
def test_every_file_named_exists(page):
    for folder, name in named(TEXTS[page]):
        if re.fullmatch(r"[\w/]+\.py", name):
            assert any((ROOT / place / name).is_file() for place in ("", folder)), name
    for name in re.findall(r"configs/([\w-]+\.json)", TEXTS[page]):
        assert (ROOT / "configs" / name).is_file(), name


def test_every_folder_of_the_readme_exists():
    folders = {name for _, name in named(README) if re.fullmatch(r"[\w/]+/", name)}
    assert {"fast/", "training/", "harness/", "corpora/", "tests/golden/"} <= folders
    assert [name for name in folders if not (ROOT / name).is_dir()] == []


@by_page
def test_every_python_name_exists(page):
    for _, name in named(TEXTS[page]):
        if re.fullmatch(r"[a-z]\w*(\.\w+)+", name) and area(name) in AREAS and not name.endswith((".py", ".json")):
            assert resolve(name) is not None


def resolve(name: str) -> object:
    """What a dotted name of a room, or of something in it, stands for."""
    parts = name.split(".")
    room = next(n for n in range(len(parts), 0, -1) if (ROOT / "/".join(parts[:n])).with_suffix(".py").is_file())
    found = importlib.import_module(".".join(parts[:room]))
    for part in parts[room:]:
        found = getattr(found, part)
    return found


@by_page
def test_every_link_leads_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXTS[page]) if not link.startswith("https://")]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_page_is_linked():
    assert [page.name for page in PAGES[1:] if page.name != "README.md" and f"(docs/{page.name})" not in README] == []


def test_the_map_has_every_room_of_the_root():
    rooms = re.findall(r"^\| `(\w+)(?:\.py|/)` \|", README, flags=re.MULTILINE)
    assert len(rooms) == len(set(rooms))
    assert set(rooms) == AREAS


def test_the_map_has_every_file():
    """Those of the image models are in the README of their own."""
    written = {f"{folder}{name}" for folder, name in named(README)}
    files = [path.relative_to(ROOT).as_posix() for path in FILES if path.name != "__main__.py"]
    assert [name for name in files if name not in written and not name.startswith("image_density_experiments/")] == []


def test_imports_go_down_the_line_of_the_readme():
    [line] = re.findall(r"^    train, benchmark, experiments (?:->.*\n +)+->.*$", README, flags=re.MULTILINE)
    floors = [re.findall(r"\w+", floor) for floor in line.split("->")]
    level = {room: number for number, rooms in enumerate(floors) for room in rooms}
    assert set(level) == AREAS - {"image_density_experiments"} and len(level) == sum(map(len, floors))
    for path in FILES:
        room = area(name_of(path))
        if room == "image_density_experiments":
            continue
        below = {area(name) for name in imported(path, lazily=room not in COMMAND_LINES)} - {room}
        assert [name for name in below if level[name] <= level[room]] == [], name_of(path)


def test_packages_are_those_of_the_house():
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} <= set(PACKAGES)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 230


# --- models and Python ------------------------------------------------------------------------------------


def test_the_model_table_is_there():
    assert len(ROWS) == 6


@pytest.mark.parametrize(("name", "training", "synthesis", "millions"), ROWS, ids=[row[0] for row in ROWS])
def test_parameter_counts_in_the_table_are_those_of_the_models(name, training, synthesis, millions):
    with torch.device("meta"):
        model = build_model(load_config(ROOT / "configs" / f"{name}.json").waveflow_config)
    assert f"{count_parameters(model):,}" == training
    assert f"{count_parameters(model, synthesis=True):,}" == synthesis
    assert not millions or f"{count_parameters(model, synthesis=True) / 1e6:.3f}" == millions


def test_the_python_examples_run(monkeypatch, tmp_path):
    of_users, of_the_model = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(ROOT)
    small = of_the_model.replace("model = build_model(config)", "model = build_model({**config, 'res_channels': 4})")
    assert small != of_the_model
    names = {}
    exec(small, names)  # the examples are this project's own
    assert names["z"].shape == (2, 1, 16, 16128 // 16)
    assert names["audio"].shape == (2, 256 * 63)
    assert names["loss"].isfinite()

    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(of_users, names)
    assert names["mel"].shape == (80, len(names["recording"]) // 256 + 1)
    assert names["speech"].shape == (256 * (names["mel"].shape[1] - 1),)
    assert (tmp_path / "spoken.wav").stat().st_size > 2 * len(names["speech"])


# --- commands, flags, keys --------------------------------------------------------------------------------


def test_every_command_is_understood():
    programs = (
        "train.py",
        "data.py",
        "checkpoint.py",
        "benchmark",
        "experiments",
        "image_density_experiments/train.py",
    )
    counts = dict.fromkeys(programs, 0)
    parsers = (
        train.parse_arguments,
        data._parser().parse_args,
        jobs.files.parser().parse_args,
        benchmark.parse_arguments,
        experiments.parse_arguments,
        image_options.parse_arguments,
    )
    for words in commands():
        for program, parse in zip(counts, parsers, strict=True):
            if words[0] in ("python", "torchrun") and program in words:
                parse(words[words.index(program) + 1 :])
                counts[program] += 1
    assert counts["train.py"] >= 12 and min(counts.values()) >= 1
    assert counts["data.py"] >= 3 and counts["benchmark"] >= 5


def test_every_python_command_is_one_of_ours():
    names = {
        " ".join(words[1:3] if words[1] == "-m" else words[1:2]) for words in commands() if words[0] == "python"
    } - {"-c"}
    assert names <= {"train.py", "data.py", "checkpoint.py", "-m benchmark", "-m experiments"}


def test_every_make_target_exists():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    wanted = {words[1] for words in commands() if words[0] == "make"}
    assert {"demo", "test"} <= wanted <= set(targets)


def test_kernels_are_tested_with_the_triton_of_the_pinned_torch():
    pinned = re.search(r"^torch==(\d+\.\d+)", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE)[1]
    tested = re.search(r"^TRITON \?= (\S+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1]
    assert f"torch {pinned} goes with Triton {tested}" in ALL


def test_every_config_key_is_described():
    for section in (TrainConfig, DataConfig, WaveFlowConfig, DistConfig):
        keys = [key for key in section.__annotations__ if not key.startswith("_")]
        assert [key for key in keys if f"`{key}`" not in ALL] == []


def test_every_flag_is_described(capsys):
    with pytest.raises(SystemExit):
        train.parse_arguments(["--help"])
    flags = set(re.findall(r"--[a-z_]+", capsys.readouterr().out)) - {"--help"}
    assert len(flags) >= 10
    assert [flag for flag in flags if f"`{flag}" not in ALL] == []
