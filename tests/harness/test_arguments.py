from argparse import ArgumentParser, ArgumentTypeError

import pytest

from harness.arguments import number, whole_number


def test_numbers_within_their_range_are_taken():
    values = whole_number(1)("1"), number(0, above=True)("0.5"), number(0)("0")
    assert values == (1, 0.5, 0.0)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        *((whole_number(1), text) for text in ("0", "-2")),
        *((number(0, above=True), text) for text in ("0", "-1", "inf", "nan")),
        *((number(0), text) for text in ("-0.1", "inf", "nan")),
    ],
)
def test_others_are_refused_with_what_was_expected(kind, text):
    with pytest.raises(ArgumentTypeError, match=f"{text}: expected "):
        kind(text)


@pytest.mark.parametrize("kind", [whole_number(1), number(0)])
def test_what_is_no_number_is_named_by_argparse(kind, capsys):
    parser = ArgumentParser()
    parser.add_argument("--n", type=kind)
    with pytest.raises(SystemExit):
        parser.parse_args(["--n", "many"])
    assert "invalid" in capsys.readouterr().err
