"""The corpora on the command line of `python data.py`: each recipe a command."""

import argparse

from corpora import asterisk, demo, ljspeech


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add a command for each recipe; parsed options get `run`, a function of them."""
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


def _prepare_ljspeech(options: argparse.Namespace) -> None:
    print(ljspeech.prepare_corpus(options.folder, ljspeech.LJSPEECH, options.archive, options.unpacked))


def _prepare_asterisk(options: argparse.Namespace) -> None:
    print(asterisk.prepare_corpus(options.folder, options.archive, options.unpacked))


def _make_demo(options: argparse.Namespace) -> None:
    lists, finished = demo.make_demo_corpus(options.folder)
    print(f"{options.folder}: " + ("already complete, kept" if finished else "demo corpus made"))
    print(lists)
