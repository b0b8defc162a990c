import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

import checkpoint as ckpt
from harness.errors import InputError
from tests.support.experiments import run
from tests.support.vocoders import random_input, random_vocoder
from training.resuming import load_optimizer

GOLDEN = Path(__file__).parent / "golden" / "checkpoints_nanoflow"
VARIANTS = [(c, t) for c in ("waveflow", "nanoflow_naive", "nanoflow_decomp", "nanoflow") for t in ("affine", "spline")]


@pytest.mark.parametrize(("coupling_type", "transform"), VARIANTS)
def test_key_names_go_to_the_published_layout_and_back(coupling_type, transform):
    model = random_vocoder(coupling_type, transform=transform)
    names = list(model.state_dict())
    published = [ckpt.to_published(name, coupling_type, transform) for name in names]
    assert len(set(published)) == len(names)
    assert [ckpt.from_published(name) for name in published] == names
    assert [ckpt.from_published("module." + name) for name in published] == names
    assert [ckpt.from_published(name) for name in names] == names


def test_saved_files_have_the_keys_of_the_published_ones(tmp_path):
    published = torch.load(GOLDEN / "waveflow_60", weights_only=True)
    model = random_vocoder(res_channels=8, n_height=16, n_flow=4, size_flow_embed=16)
    ckpt.load_weights(model, published["model"])
    ckpt.save_checkpoint(tmp_path / "waveflow_60", model, iteration=60)
    saved = torch.load(tmp_path / "waveflow_60", weights_only=True)
    assert saved["model"].keys() == published["model"].keys()
    assert all(torch.equal(saved["model"][name], value) for name, value in published["model"].items())


def test_a_saved_vocoder_comes_back_the_same(tmp_path):
    model, other = random_vocoder(seed=0), random_vocoder(seed=1)
    ckpt.save_checkpoint(tmp_path / "waveflow_7", model, iteration=7)
    checkpoint = ckpt.load_checkpoint(tmp_path / "waveflow_7")
    assert checkpoint["iteration"] == 7
    other.load_state_dict(checkpoint["model"], strict=True)
    assert all(torch.equal(a, b) for a, b in zip(model(*random_input(model)), other(*random_input(model)), strict=True))


@pytest.mark.parametrize("folder", ["", "dataparallel"])
def test_published_optimizer_state_reaches_the_parameters_it_belongs_to(folder):
    checkpoint = ckpt.read_checkpoint(GOLDEN / folder / "waveflow_60")
    raw = torch.load(GOLDEN / "waveflow_60", weights_only=True)
    model = random_vocoder(res_channels=8, n_height=16, n_flow=4, size_flow_embed=16)
    optimizer = torch.optim.Adam(model.parameters())
    load_optimizer(optimizer, model, checkpoint)
    for index, name in enumerate(raw["model"]):
        parameter = model.get_parameter(ckpt.from_published(name))
        assert torch.equal(optimizer.state[parameter]["exp_avg"], raw["optimizer"]["state"][index]["exp_avg"])


def test_optimizer_state_of_another_model_is_refused():
    checkpoint = ckpt.read_checkpoint(GOLDEN / "waveflow_60")
    model = random_vocoder("waveflow")
    with pytest.raises(InputError, match="optimizer state does not fit"):
        load_optimizer(torch.optim.Adam(model.parameters()), model, checkpoint)


def test_weights_of_another_model_name_the_differences_and_change_nothing():
    model = random_vocoder()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrong = dict(before)
    wrong["gates.0"] = torch.zeros(2, 2)
    del wrong["gates.1"]
    wrong["gates.9"] = wrong["estimators.0.what"] = torch.zeros(1)
    with pytest.raises(InputError) as error:
        ckpt.load_weights(model, wrong)
    for words in (
        "missing: flows.1.multgate;",
        "not in this model: flows.9.multgate, estimators.0.what;",
        "other shape: flows.0.multgate is [2, 2] instead of [3, 6]",
    ):
        assert words in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Hostile:
    def __reduce__(self):
        return (os.system, ("touch HACKED",))


def hostile(path):
    torch.save({"model": {}, "iteration": Hostile()}, path)


def hostile_legacy(path):
    torch.save({"model": {}, "iteration": Hostile()}, path, _use_new_zipfile_serialization=False)


def hostile_pickle(path):
    path.write_bytes(pickle.dumps(Hostile()))


def truncated(path):
    path.write_bytes((GOLDEN / "waveflow_60").read_bytes()[:50_000])


def inflated(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10**7)


def another_dict(path):
    torch.save({"weights": torch.zeros(3)}, path)


def no_tensors(path):
    torch.save({"model": {"a": 3}}, path)


BROKEN = [hostile, hostile_legacy, hostile_pickle, truncated, inflated, another_dict, no_tensors]


@pytest.mark.parametrize("damage", BROKEN)
def test_broken_and_hostile_files_give_one_line_and_run_nothing(damage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "waveflow_1"
    damage(path)
    with pytest.raises(InputError) as error:
        ckpt.load_checkpoint(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "HACKED").exists()


@pytest.mark.parametrize("wrong", [torch.tensor(2), torch.zeros(3), {5: torch.zeros(3)}, {(1, 2): 3}])
@pytest.mark.parametrize("place", ["config", "section", "value"])
def test_a_config_of_more_than_plain_values_is_damaged(wrong, place, tmp_path):
    kind = random_vocoder().config.to_dict()
    config = {"config": {"n": wrong}, "section": {"waveflow_config": wrong},
              "value": {"waveflow_config": kind | {"n_flow": wrong}}}[place]  # fmt: skip
    torch.save({"model": random_vocoder().state_dict(), "config": config}, tmp_path / "waveflow_1")
    with pytest.raises(InputError, match="waveflow_1: its config is damaged"):
        ckpt.read_checkpoint(tmp_path / "waveflow_1")


@pytest.mark.parametrize("facts", [5, {"data": 5, 6: 7}, [torch.zeros(3)]])
def test_only_safetensors_tell_facts_of_themselves(facts, tmp_path):
    torch.save({"model": random_vocoder().state_dict(), "facts": facts}, tmp_path / "waveflow_1")
    assert ckpt.read_checkpoint(tmp_path / "waveflow_1").facts == {}


def test_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        ckpt.load_checkpoint(tmp_path / "waveflow_1")
    with pytest.raises(InputError, match="is a folder"):
        ckpt.load_checkpoint(tmp_path)


def save_constant(folder, iteration, value):
    model = random_vocoder()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    ckpt.save_checkpoint(folder / f"waveflow_{iteration}", model, iteration=iteration, learning_rate=0.5)
    return folder / f"waveflow_{iteration}"


def test_averages_are_weighted_from_the_newest_and_sum_to_one(tmp_path):
    paths = [save_constant(tmp_path, iteration, value) for iteration, value in ((9, 1.0), (10, 2.0), (100, 4.0))]
    plain = ckpt.average_checkpoints(paths)
    assert plain["iteration"] == 100
    assert plain["averaged"] == ["waveflow_100", "waveflow_10", "waveflow_9"]
    torch.testing.assert_close(plain["model"]["gates.0"], torch.full((3, 6), 7 / 3))
    decayed = ckpt.average_checkpoints(paths, epsilon=0.3)["model"]["gates.0"]
    expected = (4.0 + 0.7 * 2.0 + 0.49 * 1.0) / (1 + 0.7 + 0.49)
    torch.testing.assert_close(decayed, torch.full((3, 6), expected))
    with pytest.raises(InputError, match="between 0 and 1"):
        ckpt.average_checkpoints(paths, epsilon=1.5)


def test_newest_checkpoints_are_counted_by_iteration(tmp_path):
    for iteration in (9, 10, 100):
        save_constant(tmp_path, iteration, 1.0)
    (tmp_path / "waveflow_100_average2").touch()
    (tmp_path / ".waveflow_200.123.tmp").touch()
    assert [path.name for path in ckpt.newest_checkpoints(tmp_path, 2)] == ["waveflow_100", "waveflow_10"]
    with pytest.raises(InputError, match=r"holds 3 checkpoint\(s\), 4 are to be averaged; average fewer"):
        ckpt.newest_checkpoints(tmp_path, 4)
    with pytest.raises(InputError, match="expected the folder"):
        ckpt.newest_checkpoints(tmp_path / "waveflow_9", 1)


def test_a_failed_save_leaves_the_old_file_and_no_debris(tmp_path):
    path = save_constant(tmp_path, 1, 1.0)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        ckpt.save_whole(path, {"cannot be pickled": lambda: None})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["waveflow_1"]


def test_differences_are_named_as_the_file_has_them(tmp_path):
    source, model = random_vocoder("nanoflow"), random_vocoder("nanoflow", n_layer=2)
    ckpt.save_checkpoint(tmp_path / "waveflow_1", source)
    with pytest.raises(InputError, match=r"not in this model: estimator\.net\.res_blocks\.2\.filter_gate_conv\.conv"):
        ckpt.load_weights(model, ckpt.load_checkpoint(tmp_path / "waveflow_1")["model"], "checkpoint waveflow_1")
    with pytest.raises(InputError, match=r"^checkpoint x: .*missing: estimator\.net\.res_blocks\.2\."):
        ckpt.load_weights(source, model.state_dict(), "checkpoint x")


def iterations(folder):
    return [int(path.name.split("_")[1]) for path in ckpt.list_checkpoints(folder)]


def test_only_the_newest_checkpoints_stay_and_those_being_averaged(config, tmp_path):
    path, folder = config(train_config__iters_per_checkpoint=1), tmp_path / "runs" / "tiny"
    assert run("-c", path, "--max_iterations", 3) == 0
    assert iterations(folder) == [3, 2, 1]
    keep = ["--set", "train_config.keep_checkpoints=2"]
    assert run("-c", path, *keep, "-a", 2, "--max_iterations", 6) == 0
    assert iterations(folder) == [6, 5, 3, 2]  # of the average: 3 and 2
    assert run("-c", path, *keep, "--resume", "latest", "--max_iterations", 7) == 0
    assert iterations(folder) == [7, 6]


@pytest.fixture
def reads(monkeypatch):
    """A function of a command's arguments: the names of the torch files that it reads, in order."""
    names, load = [], torch.load

    def noted(file, **options):
        names.append(Path(file.name).name)
        return load(file, **options)

    def of(*arguments):
        names.clear()
        assert run(*arguments) == 0
        return list(names)

    monkeypatch.setattr(torch, "load", noted)
    return of


def test_each_job_reads_a_checkpoint_once(trained, reads):
    path, _ = trained
    assert reads("-c", path, "--evaluate") == ["waveflow_8"]
    assert reads("-c", path, "--synthesize") == ["waveflow_8"]
    assert reads("-c", path, "--resume", "latest", "--max_iterations", 9) == ["waveflow_8"]
    for epsilon in ([], ["-e", 0.3]):
        assert reads("-c", path, "--evaluate", "-a", 3, *epsilon) == ["waveflow_9", "waveflow_8", "waveflow_4"]


def test_a_damaged_newest_file_is_passed_over_in_one_reading(trained, reads, capsys):
    path, folder = trained
    (folder / "waveflow_9").write_bytes((folder / "waveflow_8").read_bytes()[:5000])
    assert reads("-c", path, "--evaluate") == ["waveflow_8"]  # the other is refused before torch reads it
    assert "waveflow_9: refused, damaged" in capsys.readouterr().err


def test_weights_by_epsilon_follow_the_iterations(tmp_path):
    paths = [save_constant(tmp_path, iteration, value) for iteration, value in ((9, 1.0), (10, 2.0))]
    swapped = [path.rename(path.with_name(f"copy{path.name}")) for path in paths]
    with pytest.raises(InputError, match="of iteration 10, after one of 9; newest first"):
        ckpt.average_checkpoints(swapped, epsilon=0.3)
    assert ckpt.average_checkpoints(swapped[::-1], epsilon=0.3)["iteration"] == 10
