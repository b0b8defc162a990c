"""train.py --report: one page about runs, real or damaged, by the real command, and in a browser where there is one."""

import base64
import fcntl
import io
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from jobs import report_runs
from tests.support.experiments import RATE, ROOT, fails, run, write_config, write_corpus
from training import loop
from training.expected import Corpus, Curve

VOID = {"meta", "img", "br", "link", "input"}
EVIL = "<script>alert(1)<"


class Page(HTMLParser):
    """Elements of a page with their attributes, its words; tags must match."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.words, self.open = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def data(self, tag, attribute):
        return [base64.b64decode(of[attribute].partition("base64,")[2]) for of in self.all(tag)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("recordings"))


@pytest.fixture(scope="module")
def made(tmp_path_factory, corpus):
    """Folder with two runs on the corpus, one of them evaluated, whose models and seeds differ."""
    top = tmp_path_factory.mktemp("report")
    for name, seed in (("one", 1), ("two", 2)):
        changes = {"waveflow_config__model_name": name, "train_config__seed": seed, "train_config__ema_decay": 0.5}
        if name == "two":
            changes |= {"waveflow_config__n_flow": 2, "train_config__iters_per_checkpoint": 3}
        path = write_config(top / f"{name}.json", corpus, top, **changes)
        assert run("-c", path, "--max_iterations", 6) == 0
    assert run("-c", top / "one.json", "--evaluate") == 0
    return top


@pytest.fixture
def runs(made, tmp_path):
    """Copies of the two runs, for a test to spoil."""
    for name in ("one", "two"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


def report(*folders, output=None):
    """The page that the command makes of runs."""
    where = [] if output is None else ["--output", output]
    assert run("--report", *folders, *where) == 0
    return Page(output if output is not None else Path(folders[0]) / "report.html")


def labels(page):
    return [of.get("aria-label") for of in page.all("svg") if "aria-label" in of]


def test_a_run_by_the_real_command(runs):
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    command = [sys.executable, "train.py", "--report", str(runs / "one")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path = runs / "one" / "report.html"
    assert re.search(rf"report of 1 run\(s\): {path}, [\d,]+ bytes, [\d.]+ s", done.stdout)
    assert done.stderr == ""
    after = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    assert set(after) - set(before) == {path}  # nothing else is written
    assert all(after[path] == before[path] for path in before if path != runs / "one")

    page = Page(path)
    assert labels(page)[:6] == [
        "Loss",
        "Prior term",
        "Log-determinant term",
        "Gradient norm",
        "Learning rate",
        "Test likelihood, beginnings of clips",
    ]
    assert {"z of test clips, over sigma", "log_s of each flow: mean, one deviation"} <= set(labels(page))
    for word in ("6 of 6", "waveflow_6", "clip6.wav", "clip7.wav", "log-mel distance", "flow 2", "excess kurtosis"):
        assert word in page.text
    for word in ("waveflow_6.csv, 2 clips", "log_likelihood", "torch", "git_commit", "WinogradQueue"):
        assert word in page.text
    assert re.search(r"waveflow_config\.n_height 16 8 ", page.text)  # the default, and the run's
    assert "sampling_rate" in page.text  # among every key
    sounds = page.data("audio", "src")
    assert len(sounds) == 4  # two clips, recorded and made
    for content in sounds:
        samples, rate = soundfile.read(io.BytesIO(content))
        assert rate == RATE and 0.3 * RATE < len(samples) < 3 * RATE and np.abs(samples).max() > 0.01
    pictures = [Image.open(io.BytesIO(content)).convert("RGB") for content in page.data("image", "href")]
    assert len(pictures) == 6 and all(np.asarray(picture).std() > 5 for picture in pictures)


def test_nothing_is_loaded_and_nothing_runs(made, tmp_path):
    page = report(made / "one", made / "two", output=tmp_path / "page.html")
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "data", "action"):
            assert attributes.get(name, "data:").startswith("data:")
    content = (tmp_path / "page.html").read_text()
    assert "url(" not in content and "http" not in content.replace("http-equiv", "")
    [policy] = [of["content"] for of in page.all("meta") if of.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")


def test_runs_lie_over_one_another_and_their_differences_are_told(made, tmp_path):
    page = report(made / "one", made / "two", output=tmp_path / "deep" / "page.html")
    curves = [of["class"] for of in page.all("path") if "curve" in of.get("class", "") and "L22,4" not in of["d"]]
    assert curves.count("curve c0") == curves.count("curve c1") == 8  # six charts, z, flows
    assert len(page.all("audio")) == 2 * 3
    assert "Keys in which the runs differ" in page.text
    assert re.search(r"waveflow_config\.n_flow 3 2 ", page.text) and re.search(r"train_config\.seed 1 2 ", page.text)
    beginning = page.text[: page.text.index("every key")]
    assert "data_config.hop_length" not in beginning and "data_config.hop_length" in page.text


def test_output_is_a_file_a_folder_or_stdout(made, tmp_path, capsysbinary):
    assert run("--report", made / "two", "--output", tmp_path / "new") == 0
    assert (tmp_path / "new" / "report.html").is_file()
    command = [sys.executable, "train.py", "--report", str(made / "two"), "--output", "-"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert done.returncode == 0 and done.stdout.startswith(b"<!DOCTYPE html>") and b"</html>" in done.stdout[-10:]
    assert b"report of 1 run(s): stdout" in done.stderr
    (tmp_path / "notes.md").write_text("mine")
    assert run("--report", made / "two", "--output", tmp_path / "notes.md") == 1
    assert (
        b"notes.md: exists, and is no folder; give one, or a name that ends with .html" in capsysbinary.readouterr().err
    )
    assert (tmp_path / "notes.md").read_text() == "mine"


def test_without_a_folder_it_is_the_run_of_the_config(made):
    assert run("-c", made / "two.json", "--report") == 0
    page = Page(made / "two" / "report.html")
    assert "1 run," in page.text
    (made / "two" / "report.html").unlink()


def test_the_expected_curve_lies_beneath(runs, monkeypatch):
    record = json.loads((runs / "one" / "run_record.jsonl").read_text().splitlines()[0])
    found = []

    def curve_on(config, corpus):
        found.append(corpus)
        return Curve(Corpus("tones", 6, 1), 3, {3: (1.5, 0.1), 6: (1.25, 0.1)})

    monkeypatch.setattr(report_runs, "curve_on", curve_on)
    page = report(runs / "one")
    assert found == [Corpus("", 6, record["training_samples"])]
    references = [of for of in page.all("path") if of.get("class") == "curve reference"]
    assert len(references) == 4  # beneath the loss and as the Gaussian, each also in its legend
    assert "expected on tones" in page.text and "one: 6 steps, too few to compare" in page.text
    assert [of["class"] for of in page.all("path")].index("band reference") == 0  # the first thing drawn


def test_names_and_values_are_escaped(runs):
    os.rename(runs / "one", runs / EVIL)
    folder = runs / EVIL
    config = json.loads((folder / "config.json").read_text())
    config["train_config"]["checkpoint_path"] = "</td><script>alert(2)</script><img src=x onerror=alert(3)>"
    (folder / "config.json").write_text(json.dumps(config))
    with open(folder / "run_record.jsonl", "a") as file:
        file.write(
            json.dumps({"started": "<b onclick='alert(4)'>", "config": config, '"><svg/onload=alert(5)>': 1}) + "\n"
        )
    page = report(folder)
    assert not page.all("script") and not page.all("b") and not page.all("img")
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    for text in (EVIL, "alert(2)", "alert(3)", "<b onclick='alert(4)'>", "onload=alert(5)"):
        assert text in page.text


def test_a_run_whose_corpus_is_gone(runs, corpus, capsys):
    os.rename(corpus, corpus.with_name("moved"))
    try:
        page = report(runs / "one", runs / "two")
    finally:
        os.rename(corpus.with_name("moved"), corpus)
    assert len(page.all("audio")) == 2  # the samples that the runs wrote
    assert "samples/waveflow_6.wav" in page.text
    assert page.text.count("no recordings, so no comparison, z or flows: file list") == 2
    assert "Needs a checkpoint and the test recordings" in page.text and "Loss" in labels(page)
    assert capsys.readouterr().err.count("warning: ") == 2


def test_a_corpus_relative_to_where_the_run_was_started_is_found(runs, corpus):
    config = json.loads((runs / "one" / "config.json").read_text())
    config["data_config"]["test_files"] = "test.txt"
    (runs / "one" / "config.json").write_text(json.dumps(config))
    record = json.loads((runs / "one" / "run_record.jsonl").read_text().splitlines()[0])
    (runs / "one" / "run_record.jsonl").write_text(json.dumps({**record, "directory": str(corpus)}) + "\n")
    assert len(report(runs / "one").all("audio")) == 4


def test_a_run_under_way_is_read_without_its_lock(runs):
    folder = runs / "one"
    shutil.rmtree(folder / "samples")
    for path in folder.glob("waveflow_*"):
        path.unlink()
    with open(folder / "losses.csv", "a") as file, open(folder / "run_record.jsonl", "a") as record:
        file.write("7,-1.2")  # being written
        record.write('{"started": "20')
        file.flush(), record.flush()
        lock = (folder / "run.lock").read_text()
        with open(folder / "run.lock", "a+") as held:
            fcntl.lockf(held, fcntl.LOCK_EX)
            code = f"import sys, train; sys.exit(train.main(['--report', {str(folder)!r}]))"
            done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "no checkpoint yet" in done.stderr and done.stderr.count("\n") == 1
    assert (folder / "run.lock").read_text() == lock
    page = Page(folder / "report.html")
    assert "6 of 6" in page.text and "no checkpoint yet: no audio, z, flows or weights" in page.text
    assert "cannot be read" not in page.text


DAMAGE = {
    "losses.csv": [b"", b"\x00\xff" * 500, b"iteration,loss\n\xff\xff\n1,2\n", b"epoch,bits\n1,2\n"],
    "config.json": [b"", b"[1]", b"[" * 100_000, b'{"train_config": 3}', b'{"waveflow_config": {"n_flow": "x"}}'],
    "run_record.jsonl": [
        b"\n\n\xff\n[]\n3\n",
        b'{"config": 7, "iterations": [1, "x"], "directory": 5}\n',
        b"[" * 100_000 + b"\n",
    ],
    "test_likelihood.csv": [b"", b"a\n", b"iteration,list,log_likelihood\nx,y,z\n"],
    "evaluation/waveflow_6.csv": [b"", b"\x00" * 100, b"clip,a\nx\n"],
    "waveflow_6": [b"", b"PK\x03\x04", b"x" * 1000],
    "samples/waveflow_6.wav": [b"RIFF"],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_a_line_and_the_rest_is_shown(runs, name, capsys):
    for content in DAMAGE[name]:
        (runs / "one" / name).write_bytes(content)
        page = report(runs / "one")
        said = capsys.readouterr()
        assert "Traceback" not in said.err and all(line.startswith("warning: ") for line in said.err.splitlines())
        assert "Learning rate" in labels(page) or name == "losses.csv"
        if not name.startswith("samples") and content != DAMAGE["run_record.jsonl"][1]:
            assert said.err or name == "test_likelihood.csv"


def test_only_what_is_a_runs_folder_is_taken(tmp_path, made, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    assert "no such folder, expected the folder of a run" in fails(capsys, "--report", tmp_path / "nowhere")
    assert "a file, expected the folder of a run" in fails(capsys, "--report", tmp_path / "file")
    assert "not the folder of a run, it has no losses.csv" in fails(
        capsys, "--report", made / "one", tmp_path / "empty"
    )
    assert not (made / "one" / "report.html").exists()
    assert "file" in fails(capsys, "--report", made / "two", "--output", tmp_path / "file" / "page.html")
    for wrong in (["--report"], ["--report", "x", "--evaluate"], ["--report", "x", "--weights", "y"],
                  ["--report", "x", "-a", "3"], ["--report", "x", "--seed", "3"]):  # fmt: skip
        with pytest.raises(SystemExit):
            run(*wrong)


def test_many_runs_stay_small(made, tmp_path):
    folders = []
    for number in range(12):
        folder = tmp_path / f"run{number}"
        folder.mkdir()
        rows = (f"{i},{-5 + number / 10},-1.4,{6.4 + 1 / i},{1 + i % 7},0.001\n" for i in range(1, 5001))
        (folder / "losses.csv").write_text(",".join(loop.COLUMNS) + "\n" + "".join(rows))
        folders.append(folder)
    page = report(*folders, folders[0], output=tmp_path / "page.html")
    assert "12 runs" in page.text and (tmp_path / "page.html").stat().st_size < 1_500_000
    assert {"curve c0", "curve c9", "curve c0 again", "curve c1 again"} <= {of.get("class") for of in page.all("path")}
    assert "lines are means over" in page.text


# --- in a browser -----------------------------------------------------------------------------------------

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_shows_the_page(made, tmp_path):
    page = tmp_path / "page.html"
    report(made / "one", made / "two", output=page)
    start = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    seen = {}
    for name, flags in {"light": [], "dark": ["--blink-settings=preferredColorScheme=0"]}.items():
        picture = tmp_path / f"{name}.png"
        command = [*start, *flags, "--window-size=900,1400", f"--screenshot={picture}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        seen[name] = np.asarray(Image.open(picture).convert("RGB")).astype(int)
        assert seen[name].shape[1] == 900 and seen[name].std() > 10
        blue = seen[name][..., 2] - seen[name][..., 0] > 60  # the first run's curves
        assert blue.sum() > 500
    assert np.median(seen["light"]) > 200 > 60 > np.median(seen["dark"])
    done = subprocess.run([*start, "--dump-dom", page.as_uri()], check=True, capture_output=True, timeout=300)
    (tmp_path / "dom.html").write_bytes(done.stdout)
    shown = Page(tmp_path / "dom.html")
    assert len(shown.all("audio")) == 6 and "Test likelihood, beginnings of clips" in labels(shown)
    assert "Refused to" not in done.stderr.decode("utf-8", "replace")
