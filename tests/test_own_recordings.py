"""From a folder of odd recordings to a vocoder, as a user goes: prepare, check, train, evaluate, fine-tune, speak."""

import json
from pathlib import Path

import data
from audio import read_wav
from data import read_file_list
from tests.support.experiments import RATE, run, write_config
from tests.support.odd_recordings import write_odd_recordings


def test_from_odd_recordings_to_speech(tmp_path, capsys):
    write_odd_recordings(tmp_path / "recordings")
    template = write_config(tmp_path / "template.json", tmp_path, tmp_path / "runs", data_config__segment_length=4_096)
    out = tmp_path / "own"
    prepare = ["prepare", str(tmp_path / "recordings"), str(out), "-c", template, "--level", "loudness"]
    assert data.main(prepare) == 0
    config = str(out / "config.json")
    assert run("-c", config, "--check_data") == 0
    assert "0 with errors" in capsys.readouterr().out
    assert run("-c", config, "--max_iterations", 2) == 0
    assert run("-c", config, "--evaluate") == 0
    assert capsys.readouterr().out.count("valid_files: log-likelihood") == 3  # before, after, of whole clips

    sections = json.loads((out / "config.json").read_text())  # another voice, another rate, of minutes
    sections["data_config"] |= {"sampling_rate": 16_000, "mel_fmax": None, "hop_length": 160}
    sections["waveflow_config"] |= {"upsample_strides": [16, 10], "model_name": "tuned"}
    (tmp_path / "other.json").write_text(json.dumps(sections))
    other = ["prepare", str(tmp_path / "recordings" / "bob"), str(tmp_path / "bob"), "-c", str(tmp_path / "other.json")]
    assert data.main(other) == 0
    start = ["-w", "--set", f"train_config.checkpoint_path={tmp_path / 'runs' / 'tiny' / 'waveflow_2'}"]
    parts = ["--set", "train_config.trained_parts=gates-embedding-projections"]
    tuned = str(tmp_path / "bob" / "config.json")
    assert run("-c", tuned, "--max_iterations", 2, *start, *parts) == 0
    assert "its weights are only a beginning" in capsys.readouterr().err
    for path, rate in ((config, RATE), (tuned, 16_000)):
        assert run("-c", path, "--synthesize") == 0
        wavs = sorted((tmp_path / "runs" / ("tiny" if rate == RATE else "tuned")).rglob("synthesis/*/*.wav"))
        sections = json.loads(Path(path).read_text())["data_config"]
        assert len(wavs) == sum(len(read_file_list(name)) for name in sections["test_files"]) >= 2
        assert all(len(read_wav(wav, rate)) > rate // 4 for wav in wavs)
