"""Steps that are not finite: judged, and skipped in two ways."""

import math

import pytest
import torch

from harness.bad_steps import BadSteps, step_and_take_back, step_if_finite
from harness.errors import InputError

NAN, INF = math.nan, math.inf


def test_bad_steps_in_a_row_are_reported_and_then_end_the_run(capsys):
    judge = BadSteps(3, lambda step: [f"clip{step}.wav", "shared.wav"], lambda: "use better clips")
    assert judge.judge(1, 0.5, 1.0)
    assert not judge.judge(2, NAN, 1.0) and not judge.judge(3, 0.5, INF)
    assert judge.judge(4, 0.5, 1.0) and judge.in_a_row == 0
    assert not judge.judge(5, NAN, NAN) and not judge.judge(6, NAN, NAN)
    captured = capsys.readouterr()
    said = (captured.out + captured.err).splitlines()
    assert [line.split(":")[1].strip() for line in said] == [f"iteration {n}" for n in (2, 3, 5, 6)]
    assert "clip1.wav, shared.wav" in said[0]
    with pytest.raises(InputError) as error:
        judge.judge(7, NAN, NAN)
    for words in ("3 steps in a row, up to iteration 7", "clip4.wav, shared.wav, clip5.wav, clip6.wav",
                  "; use better clips."):  # fmt: skip
        assert words in str(error.value)


def test_bad_steps_of_before_a_resumption_count_and_long_lists_are_cut():
    judge = BadSteps(3, lambda step: [f"{step}-{i}.wav" for i in range(20)], str, in_a_row=2)
    with pytest.raises(InputError, match=r"3 steps in a row, up to iteration 9; .* and 44 more"):
        judge.judge(9, NAN, 1.0)


# --- skipping


def stepped(kind, gradients, step, **options):
    """Weights and moments after steps along gradients, of which the last may be skipped."""
    weights = [torch.nn.Parameter(torch.linspace(-1, 1, 6)), torch.nn.Parameter(torch.ones(2, 2))]
    optimizer = kind(weights, lr=0.1, weight_decay=0.01, **options)
    for value in gradients:
        for weight in weights:
            weight.grad = torch.full_like(weight, value)
        step(optimizer, torch.tensor(value))
    state = [value for weight in weights for value in optimizer.state[weight].values()]
    return [*weights, *state]


def on_the_host(optimizer, value):
    step_if_finite(optimizer, value, value)


def on_the_device(optimizer, value):
    if not any(optimizer.state.values()):
        optimizer.step()  # the first step makes the moments
    else:
        step_and_take_back(optimizer, torch.isfinite(value))


@pytest.mark.parametrize(
    ("kind", "step", "options"),
    [
        (torch.optim.Adamax, on_the_host, {}),
        (torch.optim.Adamax, on_the_device, {}),
        (torch.optim.Adam, on_the_host, {"fused": True}),
        (torch.optim.Adam, on_the_device, {}),
    ],
)
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_step_that_is_not_finite_changes_nothing_to_the_last_bit(kind, step, options, bad):
    def plain(optimizer, value):
        optimizer.step()

    expected = stepped(kind, [0.3, -0.2, 0.1], plain, **options)
    found = stepped(kind, [0.3, bad, -0.2, bad, 0.1, bad], step, **options)
    assert all(torch.equal(*both) for both in zip(found, expected, strict=True))
