"""train.py's flags: each goes with jobs that heed it, and is refused beside the others."""

import itertools

import pytest

import train
from jobs.arguments import CHECK, EVALUATE, GOES_WITH, METRICS, REPORT, SYNTHESIZE, TRAINING

JOBS = {
    TRAINING: ["-c", "x.json"],
    EVALUATE: ["-c", "x.json", "--evaluate"],
    METRICS: ["-c", "x.json", "--evaluate", "--metrics"],
    SYNTHESIZE: ["-c", "x.json", "--synthesize"],
    REPORT: ["--report", "run"],
    CHECK: ["-c", "x.json", "--check_data"],
}
VALUES = {
    "weights": ["nanoflow"],
    "resume": ["latest"],
    "average_checkpoint": ["3"],
    "epsilon": ["0.1"],
    "warm_start": [],
    "input": ["a.wav"],
    "temp": ["0.5"],
    "seed": ["0"],
    "denoise": ["0"],
    "precision": ["float32"],
    "match_mel": ["0"],
    "output": ["folder"],
    "mel_preset": ["hifigan"],
    "format": ["wav"],
    "batch_seconds": ["0"],
}
# What says which job, which config, or how the machine is used.
EVERYWHERE = {"config", "set", "evaluate", "synthesize", "report", "check_data", "metrics", "device", "deterministic"}
EVERYWHERE |= {"max_iterations", "max_hours"}


def refusal(arguments, capsys):
    """The words after the flags were refused, or nothing."""
    try:
        train.parse_arguments(arguments)
    except SystemExit as end:
        assert end.code == 2
        return capsys.readouterr().err
    return ""


def test_every_flag_says_what_it_goes_with():
    flags = set(vars(train.parse_arguments(["-c", "x.json"]))) - {"quiet"}
    assert flags == set(GOES_WITH) | EVERYWHERE
    assert set(VALUES) == set(GOES_WITH)


@pytest.mark.parametrize(("flag", "job"), list(itertools.product(GOES_WITH, JOBS)))
def test_a_flag_is_heeded_or_refused(flag, job, capsys):
    average = ["-a", "3"] if flag == "epsilon" and job in GOES_WITH[flag] else []
    words = refusal([*JOBS[job], f"--{flag}", *VALUES[flag], *average], capsys)
    if job not in GOES_WITH[flag]:
        assert f"--{flag} goes with " in words and f"means nothing to {job}; leave it out" in words
        assert words.count("\n") == 1
    elif (flag, job) == ("weights", TRAINING):
        assert "with -c and --warm_start what to train from" in words
    else:
        assert words == ""


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--synthesize"], "-c/--config, or --weights"),
        (["--weights", "nanoflow"], "with -c and --warm_start what to train from"),
        (["-c", "x.json", "--weights", "nanoflow"], "with -c and --warm_start what to train from"),
        *((["--weights", "nanoflow", "--synthesize", *start], "--weights says which checkpoint; leave out")
          for start in (["-a", "2"], ["--resume", "latest"], ["-w"])),
        (["-c", "x.json", "-w", "--weights", "nanoflow", "-a", "2"], "--weights says which checkpoint; leave out"),
        (["-c", "x.json", "--resume", "latest", "-a", "2"], "all say where to start; give one"),
        (["-c", "x.json", "--resume", "latest", "-w", "--evaluate"], "all say where to start; give one"),
        (["-c", "x.json", "--metrics"], "--metrics are those of --evaluate"),
        (["-c", "x.json", "--synthesize", "--metrics"], "--metrics are those of --evaluate"),
        (["-c", "x.json", "--evaluate", "--metrics", "-t", "0.5", "1"], "give one value of --temp"),
        (["-c", "x.json", "--evaluate", "-e", "0.5"], "give -a N with it"),
        (["--report", "run", "--set", "train_config.seed=1"], "give it with -c, or leave --set out"),
        (["-c", "x.json", "--evaluate", "--synthesize"], "not allowed with"),
        (["-c", "x.json", "--check_data", "--report"], "not allowed with"),
    ],
)  # fmt: skip
def test_flags_that_do_not_go_together_are_refused(arguments, complaint, capsys):
    assert complaint in refusal(arguments, capsys)


@pytest.mark.parametrize(
    "arguments",
    [
        ["-c", "x.json", "-w", "-a", "20"],  # as published
        ["-c", "x.json", "--evaluate", "-w", "-a", "20", "-e", "0.5"],
        ["--evaluate", "--weights", "nanoflow", "--set", "data_config.test_files=x"],
        ["-c", "x.json", "-w", "--weights", "nanoflow"],
        ["-c", "x.json", "--evaluate", "--metrics", "-t", "0.5", "0.5"],
        ["-c", "x.json", "--report", "--set", "train_config.model_name=x", "--output", "page.html"],
        ["--report", "one", "other"],
    ],
)
def test_flags_that_go_together_are_taken(arguments, capsys):
    assert refusal(arguments, capsys) == ""
