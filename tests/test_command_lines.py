"""The six command lines: what they all understand, and help that says what a flag is when it is left out."""

import argparse
import re
import subprocess
import sys

import pytest
import torch

import data
from harness.folder import VERSION
from tests.support.experiments import ROOT, run, write_config, write_corpus
from tests.support.parsers import PARSERS

by_program = pytest.mark.parametrize("program", PARSERS)


def parsers_of(program, monkeypatch):
    """The parser of a program and those of its commands."""
    found = []
    parse_args = argparse.ArgumentParser.parse_args

    def remember(parser, *_):
        found.append(parser)
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", remember)
    with pytest.raises(SystemExit):
        PARSERS[program]([])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    commands = [action for action in found[0]._actions if isinstance(action, argparse._SubParsersAction)]
    return found + [parser for action in commands for parser in action.choices.values()]


@by_program
def test_every_command_tells_its_version(program, capsys):
    with pytest.raises(SystemExit) as ended:
        PARSERS[program](["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.strip().endswith(f" {VERSION}, torch {torch.__version__}")


@by_program
def test_flags_stand_in_groups_and_every_default_in_the_help(program, monkeypatch):
    first, *commands = parsers_of(program, monkeypatch)
    for parser in (first, *commands):
        text = " ".join(parser.format_help().split())
        assert "general: --quiet" in text
        for action in parser._actions:
            if action.option_strings and action.nargs != 0 and not action.required:
                assert action.help, action.option_strings
                if action.default not in (None, []):
                    entry = text.split(f" {action.option_strings[-1]} ")[-1]
                    assert "default" in entry.split(" --")[0], action.option_strings
    if not commands:
        titles = [group.title for group in first._action_groups if group._group_actions]
        assert len(titles) >= 4
        [loose] = [group for group in first._action_groups if group.title == "options"]
        assert [action.dest for action in loose._group_actions] == ["help"]


def test_quiet_is_understood_before_and_behind_the_name_of_a_command():
    parse = PARSERS["checkpoint.py"]
    assert [parse(words.split()).quiet for words in ("info x", "info x --quiet", "--quiet info x")] == [0, 1, 1]


def test_a_quiet_training_says_results_only(tmp_path, capsys):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    path = write_config(tmp_path / "config.json", write_corpus(corpus), tmp_path / "runs")
    assert run("-c", path, "--max_iterations", 4, "--quiet") == 0
    said = capsys.readouterr()
    assert said.err == "" and len(said.out.splitlines()) == 2  # the likelihood before and after
    assert all(re.match(r"iteration [04], first .* of each test clip", line) for line in said.out.splitlines())


def test_many_clips_are_announced_before_they_are_looked_at(tmp_path, capsys, monkeypatch):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    path = write_config(tmp_path / "config.json", write_corpus(corpus), tmp_path / "runs")
    monkeypatch.setattr(data, "MANY_CLIPS", 6)
    monkeypatch.setattr(data, "LONG_LIST", 6)

    def lengths(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "wav_length", lengths)
    assert run("-c", path, "--max_iterations", 4) == 130
    assert capsys.readouterr().out == (
        f"reading {corpus / 'train.txt'}, 0.0 MB\nlooking at 6 training clips of {corpus / 'train.txt'}\n"
    )


def test_help_is_for_pipes_and_files_too():
    done = subprocess.run([sys.executable, "checkpoint.py", "export", "-h"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "\x1b" not in done.stdout and "(default inside)" in done.stdout
