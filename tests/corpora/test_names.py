"""corpora/names.py: what a list can hold, and that every recipe says so before its work."""

import os

import pytest

import data
from corpora import demo
from corpora.lists import write_lists
from corpora.names import check_listable
from harness.errors import InputError
from harness.lists import read_entries
from tests.support.experiments import write_config

ODD = ["a\nb", "a\rb", "a\r\nb", "a\tb", "a|b", " a", "\u3000a", "{a", "\ufeffa", "a\0b", "\udcff", "a\ud800"]
PLAIN = ["a", "a b", "é", "語", "a}{", "a.b", "-a", "#a", "a\u2028b", "a\x85b", "\U0001f3a4", "a ", "'a'", '"']


@pytest.mark.parametrize("name", PLAIN)
def test_a_list_gives_its_paths_back(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    clips = [f"{name}/wavs/{n}.wav" for n in range(2)]
    for there in (False, True):
        if there:
            os.makedirs(f"{name}/wavs")
            [open(clip, "w").close() for clip in clips]
        lists = write_lists(tmp_path / "lists", clips, clips)
        assert [entry.audio for entry in read_entries(lists.training_files)] == clips
    check_listable(name)


@pytest.mark.parametrize("name", ODD, ids=repr)
def test_what_a_list_would_give_back_as_something_else_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="choose another name") as refused:
        write_lists(tmp_path / "lists", ["good.wav"], [f"{name}/wavs/1.wav"])
    assert str(refused.value).isprintable() and not (tmp_path / "lists").exists()


@pytest.mark.parametrize("name", ["p\nq", "\udcff", "a|b"], ids=repr)
@pytest.mark.parametrize("command", ["prepare", "asterisk", "demo", "ljspeech"])
def test_every_recipe_refuses_such_a_folder_before_its_work(tmp_path, monkeypatch, capsys, command, name):
    monkeypatch.setattr(demo, "_speak_clips", None)
    config = write_config(tmp_path / "c.json", tmp_path, tmp_path / "runs", data_config__test_files="none")
    (tmp_path / "in").mkdir()
    before, (first, last) = (
        set(tmp_path.rglob("*")),
        {
            "prepare": (["prepare", str(tmp_path / "in")], ["-c", config]),
            "asterisk": (["asterisk"], ["--folder", str(tmp_path / "in")]),
            "demo": (["demo"], []),
            "ljspeech": (["ljspeech"], ["--archive", "none"]),
        }[command],
    )
    assert data.main([*first, str(tmp_path / name), *last]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and message.endswith("choose another name\n")
    assert set(tmp_path.rglob("*")) == before
