"""How much half precision changes the sound of a trained model: what `benchmark.py --fidelity` measures."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

import checkpoint as ckpt
from audio import MelSpectrogram
from config import Config
from data import load_synthesis_entry, read_file_list
from evaluation import log_mel_distance
from fast.engine import SynthesisEngine, slow_precision_warning
from harness.errors import InputError
from model import FlowVocoder, build_model

TEMPERATURES = (0.6, 1.0)
CLIPS = 40  # at most, the first of the test list


class Distance(NamedTuple):
    """Log-mel distance in nats between the outputs of an engine and something else, over clips."""

    temperature: float
    of: str
    to: str
    mean: float
    largest: float


def measure_fidelity(config: Config, device: torch.device) -> list[dict[str, Any]]:
    """Half precision beside float32 from the same noise, and float32 beside the recordings for scale.

    Of the newest checkpoint in the run folder and the first test clips. Prints a Markdown table and returns its rows.
    Precisions that are slow on this device are left out with a line that says so.
    """
    files = read_file_list(config.data_config.test_files)[:CLIPS]
    model, name = _newest_model(config, device)
    engines = _engines(model, device)
    mel_fn = MelSpectrogram(config.data_config)
    print(f"\n{name}, {len(files)} test clip(s), log-mel distance in nats\n")
    print("| temperature | of | to | mean | largest |\n|---|---|---|---|---|")
    rows = []
    for temperature in TEMPERATURES:
        found: dict[tuple[str, str], list[float]] = {}
        for number, file in enumerate(files):
            mel, recording = load_synthesis_entry(file, config.data_config, mel_fn)
            torch.manual_seed(config.train_config.seed + number)  # the noise of `train.py --synthesize`
            z = model.sample_noise(mel.unsqueeze(0), temperature)
            mels = {precision: _mel_of(engine, mel, z, mel_fn, device) for precision, engine in engines.items()}
            if recording is not None:
                found.setdefault(("float32", "the recording"), []).append(log_mel_distance(mels["float32"], mel))
            for precision in list(engines)[1:]:
                distance = log_mel_distance(mels[precision], mels["float32"])
                found.setdefault((precision, "float32"), []).append(distance)
        for (of, to), distances in found.items():
            row = Distance(temperature, of, to, sum(distances) / len(distances), max(distances))
            print(f"| {temperature:g} | {of} | {to} | {row.mean:.4f} | {row.largest:.4f} |", flush=True)
            rows.append(row._asdict())
    return rows


def _newest_model(config: Config, device: torch.device) -> tuple[FlowVocoder, str]:
    found = ckpt.list_checkpoints(config.run_folder)
    if not found:
        raise InputError(f"no checkpoint in {config.run_folder}; train first")
    content = ckpt.load_checkpoint(found[0])
    ckpt.check_config(content, config, str(found[0]))
    model = build_model(config.waveflow_config)
    averaged = config.train_config.ema_decay > 0 and "ema" in content
    ckpt.load_weights(model, content["ema" if averaged else "model"], f"checkpoint {found[0]}")
    return model.to(device).eval(), found[0].name


def _engines(model: FlowVocoder, device: torch.device) -> dict[str, SynthesisEngine]:
    """By precision, float32 first."""
    engines = {"float32": SynthesisEngine(model, "float32")}
    for precision in ("bfloat16", "float16"):
        if warning := slow_precision_warning(precision, device):
            print(f"left out: {warning}")
        else:
            engines[precision] = SynthesisEngine(model, precision)
    return engines


def _mel_of(engine: SynthesisEngine, mel: Tensor, z: Tensor, mel_fn: MelSpectrogram, device: torch.device) -> Tensor:
    """The log-mel [M, F] of what is heard: audio cut off at full scale, as in a wav."""
    audio = engine(mel.unsqueeze(0).to(device), z.to(device))[0]
    return mel_fn(audio.cpu().clamp(-1, 1))
