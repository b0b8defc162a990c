"""docs/experiments.md and a table of the README: what is made from the runs' CSV."""

from collections.abc import Sequence
from pathlib import Path

from experiments.claims import Claim
from experiments.floor import ORDERS, floor_result
from experiments.runs import RESULTS, read_results
from experiments.tables import PAGE, README, Results, claim_table, counts, headlines, of_setting, plot, rewritten
from harness import terminal
from harness.errors import InputError
from harness.files import written_whole


def write_page(claims: Sequence[Claim], results: Path = RESULTS, page: Path = PAGE, readme: Path = README) -> None:
    """Replace the generated sections, and draw a picture for each claim that has runs."""
    if not (found := read_results(results)):
        raise InputError(f"{results}: no runs there to make tables of; name their table with --results")
    for path, texts in ((page, sections(claims, found)), (readme, readme_sections(claims, found))):
        text = rewritten(path.read_text(encoding="utf-8"), texts)
        with written_whole(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    for claim, corpus, steps in _measured(claims, found):
        path = page.parent / f"experiments-{claim.name}-{corpus}-{steps}.png"
        plot(claim, found, corpus, steps, path)
        terminal.say(f"{path}")
    terminal.say(f"{page}")


def sections(claims: Sequence[Claim], results: Results) -> dict[str, str]:
    """Generated text of each section, by name."""
    texts = {"floor": floor_table(results)}
    for claim in claims:
        parts = []
        for _, corpus, steps in _measured([claim], results) or [(claim, "", claim.steps)]:
            where = f" on `{corpus}`" if corpus else ""
            picture = f"\n\n![{claim.name}](experiments-{claim.name}-{corpus}-{steps}.png)" if corpus else ""
            table = claim_table(claim, results, corpus, steps)
            parts.append(f"{steps} steps{where}:\n\n{table}{picture}")
        texts[claim.name] = "\n\n".join(parts)
    return texts


def readme_sections(claims: Sequence[Claim], results: Results) -> dict[str, str]:
    """Generated text of the README's one section, by its name."""
    return {"claims": headlines(_measured(claims, results), results)}


def floor_table(results: Results) -> str:
    """Linear prediction alone, by order and corpus."""
    lines = ["| corpus | order | test LL | log-mel distance | STOI |", "|---|---|---|---|---|"]
    for corpus in sorted({result.corpus for result in results.values()}):
        for order in ORDERS:
            if row := floor_result(results, corpus, order):
                lines.append(f"| {corpus} | {order} | {row.test_ll:.3f} | {row.log_mel:.3f} | {row.stoi:.3f} |")
    return "\n".join(lines)


def _measured(claims: Sequence[Claim], results: Results) -> list[tuple[Claim, str, int]]:
    """(claim, corpus, steps) of which there are runs of two settings, so that there is something to compare."""
    found = []
    for claim in claims:
        texts = {setting.text for setting in claim.settings}
        for corpus in sorted({result.corpus for result in results.values() if result.settings in texts}):
            for steps in counts(results, claim, corpus):
                run = [setting for setting in claim.settings if of_setting(results, setting, corpus, steps)]
                found += [(claim, corpus, steps)] if len(run) > 1 else []
    return found
