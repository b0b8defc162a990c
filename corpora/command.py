"""The corpora on the command line of `python data.py`: each recipe a command."""

import argparse
from pathlib import Path

from config import load_config
from corpora import asterisk, demo, ljspeech, report
from corpora.prepare import Preparation, prepare
from corpora.recordings import MAX_HOURS
from harness import terminal
from harness.arguments import number
from harness.errors import InputError


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add a command for each recipe; parsed options get `run`, a function of them."""
    _add_prepare(commands)
    parser = commands.add_parser("ljspeech", help="download, check and unpack LJSpeech 1.1 (2.7 GB); write its lists")
    parser.add_argument("folder", metavar="DIR", help="where the corpus and its two lists go")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--archive", metavar="FILE", help="a local LJSpeech-1.1.tar.bz2, instead of downloading it")
    source.add_argument("--folder", metavar="DIR", dest="unpacked", help="an unpacked LJSpeech-1.1, used where it is")
    parser.set_defaults(run=_prepare_ljspeech)

    parser = commands.add_parser("asterisk", help="decode Debian's asterisk-core-sounds-en-g722; write its lists")
    parser.add_argument("folder", metavar="DIR", help="where the wavs and their two lists go")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--archive", metavar="FILE", help="the package, as apt-get download gets it, or a tar of it")
    source.add_argument("--folder", metavar="DIR", dest="unpacked", help="a folder with the .g722 sounds")
    parser.set_defaults(run=_prepare_asterisk)

    parser = commands.add_parser("demo", help="make the demo corpus: five minutes of speech by espeak-ng, offline")
    parser.add_argument("folder", metavar="DIR", help="where the wavs and their two lists go")
    parser.set_defaults(run=_make_demo)


def _add_prepare(commands: argparse._SubParsersAction) -> None:
    default = Preparation()
    parser = commands.add_parser("prepare", help="make a corpus of own recordings: clips, lists, config, a report")
    add = parser.add_argument
    add("inputs", metavar="IN", nargs="+", help="folders of recordings, recordings, lists of them")
    add("output", metavar="OUT", help="folder for the corpus; what it holds already is not done again")
    add("-c", "--config", required=True, help="experiment file whose data_config says rate and mel")
    add("--trim_db", type=number(0, maximum=300), default=default.trim_db, metavar="DB",
        help="silence at the ends is so far below the loudest frame, default 60; 0: keep it")  # fmt: skip
    add("--max_seconds", type=number(1, maximum=3600 * MAX_HOURS), default=default.max_seconds, metavar="S",
        help="cut longer takes at their pauses, default 15")  # fmt: skip
    add("--level", choices=["keep", "peak", "loudness"], default=default.level,
        help="bring each take to a peak of 0.95 or to -23 LUFS; default: keep its level")  # fmt: skip
    add("--valid", type=number(0, maximum=0.5), default=default.valid, metavar="SHARE",
        help="of the takes, default 0.05")  # fmt: skip
    add("--test", type=number(0, maximum=0.5), default=default.test, metavar="SHARE", help="of the takes, default 0.05")
    add("--by_speaker", action="store_true",
        help="hold out whole speakers, the first folders below IN; default: some takes of each")  # fmt: skip
    parser.set_defaults(run=_prepare)


def _prepare(options: argparse.Namespace) -> None:
    if options.valid + options.test >= 1:
        raise InputError("--valid and --test: all takes, and nothing to train on; lower one of them")
    config, folder = load_config(options.config), Path(options.output)
    names = ("trim_db", "max_seconds", "level", "valid", "test", "by_speaker")
    takes, lists = prepare(
        options.inputs, folder, config, Preparation(**{name: getattr(options, name) for name in names})
    )
    report.write_report(folder / "report.csv", takes)
    terminal.say(f"{report.report_text(folder, takes, config.data_config)}\n{lists}")
    terminal.say(f"every take: {folder / 'report.csv'}\nnext: python train.py -c {folder / 'config.json'} --check_data")


def _prepare_ljspeech(options: argparse.Namespace) -> None:
    terminal.say(ljspeech.prepare_corpus(options.folder, ljspeech.LJSPEECH, options.archive, options.unpacked))


def _prepare_asterisk(options: argparse.Namespace) -> None:
    terminal.say(asterisk.prepare_corpus(options.folder, options.archive, options.unpacked))


def _make_demo(options: argparse.Namespace) -> None:
    lists, finished = demo.make_demo_corpus(options.folder)
    terminal.say(f"{options.folder}: " + ("already complete, kept" if finished else "demo corpus made"))
    terminal.say(lists)
