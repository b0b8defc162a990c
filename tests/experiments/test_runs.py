"""Runs of the claims: rows of a table, paired seeds, resumed exactly, never done twice; tables made from the rows."""

import math
from dataclasses import replace

import pytest
import torch

from experiments import __main__ as experiments
from experiments import beyond, early, ordering, series
from experiments.claims import Claim, change
from experiments.floor import floor_result, measure_floors, setting_of
from experiments.page import readme_sections, sections, write_page
from experiments.runs import RESULTS, Result, Run, add_result, read_results
from experiments.series import run_all
from experiments.tables import PAGE, README, claim_table, difference, estimate, rewritten
from experiments.training import RunTrainer
from harness.stopping import SharedStop
from tests.support.experiments import write_corpus

SMALL = {"res_channels": 4, "n_layer": 2, "n_flow": 2, "size_flow_embed": 3, "train__fp16_run": False}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A corpus under the names that recipes give their lists."""
    folder = write_corpus(tmp_path_factory.mktemp("tones"))
    for kind in ("train", "test"):
        (folder / f"{kind}.txt").rename(folder / f"{kind}_files.txt")
    return folder


def small(name, **changes):
    return change(name, coupling_type="nanoflow", **{**SMALL, **changes})


def row(setting, seed, ll, corpus="c", steps=3):
    return Result(
        name=setting.name, corpus=corpus, seed=seed, steps=steps, test_ll=ll, log_mel=1.0, log_mel_temp=1.0, stoi=0.5,
        stoi_temp=1.0, parameters=10, synthesis_parameters=9, multiply_adds=1000.0, order=0, train_loss=-ll,
        seconds=1.0, cpu_seconds=1.0, ll_clips=1, synthesis_clips=1, precision="float32", settings=setting.text,
    )  # fmt: skip


def table_of(*rows):
    return {result.key: result for result in rows}


def test_a_finished_run_is_a_row_and_not_run_again(data, tmp_path, monkeypatch, capsys):
    results, plan = tmp_path / "runs.csv", [Run(small("tiny", linear_prediction=4), data, 1, 3)]
    assert run_all(plan, SharedStop(), results, tmp_path / "work")
    [result] = read_results(results).values()
    assert result.key == plan[0].key and math.isfinite(result.test_ll) and math.isfinite(result.log_mel)
    assert result.order == 4 and result.ll_clips == result.synthesis_clips == 2
    losses = (tmp_path / "work" / plan[0].folder / "losses.csv").read_text().splitlines()
    assert len(losses) == 4
    monkeypatch.setattr(series, "run_one", None)  # a second run would fail
    renamed = replace(plan[0], setting=replace(plan[0].setting, name="of another claim"))
    assert run_all([renamed], SharedStop(), results, tmp_path / "work")
    assert "1 of 1 runs are in" in capsys.readouterr().out


def test_half_precision_reaches_the_model(data, tmp_path):
    run = Run(small("half", train__fp16_run=True, linear_prediction=4), data, 1, 1)
    half = RunTrainer(run, tmp_path)
    seen, forward = [], half.model.model.forward

    def noted(*batch):
        seen.append(half.model.model.execution.half)
        return forward(*batch)

    half.model.model.forward = noted
    half.step(*next(iter(half.loader)))
    assert seen == [torch.bfloat16]
    assert half.evaluated.execution.half is None


def test_runs_of_a_seed_are_paired(data):
    one, other = (Run(small(name, bipartize=name == "b"), data, 7, 2) for name in "ab")
    first, second = (RunTrainer(run, data / "unused") for run in (one, other))
    for (name, value), expected in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(value, expected), name
    batches = [next(iter(trainer.loader)) for trainer in (first, second)]
    assert all(torch.equal(*pair) for pair in zip(*batches, strict=True))


def test_the_floor_stands_beside_the_runs(data, tmp_path):
    results = tmp_path / "runs.csv"
    measure_floors(data, (4,), results)
    found = read_results(results)
    floor = floor_result(found, data.name, 4)
    assert floor.name == setting_of(4).name and math.isfinite(floor.test_ll) and floor.steps == 0
    text = claim_table(claim_of([row(PLAIN, 1, 0.5)]), found, data.name, 3)
    assert "not run" in text  # of the settings there is nothing but their floor


PLAIN, CHANGED = change("plain"), change("changed", n_height=8)


def claim_of(_=()):
    pair = (("changed", "plain"),)
    return Claim("claim", "?", (PLAIN, CHANGED), "plain", pair, headlines=pair, steps=3)


def test_intervals_are_students():
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.half == pytest.approx(4.3027 * 1 / math.sqrt(3), rel=1e-4)
    assert str(estimate([1.25])) == "1.250" and f"{estimate([1.25]):+}" == "+1.250"


def test_differences_are_seed_by_seed():
    plain = {seed: row(PLAIN, seed, seed) for seed in (1, 2, 3)}
    better = {seed: row(CHANGED, seed, seed + 0.1) for seed in (1, 3, 4)}
    gain = difference(better, plain)
    assert gain.mean == pytest.approx(0.1) and gain.half == pytest.approx(0, abs=1e-9) and gain.n == 2


def test_a_table_says_what_was_run_and_what_follows_from_it():
    claim = claim_of()
    assert claim_table(claim, {}, "c", 3).count("not run") == 3
    one = table_of(row(PLAIN, 1, 4.0), row(CHANGED, 1, 4.5))
    text = claim_table(claim, one, "c", 3)
    assert "| changed | 1 | 10 (9) | 1 k | 4.500 | +0.500 |" in text and "one seed: no interval" in text
    sure = table_of(*(row(s, seed, g + seed / 100) for s, g in ((PLAIN, 4.5), (CHANGED, 4.0)) for seed in (1, 2, 3)))
    assert "-0.500 ± 0.000 nats/sample (the other way round)" in claim_table(claim, sure, "c", 3)
    unsure = table_of(*(row(PLAIN, seed, 4.0) for seed in (1, 2)), row(CHANGED, 1, 4.0), row(CHANGED, 2, 4.4))
    assert "not told apart by 2 seeds" in claim_table(claim, unsure, "c", 3)


def test_sections_of_a_page_are_replaced_and_nothing_else():
    page = "a\n<!-- x -->\nold\n<!-- end of x -->\nb"
    assert rewritten(page, {"x": "new \\1"}) == "a\n<!-- x -->\nnew \\1\n<!-- end of x -->\nb"


@pytest.mark.parametrize("page, made", [(PAGE, sections), (README, readme_sections)])
def test_pages_are_made_from_the_shipped_table(page, made):
    text, found = page.read_text(encoding="utf-8"), made(experiments.CLAIMS, read_results(RESULTS))
    assert rewritten(text, found) == text, "python -m experiments tables"


def test_pictures_are_drawn(tmp_path):
    page, readme, results = tmp_path / "page.md", tmp_path / "readme.md", tmp_path / "runs.csv"
    readme.write_text("<!-- claims -->\n<!-- end of claims -->\n")
    page.write_text("".join(f"<!-- {name} -->\n<!-- end of {name} -->\n" for name in ("floor", "claim")))
    for seed in (1, 2):
        add_result(results, row(PLAIN, seed, 4.0 + seed))
    write_page([claim_of()], results, page, readme)
    assert not (tmp_path / "experiments-claim-c-3.png").exists()  # nothing to compare yet
    add_result(results, row(CHANGED, 1, 4.0))
    write_page([claim_of()], results, page, readme)
    assert (tmp_path / "experiments-claim-c-3.png").stat().st_size > 1000
    assert "5.500 ± " in page.read_text()
    assert "| changed minus plain | 3 | -1.000 (one seed: no interval) | `claim` |" in readme.read_text()


def test_every_setting_is_a_model_that_can_be_built(data):
    for setting in (*ordering.CLAIM.settings, *early.CLAIM.settings, *beyond.CLAIM.settings):
        Run(setting, data, 1, 1).config()
    names = [setting.name for setting in early.CLAIM.settings]
    assert len(set(names)) == len({setting.text for setting in early.CLAIM.settings}) == len(names)
    assert early.CLAIM.settings[0] == ordering.CLAIM.settings[1]  # one row for both claims


def test_a_wrong_setting_is_refused_by_name(data, capsys):
    assert experiments.main(["ordering", "--data", str(data), "--only", "nonsense"]) == 1
    assert "--only 'nonsense': expected one of waveflow + lp 128" in capsys.readouterr().err


@pytest.mark.parametrize(("has_products", "precision"), [(True, "bfloat16"), (False, "float32")])
def test_half_precision_is_the_machines_and_no_part_of_a_setting(data, monkeypatch, has_products, precision):
    monkeypatch.setattr("experiments.runs.fast_bfloat16", lambda: has_products)
    setting = change("tiny", coupling_type="nanoflow")
    run = Run(setting, data, 1, 1)
    assert run.config().train_config.fp16_run == (precision == "bfloat16") and run.precision == precision
    folder = run.folder
    monkeypatch.setattr("experiments.runs.fast_bfloat16", lambda: not has_products)
    assert run.folder != folder  # a run of the other precision is not gone on with
    assert "fp16_run" not in setting.text
