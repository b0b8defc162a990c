"""bad_steps.py: what becomes of steps that are not finite."""

import pytest

from harness.bad_steps import BadSteps
from harness.errors import InputError


def test_bad_steps_in_a_row_are_reported_and_then_end_the_run():
    said = []
    judge = BadSteps(3, lambda step: [f"clip{step}.wav", "shared.wav"], said.append)
    nan, inf = float("nan"), float("inf")
    assert judge.judge(1, 0.5, 1.0)
    assert not judge.judge(2, nan, 1.0) and not judge.judge(3, 0.5, inf)
    assert judge.judge(4, 0.5, 1.0) and judge.in_a_row == 0
    assert not judge.judge(5, nan, nan) and not judge.judge(6, nan, nan)
    assert [line.split(":")[1].strip() for line in said] == [f"iteration {n}" for n in (2, 3, 5, 6)]
    assert "clip1.wav, shared.wav" in said[0]
    with pytest.raises(InputError) as error:
        judge.judge(7, nan, nan)
    for words in ("3 steps in a row, up to iteration 7", "clip4.wav, shared.wav, clip5.wav, clip6.wav"):
        assert words in str(error.value)


def test_bad_steps_of_before_a_resumption_count_and_long_lists_are_cut():
    judge = BadSteps(3, lambda step: [f"{step}-{i}.wav" for i in range(20)], lambda line: None, in_a_row=2)
    with pytest.raises(InputError, match=r"3 steps in a row, up to iteration 9; .* and 44 more"):
        judge.judge(9, float("nan"), 1.0)
