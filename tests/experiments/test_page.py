"""`python -m experiments tables`: pages are made from runs, or stay as they are."""

from dataclasses import fields

import pytest

from experiments import __main__ as experiments
from experiments.page import write_page
from experiments.runs import Result
from harness.errors import InputError
from harness.files import write_table


def test_without_runs_the_pages_stay(tmp_path, capsys):
    page, readme = tmp_path / "page.md", tmp_path / "README.md"
    for path in (page, readme):
        path.write_text("<!-- claims -->\nfigures\n<!-- end of claims -->\n")
    write_table(tmp_path / "empty.csv", [[field.name for field in fields(Result)]])
    for name in ("none.csv", "empty.csv"):
        with pytest.raises(InputError, match="no runs there to make tables of; name their table with --results"):
            write_page([], tmp_path / name, page, readme)
        assert experiments.main(["tables", "--results", str(tmp_path / name)]) == 1
    assert all("figures" in path.read_text() for path in (page, readme))
    assert "no runs there" in capsys.readouterr().err
