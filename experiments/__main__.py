"""Claims about the models, each as one command.

python -m experiments speak [--weights NAME_OR_PATH] [--output DIR] [RECORDING ...]    speech beside its floors
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data import read_file_list
from experiments.speak import say_scores, speak
from harness import terminal
from harness.arguments import number, whole_number
from harness.errors import InputError
from harness.stopping import exit_status
from vocoder import PRETRAINED, Vocoder

SPEECH = PRETRAINED["nanoflow"].parent / "speech"  # held-out recordings that come with the weights


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Name of an experiment, and its flags."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = parser.add_subparsers(required=True, metavar="NAME")
    one = names.add_parser("speak", help="a vocoder's speech beside recordings, its untrained filter and white noise")
    one.add_argument("--weights", default="nanoflow", metavar="NAME_OR_PATH", help="as Vocoder.from_pretrained takes")
    one.add_argument("--output", type=Path, default=Path("demo/speech"), metavar="DIR", help="default demo/speech")
    one.add_argument("-t", "--temp", type=number(0), default=1.0, help="standard deviation of the noise, default 1")
    one.add_argument("--match_mel", type=whole_number(1), default=4, metavar="N", help="passes, default 4")
    one.add_argument("--list", metavar="FILE", help="a file with one recording per line, instead of RECORDING")
    one.add_argument("recordings", nargs="*", metavar="RECORDING", help="wavs; default: those of the shipped weights")
    one.set_defaults(run=_speak)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one experiment; returns the exit status."""
    options = parse_arguments(arguments)
    return exit_status(lambda: options.run(options))


def _speak(options: argparse.Namespace) -> None:
    files = read_file_list(options.list) if options.list else options.recordings
    files = files or sorted(map(str, SPEECH.glob("*.wav")))
    if not files:
        raise InputError("no recordings given; name some, or a list of them with --list")
    vocoder = Vocoder.from_pretrained(options.weights)
    means = speak(vocoder, files, options.output, options.temp, options.match_mel)
    say_scores(means, len(files), options.match_mel)
    terminal.say(f"wavs and spectrograms.png: {options.output}")


if __name__ == "__main__":
    sys.exit(main())
