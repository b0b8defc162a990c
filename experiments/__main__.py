"""Claims about the models, each as one command.

python -m experiments speak [--weights NAME_OR_PATH] [--output DIR] [RECORDING ...]    speech beside its floors
python -m experiments ordering --data DIR      nanoflow > decomp > naive, and nanoflow near waveflow?
python -m experiments early --data DIR         what helps in the first steps, one change at a time
python -m experiments beyond --data DIR        the best combination beside nanoflow
python -m experiments floor --data DIR         linear prediction alone, which every run is shown beside
python -m experiments curve --data DIR         the expected loss of the demo's config by step
python -m experiments tables                   docs/experiments.md and its plots, from the runs' CSV

DIR is that of a corpus, as `python data.py` makes it. What was run is in the CSV and is not run again.
"""

if __name__ == "__main__":
    import harness.start  # noqa: F401

import argparse
from collections.abc import Sequence
from pathlib import Path

from data import read_file_list
from experiments import beyond, early, ordering
from experiments.claims import ORDER, Claim
from experiments.curve import curve_of_logs, run_curve
from experiments.floor import measure_floors
from experiments.page import write_page
from experiments.runs import RESULTS, WORK, read_results
from experiments.series import run_all
from experiments.speak import say_scores, speak
from experiments.tables import claim_table
from experiments.training import GO_ON
from harness import terminal
from harness.arguments import Help, Parser, add_general, number, whole_number
from harness.errors import InputError
from harness.folder import locked_run
from harness.stopping import SharedStop, exit_status, leave
from synthesis.mel_matching import MAX_PASSES
from vocoder import CONVERT, PRETRAINED, Vocoder, find_trained

CLAIMS = (ordering.CLAIM, early.CLAIM, beyond.CLAIM)
SPEECH = PRETRAINED["nanoflow"].parent / "speech"  # held-out recordings that come with the weights


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Name of an experiment, and its flags."""
    parser = Parser(prog="python -m experiments", description=__doc__, formatter_class=Help)
    names = parser.add_subparsers(required=True, metavar="NAME")
    one = names.add_parser("speak", help="a vocoder's speech beside recordings, its untrained filter and white noise")
    one.add_argument("--weights", default="nanoflow", metavar="NAME_OR_PATH", help="as Vocoder.from_pretrained takes")
    one.add_argument("--output", type=Path, default=Path("demo/speech"), metavar="DIR", help="default demo/speech")
    one.add_argument("-t", "--temp", type=number(0), default=1.0, help="standard deviation of the noise, default 1")
    one.add_argument("--match_mel", type=whole_number(1, MAX_PASSES), default=4, metavar="N", help="passes, default 4")
    one.add_argument("--list", metavar="FILE", help="a file with one recording per line, instead of RECORDING")
    one.add_argument("recordings", nargs="*", metavar="RECORDING", help="wavs; default: those of the shipped weights")
    one.set_defaults(run=_speak)
    for claim in CLAIMS:
        one = _with_corpus(names.add_parser(claim.name, help=claim.question))
        one.add_argument("--seeds", type=whole_number(1, 1000), default=claim.seeds, metavar="N", help="1 to N")
        one.add_argument("--steps", type=whole_number(1), default=claim.steps, metavar="N", help="of each run")
        one.add_argument("--jobs", type=whole_number(1, 2**8), default=1, metavar="N", help="runs at a time, default 1")
        one.add_argument("--only", action="append", metavar="SETTING", help="run this one; may be given again")
        one.set_defaults(run=lambda options, claim=claim: _run_claim(claim, options))
    one = _with_corpus(names.add_parser("floor", help="linear prediction alone, at several orders"))
    one.set_defaults(run=lambda options: measure_floors(options.data, results=options.results))
    one = _with_corpus(names.add_parser("curve", help="expected loss by step of the demo's config, as train.py shows"))
    one.add_argument("--seeds", type=whole_number(1, 1000), default=3, metavar="N", help="1 to N, default 3")
    one.add_argument("--steps", type=whole_number(1), default=600, metavar="N", help="default 600")
    one.add_argument("--losses", type=Path, nargs="+", metavar="FILE", help="of runs of train.py, instead of new ones")
    one.set_defaults(run=_curve)
    one = names.add_parser("tables", help="docs/experiments.md and its plots, from the runs' CSV")
    one.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="table of runs")
    one.set_defaults(run=lambda options: write_page(CLAIMS, options.results))
    add_general(parser)
    for one in names.choices.values():
        one.formatter_class = Help
        add_general(one, top=False)
    return parser.parse_args(arguments)


def _with_corpus(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="corpus, as `python data.py` makes it")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="table of runs to add to")
    parser.add_argument("--work", type=Path, default=WORK, metavar="DIR", help="for runs under way, and their losses")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one experiment; returns the exit status."""
    options = parse_arguments(arguments)
    return exit_status(lambda: options.run(options), quiet=options.quiet)


def _run_claim(claim: Claim, options: argparse.Namespace) -> int:
    runs = claim.runs(options.data, range(1, options.seeds + 1), options.steps)
    if unknown := set(options.only or ()) - {setting.name for setting in claim.settings}:
        raise InputError(f"--only {min(unknown)!r}: expected one of {', '.join(s.name for s in claim.settings)}")
    chosen = [run for run in runs if not options.only or run.setting.name in options.only]
    with locked_run(options.work):
        with SharedStop() as stop:
            saved = run_all(chosen, stop, options.results, options.work, options.jobs)
        if stop:
            return stop.exit_status(saved, finished=False, resume=GO_ON)
        orders = sorted({run.config().waveflow_config.linear_prediction or ORDER for run in runs})
        measure_floors(options.data, tuple(orders), options.results)
    terminal.say(claim_table(claim, read_results(options.results), options.data.name, options.steps))
    return 0


def _curve(options: argparse.Namespace) -> int:
    if options.losses:
        curve_of_logs(options.data, options.losses)
        return 0
    with locked_run(options.work):
        return run_curve(options.data, options.seeds, options.steps, options.work)


def _speak(options: argparse.Namespace) -> None:
    files = read_file_list(options.list) if options.list else options.recordings
    files = files or sorted(map(str, SPEECH.glob("*.wav")))
    if not files:
        raise InputError("no recordings given; name some, or a list of them with --list")
    vocoder = Vocoder.of(*find_trained(options.weights, None, CONVERT, terminal.warn))
    means = speak(vocoder, files, options.output, options.temp, options.match_mel)
    say_scores(means, len(files), options.match_mel)
    terminal.say(f"wavs and spectrograms.png: {options.output}")


if __name__ == "__main__":
    leave(main())
