"""Tables and plots made of the runs' CSV: means with 95 % intervals over seeds, differences seed by seed.

docs/experiments.md and the README hold what `python -m experiments tables` writes between marks; a test compares.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from scipy.stats import t as student

from experiments.claims import Claim
from experiments.floor import floor_result
from experiments.runs import ROOT, Result, Setting
from harness.errors import InputError
from harness.files import written_whole

PAGE = ROOT / "docs" / "experiments.md"
README = ROOT / "README.md"
Results = Mapping[tuple[str, str, int, int], Result]


class Estimate(NamedTuple):
    """Mean of some seeds; half the width of its 95 % interval, nan where there is only one."""

    mean: float
    half: float
    n: int

    def __format__(self, sign: str) -> str:
        return f"{self.mean:{sign}.3f}" + ("" if math.isnan(self.half) else f" ± {self.half:.3f}")

    def __str__(self) -> str:
        return f"{self}"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and interval by Student's t."""
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return Estimate(mean, math.nan, n)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    return Estimate(mean, float(student.ppf(0.975, n - 1)) * deviation / math.sqrt(n), n)


def difference(better: Mapping[int, Result], worse: Mapping[int, Result]) -> Estimate | None:
    """Gain in likelihood, over the seeds that both have; None where there is none."""
    seeds = sorted(better.keys() & worse.keys())
    return estimate([better[seed].test_ll - worse[seed].test_ll for seed in seeds]) if seeds else None


def of_setting(results: Results, setting: Setting, corpus: str, steps: int) -> dict[int, Result]:
    """Its runs, by seed."""
    place = (setting.text, corpus, steps)
    return {seed: result for (text, where, seed, n), result in results.items() if (text, where, n) == place}


# --- Markdown -------------------------------------------------------------------------------------------------


def claim_table(claim: Claim, results: Results, corpus: str, steps: int) -> str:
    """A row for each setting, those without a run too, and the differences that the claim is about."""
    runs = {setting.name: of_setting(results, setting, corpus, steps) for setting in claim.settings}
    lines = [
        "| setting | seeds | parameters (synthesis) | multiply-adds | test LL | beside the reference | floor LL "
        "| log-mel distance (floor) | STOI (floor) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, by_seed in runs.items():
        lines.append(_row(name, by_seed, runs[claim.reference], results, name == claim.reference))
    pairs = [f"- {pair}" for pair in _pairs(claim, runs)]
    return "\n".join([*lines, "", *pairs]) if pairs else "\n".join(lines)


def _row(name: str, runs: Mapping[int, Result], base: Mapping[int, Result], results: Results, is_base: bool) -> str:
    if not runs:
        return f"| {name} | not run | | | | | | | |"
    rows = list(runs.values())
    one, floor, gain = rows[0], floor_result(results, rows[0].corpus, rows[0].order), difference(runs, base)
    cells = [
        name,
        len(rows),
        f"{one.parameters:,} ({one.synthesis_parameters:,})",
        f"{one.multiply_adds / 1000:.0f} k",
        estimate([row.test_ll for row in rows]),
        "reference" if is_base else "" if gain is None else f"{gain:+}",
        _or_blank(floor, "test_ll"),
        f"{estimate([row.log_mel for row in rows])} ({_or_blank(floor, 'log_mel')})",
        f"{estimate([row.stoi for row in rows])} ({_or_blank(floor, 'stoi')})",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def _or_blank(result: Result | None, field: str) -> str:
    return "not run" if result is None else f"{getattr(result, field):.3f}"


def _pairs(claim: Claim, runs: Mapping[str, Mapping[int, Result]]) -> Iterable[str]:
    for better, worse in claim.pairs:
        gain = difference(runs[better], runs[worse])
        said = "not run" if gain is None else f"{gain:+} nats/sample ({_verdict(gain)})"
        yield f"{better} minus {worse}: {said}"


def headlines(measured: Iterable[tuple[Claim, str, int]], results: Results) -> str:
    """Table of what came out of the claims, with the command for each row."""
    lines = ["| mean test LL | steps | nats/sample | `python -m experiments` |", "|---|---|---|---|"]
    for claim, corpus, steps in measured:
        runs = {setting.name: of_setting(results, setting, corpus, steps) for setting in claim.settings}
        for better, worse in claim.headlines:
            if (gain := difference(runs[better], runs[worse])) is not None:
                lines.append(f"| {better} minus {worse} | {steps:,} | {gain:+} ({_verdict(gain)}) | `{claim.name}` |")
    return "\n".join(lines)


def _verdict(gain: Estimate) -> str:
    if math.isnan(gain.half):
        return "one seed: no interval"
    if abs(gain.mean) <= gain.half:
        return f"not told apart by {gain.n} seeds"
    return "as claimed" if gain.mean > 0 else "the other way round"


def counts(results: Results, claim: Claim, corpus: str) -> list[int]:
    """Numbers of steps for which a claim has runs, the claim's own first."""
    texts = {setting.text for setting in claim.settings}
    found = {steps for text, where, _, steps in results if text in texts and where == corpus}
    return sorted(found, key=lambda steps: (steps != claim.steps, steps)) or [claim.steps]


# --- the page -------------------------------------------------------------------------------------------------


def rewritten(text: str, sections: Mapping[str, str]) -> str:
    """A page with its generated sections, each between `<!-- NAME -->` and `<!-- end of NAME -->`, replaced."""
    for name, table in sections.items():
        marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if any(mark not in text for mark in marks):
            raise InputError(f"the page has no section {name!r}; expected it between {marks[0]} and {marks[1]}")
        pattern = re.escape(marks[0]) + ".*?" + re.escape(marks[1])
        text = re.sub(pattern, lambda _, t=table, m=marks: f"{m[0]}\n{t}\n{m[1]}", text, flags=re.DOTALL)
    return text


# --- pictures -------------------------------------------------------------------------------------------------


def plot(claim: Claim, results: Results, corpus: str, steps: int, path: Path) -> None:
    """Likelihoods of the settings that were run, with intervals, beside their floors, as PNG."""
    from matplotlib.figure import Figure  # slow to import

    runs = {setting.name: of_setting(results, setting, corpus, steps) for setting in reversed(claim.settings)}
    runs = {name: list(by_seed.values()) for name, by_seed in runs.items() if by_seed}
    figure = Figure(figsize=(8, 1 + 0.32 * max(1, len(runs))), layout="constrained")
    axes = figure.add_subplot()
    for place, rows in enumerate(runs.values()):
        found = estimate([row.test_ll for row in rows])
        axes.errorbar(
            found.mean, place, xerr=0 if math.isnan(found.half) else found.half, fmt="o", color="C0", capsize=3
        )
        if floor := floor_result(results, corpus, rows[0].order):
            axes.plot(floor.test_ll, place, marker="|", markersize=14, color="C3")
    axes.set(yticks=range(len(runs)), yticklabels=list(runs), xlabel="test log-likelihood, nats per sample")
    axes.set_title(f"{claim.name}: {steps} steps on {corpus}; bars: linear prediction alone", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=80)
