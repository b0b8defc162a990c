"""Lists beside the config, several test lists: what the command makes of them."""

import csv

from config import load_config
from data import read_test_files, read_test_lists
from tests.support.experiments import run, write_config


def test_lists_beside_the_config_are_found(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "project").mkdir()
    for name in ("train", "test"):
        (tmp_path / "project" / f"{name}.txt").write_text((corpus / f"{name}.txt").read_text())
    lists = {"data_config__training_files": "train.txt", "data_config__test_files": "test.txt"}
    data = load_config(write_config(tmp_path / "project" / "c.json", corpus, tmp_path, **lists)).data_config
    expected = tuple(str(tmp_path / "project" / name) for name in ("train.txt", "test.txt"))
    assert (data.training_files, data.test_files) == expected


def test_each_of_several_test_lists_has_its_own_likelihood(config, corpus, tmp_path, capsys):
    first, second = (corpus / "test.txt").read_text().splitlines()
    for folder, clip in (("near", first), ("far", second)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test.txt").write_text(clip)
    lists = [str(tmp_path / folder / "test.txt") for folder in ("near", "far")]
    path = config(data_config__test_files=lists)
    data = load_config(path).data_config
    assert read_test_lists(data) == {"near_test": [first], "far_test": [second]}
    assert read_test_files(data) == [first, second]
    assert run("-c", path, "--max_iterations", 2) == 0
    said = capsys.readouterr().out
    assert said.count("each test clip of near_test: log-likelihood") == 2
    assert run("-c", path, "--evaluate") == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "log-likelihood" in line]
    with open(next((tmp_path / "runs").rglob("evaluation/*.csv")), newline="") as file:
        each = {row["clip"]: float(row["log_likelihood"]) for row in csv.DictReader(file)}
    for line, name, clip in zip(said, ("near_test", "far_test"), (first, second), strict=True):
        assert line.startswith(f"waveflow_2, {name}: log-likelihood {each[clip]:.4f} ")
    assert run("-c", path, "--synthesize") == 0
    assert len(list((tmp_path / "runs").rglob("synthesis/*/*.wav"))) == 2
