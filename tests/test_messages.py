"""What refusals advise exists: every flag and every section.key in a message is one of the command that says it."""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import jobs.files
import train
from config import REMEDIES, Config
from image_density_experiments import checkpoint as image_ckpt
from image_density_experiments.train import main as train_images
from tests.support.experiments import write_config

ROOT = Path(__file__).parents[1]
FLAG = re.compile(r"(?<![\w-])(--[A-Za-z]\w*|-[a-z])(?![\w-])")
KEY = re.compile(r"\b([a-z]+_config)\.(\w+)")
KEYS = {(section, key) for section, kind in Config.model_fields.items() for key in kind.annotation.model_fields}


def flags_of(main, capsys, *command):
    """The flags that a command's help names."""
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    return set(FLAG.findall(capsys.readouterr().out))


def vocoder_flags(capsys):
    return flags_of(train.main, capsys)


def image_flags(capsys):
    return flags_of(train_images, capsys)


def data_flags(capsys):
    return set.union(
        *(flags_of(data.main, capsys, command) for command in ("mel", "prepare", "ljspeech", "asterisk", "demo"))
    )


def file_flags(capsys):
    return set.union(*(flags_of(jobs.files.main, capsys, command) for command in ("info", "convert", "export")))


def check(message, flags, keys=KEYS):
    """Every flag and key of a message exists."""
    assert set(FLAG.findall(message)) <= flags, message
    assert set(KEY.findall(message)) <= keys, message


def refused(main, arguments, capsys):
    """The line that a job says when it refuses."""
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    return message


# --- the vocoder's command --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A trained run, and files that are wrong in one way each."""

    config: str
    run: Path
    files: Path

    def damaged(self, **changes):
        """A copy of the checkpoint with some entries changed; those that are None are left out."""
        content = torch.load(self.run / "waveflow_2", weights_only=True) | {"iteration": 2, "digest": None} | changes
        path = self.files / f"waveflow_{len(list(self.files.iterdir())) + 10}"
        torch.save({name: value for name, value in content.items() if value is not None}, path)
        return ["--set", f"train_config.checkpoint_path={path}"]


@pytest.fixture(scope="module")
def place(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("messages")
    (folder / "files").mkdir()
    path = write_config(folder / "config.json", corpus, folder / "runs", train_config__iters_per_checkpoint=1)
    assert train.main(["-c", path, "--max_iterations", "2"]) == 0
    return Place(path, folder / "runs" / "tiny", folder / "files")


def setting(text):
    return lambda place: ["--set", text]


def elsewhere(text):
    """In a folder of its own, so that the run which is there is not the first to be in the way."""
    return lambda place: ["--set", "train_config.output_directory=new", "--set", text]


REFUSED = {  # by words of the message
    "did you mean 'batch_size'?": setting("train_config.batch_sise=3"),
    "did you mean 'train_config'?": setting("training.batch_size=3"),
    "expected a whole number, got 'x'": setting("train_config.batch_size=x"),
    "expected at least 1, got 0": setting("train_config.batch_size=0"),
    "filter_length 1023 is odd": setting("data_config.filter_length=1023"),
    "segment_length 2049 is not a multiple": setting("data_config.segment_length=2049"),
    "upsample_strides [16, 16] multiply to 256": lambda place: [
        *("--set", "data_config.hop_length=128", "--set", "waveflow_config.upsample_strides=[16, 16]")
    ],
    "n_height 8 is more than data_config.hop_length 5": setting("data_config.hop_length=5"),
    "differs from data_config.n_mel_channels 40": setting("data_config.n_mel_channels=40"),
    "needs an embedding size": setting("waveflow_config.size_flow_embed=0"),
    "expected section.key=value": setting("batch_size=3"),
    "is given twice": setting('train_config.x={"a": 1, "a": 2}'),
    "training_files: missing": setting("data_config.training_files="),
    "none.txt: no such file": elsewhere("data_config.training_files=none.txt"),
    "6 training clips are fewer": elsewhere("train_config.batch_size=64"),
    "cannot be split into accumulation_steps": elsewhere("train_config.accumulation_steps=3"),
    "segment_length 256 is too short": elsewhere("data_config.segment_length=256"),
    "waveflow_1: no such file": setting("train_config.checkpoint_path=none/waveflow_1"),
    "is a folder": lambda place: ["--set", f"train_config.checkpoint_path={place.run}"],
    "beyond iteration 1": lambda place: place.damaged(iteration=1),
    "n_flow 3, the config says 2": lambda place: ["--resume", "latest", "--set", "waveflow_config.n_flow=2"],
    "'iteration' is not a whole number": lambda place: place.damaged(iteration="x"),
    "holds no 'model' weights": lambda place: place.damaged(model=None),
    "holds weights only": lambda place: place.damaged(optimizer=None),
    "optimizer state does not fit": lambda place: place.damaged(optimizer={"state": 3}),
    "last_epoch is -1": lambda place: place.damaged(scheduler={"last_epoch": -1}),
    "training state is damaged": lambda place: place.damaged(training_state=3),
    "random state is damaged": lambda place: place.damaged(training_state={"random_state": torch.zeros(3)}),
    "moving average 'ema' is damaged": lambda place: place.damaged(ema={}),
    "7 are to be averaged; average fewer": lambda place: ["-a", 7, "--evaluate"],
    "expected the folder that holds": lambda place: [*place.damaged(), "-a", 2],
    "--warm_start takes weights": lambda place: ["--warm_start", "--set", "train_config.output_directory=none"],
    "no checkpoint in": lambda place: ["--evaluate", "--set", "waveflow_config.model_name=none"],
    "device tpu: unknown": lambda place: ["--device", "tpu"],
    "device cuda:99: not there": lambda place: ["--device", "cuda:99"],
    "none.json: no such file": lambda place: ["-c", "none.json"],
}


@pytest.mark.parametrize("words", REFUSED)
def test_refusals_of_the_vocoders_command(words, place, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["-c", place.config, "--max_iterations", 3, *REFUSED[words](place)]
    own = set(KEY.findall(" ".join(map(str, arguments))))  # a message may repeat a mistake
    message = refused(train.main, arguments, capsys)
    assert words in message
    check(message, vocoder_flags(capsys), KEYS | own)


# --- the image command ------------------------------------------------------------------------------------

IMAGES_REFUSED = {  # by words of the message
    "--model_type glowing: unknown": ["--model_type", "glowing"],
    "flow_permutation: expected one of": ["--flow_permutation", "swap"],
    "cannot be halved 5 times": ["--L", 5],
    "--batch_size 500: not one batch": ["--batch_size", 500],
    "not empty": ["--output_dir", "{run}"],
    "none: not there": ["--saved_model", "none", "--evaluate"],
    "holds no checkpoint": ["--saved_model", "."],
    "none.pt: no such file": ["--saved_model", "none.pt"],
    "--saved_optimizer belongs to a model": ["--saved_optimizer", "none.pt"],
    "the checkpoint's model has 4": ["--saved_model", "{run}", "--hidden_channels", 5],
    "optimizer state does not fit": ["--saved_model", "{damaged_optimizer}"],
    "random state is damaged": ["--saved_model", "{damaged_random_state}"],
    "training state is damaged": ["--saved_model", "{damaged_state}"],
    "is the model's own dataset": ["--saved_model", "{run}", "--ood", "folder"],
    "fetch it with --download": ["--saved_model", "{run}", "--ood", "cifar10", "--ood_dataroot", "none"],
    "there are": ["--dataset", "none"],
    "or say with --dataroot": ["--dataset", "cifar10", "--dataroot", "none"],
    "--download cannot": ["--dataset", "imagenet32", "--dataroot", "none"],
    "none.npy: not there": ["--dataroot", "none.npy"],
    "remove it yourself": ["--fresh", "--output_dir", "{foreign}"],
}
SMALL = [
    "--model_type",
    "nanoflow",
    "--hidden_channels",
    4,
    "--K",
    2,
    "--L",
    2,
    "--n_init_batches",
    1,
    "--n_workers",
    0,
]
QUICK = ["--batch_size", 4, "--no_cuda", "--temperatures", 1, "--dataset", "folder", "--max_iterations"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Paths by name: an array, a run that was trained on it, and checkpoints that are damaged."""
    folder = tmp_path_factory.mktemp("images")
    array = np.random.default_rng(0).integers(0, 255, (20, 8, 8, 3), np.uint8)
    np.save(folder / "images.npy", array)
    arguments = [*SMALL, *QUICK, 1, "--dataroot", folder / "images.npy", "--output_dir", folder / "run"]
    assert train_images(list(map(str, arguments))) == 0
    (folder / "foreign").mkdir()
    (folder / "foreign" / "thesis.tex").touch()
    content = torch.load(folder / "run" / "glow_model_1.pt", weights_only=True)
    del content["digest"]
    torch.save(content | {"optimizer": {"state": 3}}, folder / "damaged_optimizer")
    torch.save(content | {"training_state": {"random_state": torch.zeros(3)}}, folder / "damaged_random_state")
    torch.save(content | {"training_state": 3}, folder / "damaged_state")
    return {path.stem: path for path in folder.iterdir()}


@pytest.mark.parametrize("words", IMAGES_REFUSED)
def test_refusals_of_the_image_command(words, images, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [str(word).format(**images) for word in IMAGES_REFUSED[words]]
    model = [] if "--saved_model" in given else SMALL
    arguments = [*model, *QUICK, 2, "--dataroot", images["images"], "--output_dir", "new", *given]
    message = refused(train_images, arguments, capsys)
    assert words in message
    check(message, image_flags(capsys), keys=set())


# --- python data.py ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["mel", "-c", "{config}", "out"],
        ["mel", "-c", "none.json", "out", "a.wav"],
        ["mel", "-c", "{config}", "out", "a"],
        ["mel", "-c", "{config}", "--list", "none.txt", "out"],
        ["ljspeech", "out", "--archive", "none.tar"],
        ["ljspeech", "out", "--folder", "none"],
        ["asterisk", "out", "--folder", "none"],
        ["prepare", "-c", "{config}", "none", "out"],
    ],
)
def test_refusals_of_the_data_command(arguments, place, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [word.format(config=place.config) for word in arguments]
    check(refused(data.main, arguments, capsys), data_flags(capsys))


# --- every message there is -------------------------------------------------------------------------------

SPEAKERS = {"InputError", "Remedies", "error", "warn", "say", "tell", "print"}  # functions whose texts a user reads


def texts(path):
    """What a file says in errors, remedies and warnings, a string for each call; values in braces are left out."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in SPEAKERS:
            parts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
            yield " ".join(part for part in parts if isinstance(part, str))


def test_shared_rooms_name_no_flag_and_no_key():
    for path in (*(ROOT / "harness").glob("*.py"), ROOT / "spline.py", *(ROOT / "fast").glob("*.py")):
        for text in texts(path):
            check(text, flags=set(), keys=set())


def test_every_text_of_a_commands_rooms_names_what_the_command_has(capsys):
    vocoder, images, corpora = vocoder_flags(capsys), image_flags(capsys), data_flags(capsys)
    others = {"data.py": corpora, "corpora": corpora, "jobs/files.py": file_flags(capsys)}
    benchmarks = {"benchmark", "experiments", "tests", "harness", "fast", "image_density_experiments"}
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).parts
        if room[0] not in benchmarks and not room[0].startswith(".") and "site-packages" not in room:
            for text in texts(path):
                check(text, vocoder.union(others.get(room[0], ()), others.get("/".join(room), ())))
    for path in (ROOT / "image_density_experiments").glob("*.py"):
        for text in texts(path):
            check(text, images, keys=set())


def test_remedies_are_words_of_their_commands(capsys):
    for text in vars(REMEDIES).values():
        check(text, vocoder_flags(capsys))
    for text in vars(image_ckpt.REMEDIES).values():
        check(text, image_flags(capsys), keys=set())
