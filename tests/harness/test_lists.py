"""harness/lists.py: lists of recordings in the forms that corpora come with."""

import pytest

from harness.errors import InputError
from harness.lists import Entry, read_entries


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A corpus beside, and not in, the current folder."""
    for path in ("corpus/wavs/a.wav", "corpus/b c.wav", "corpus/mels/a.npy", "here/d.wav"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "corpus"


@pytest.mark.parametrize(
    ("line", "audio", "mel", "text"),
    [
        ("wavs/a.wav", "wavs/a.wav", "", ""),
        ("wavs/a.wav|Hello | there.", "wavs/a.wav", "", "Hello|there."),
        ("a|Raw|normalised", "wavs/a.wav", "", "Raw|normalised"),
        ("a.wav|text", "wavs/a.wav", "", "text"),
        ("wavs/a.wav\tHello there.", "wavs/a.wav", "", "Hello there."),
        ("a\twavs/a.wav", "wavs/a.wav", "", ""),
        ("wavs/a.wav|mels/a.npy", "wavs/a.wav", "mels/a.npy", ""),
        ("wavs/a.wav|mels/a.npy|text", "wavs/a.wav", "mels/a.npy", "text"),
        ("id_1 wavs/a.wav", "wavs/a.wav", "", ""),
        ("id_1 b c.wav", "b c.wav", "", ""),
        ("b c.wav", "b c.wav", "", ""),
        ('{"audio_filepath": "wavs/a.wav", "duration": 1.5, "text": "Hi"}', "wavs/a.wav", "", "Hi"),
        ('{"wav": "wavs/a.wav", "mel": "mels/a.npy"}', "wavs/a.wav", "mels/a.npy", ""),
    ],
)
def test_a_line_of_any_form_is_understood(corpus, line, audio, mel, text):
    expected = Entry(str(corpus / audio), str(corpus / mel) if mel else "", text)
    for content in (f"{line}\n", f"\ufeff{line}\r\n\r\n", f"{line}\r"):
        (corpus / "list.txt").write_bytes(content.encode())
        assert read_entries(corpus / "list.txt") == [expected]


def test_paths_count_from_here_then_from_the_list_then_from_elsewhere(corpus, tmp_path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "list.txt").write_text("d.wav\nb c.wav\nnowhere.wav\n")
    found = [entry.audio for entry in read_entries(tmp_path / "lists" / "list.txt", beside=[corpus])]
    assert found == ["d.wav", str(corpus / "b c.wav"), "nowhere.wav"]


@pytest.mark.parametrize("line", ["{broken", '{"text": "no path"}', '{"audio_filepath": 3}', "{}"])
def test_json_without_a_recording_is_named_with_its_line(tmp_path, line):
    (tmp_path / "list.jsonl").write_text(f'{{"audio": "a.wav"}}\n{line}\n')
    with pytest.raises(InputError, match=r"list\.jsonl, line 2: .*JSON") as error:
        read_entries(tmp_path / "list.jsonl")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["n" * 300, "a/" * 2_000])
def test_names_that_no_file_can_have_are_left_to_who_reads_them(tmp_path, name):
    for line in (f"{name}|text", name, f"{name}\ttext", f"id {name}"):
        (tmp_path / "list.txt").write_text(f"{line}\n")
        [entry] = read_entries(tmp_path / "list.txt")
        assert entry.audio
