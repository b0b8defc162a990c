"""Synthesis as a file for other programs: ONNX, or PyTorch's own `torch.export`; compared with the model before it is
kept."""

import io
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from config import Config
from fast.graph import SynthesisGraph
from harness.errors import InputError
from harness.files import written_whole
from model import FlowVocoder

SUFFIXES = (".onnx", ".pt2")
FRAMES = (2, 3, 9)  # of the mels that are compared
TOLERANCE = 1e-4
INSTALL = "install the packages of requirements-extra.txt"

Synthesis = Callable[[Tensor], tuple[Tensor, Tensor]]  # mel [1, M, F] -> audio [1, T] and its noise [1, T]


class Comparison(NamedTuple):
    """Largest difference between a file's audio and the model's, and the program that ran the file."""

    difference: float
    program: str


def export(
    out: Path, model: FlowVocoder, config: Config, temp: float | None, facts: Mapping[str, str]
) -> Comparison | None:
    """Write synthesis as *.onnx or *.pt2; returns how it compares, None where onnxruntime is not there to tell.

    temp: standard deviation of the noise that is drawn inside, or None where noise is an input. facts: texts that go
    with it, under those of `metadata`. Raises InputError; then nothing was written.
    """
    graph = SynthesisGraph(model, temp).eval()
    texts = {**facts, **metadata(config, temp)}
    content, program, runs = (_onnx if out.suffix == ".onnx" else _exported)(graph, texts)
    difference = None if runs is None else _difference(runs, model, config, temp)
    if difference is not None and not difference <= TOLERANCE:
        raise InputError(
            f"{out}: not written; its audio differs from the model's by {difference:.1e} and not at most {TOLERANCE:g}"
        )
    with written_whole(out) as temporary:
        temporary.write_bytes(content)
    return None if difference is None else Comparison(difference, program)


def metadata(config: Config, temp: float | None) -> dict[str, str]:
    """Texts about the mel that synthesis expects and the noise that it starts from.

    `model_type`, `sample_rate` and what describes the spectrogram have the names that sherpa-onnx reads.
    """
    data = config.data_config
    values = {
        "model_type": "hifigan",  # what sherpa-onnx calls any model that turns a mel into audio, and nothing else
        "comment": f"{config.waveflow_config.coupling_type}: model_type says mel in, audio out, as HiFi-GAN",
        "version": 1,
        "sample_rate": data.sampling_rate,
        "n_fft": data.filter_length,
        "hop_length": data.hop_length,
        "win_length": data.win_length,
        "window_type": "hann",
        "center": 1,
        "pad_mode": "reflect",
        "normalized": 0,
        "num_mels": data.n_mel_channels,
        "mel_fmin": data.mel_fmin,
        "mel_fmax": data.mel_fmax,
        "mel_scale": "slaney",
        "mel_values": "decibels of magnitudes mapped to [0, 1]" if data.use_dbmel else "natural log of magnitudes",
        "noise": "input" if temp is None else f"inside, standard deviation {temp:g}",
        "config": json.dumps(config.to_dict()),
    }
    return {name: str(value) for name, value in values.items()}


# --- the two kinds of file --------------------------------------------------------------------------------------------


def _onnx(graph: SynthesisGraph, texts: Mapping[str, str]) -> tuple[bytes, str, Synthesis | None]:
    try:
        from fast.onnx_graph import NOISE, onnx_model
    except ImportError:
        raise InputError(f"*.onnx files are written by the package onnx, which is not installed; {INSTALL}") from None
    model = onnx_model(graph, texts)
    content = model.SerializeToString()
    try:
        import onnxruntime
    except ImportError:
        return content, "", None
    if graph.temp is not None:
        model.graph.output.add(name=NOISE)  # of a copy: the noise that it drew
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(mel: Tensor) -> tuple[Tensor, Tensor]:
        if graph.temp is not None:
            audio, noise = session.run(["audio", NOISE], {"mel": mel.numpy()})
            return torch.from_numpy(audio), torch.from_numpy(noise)
        noise = torch.randn(1, graph.hop * (mel.size(2) - 1))
        return torch.from_numpy(session.run(["audio"], {"mel": mel.numpy(), "noise": noise.numpy()})[0]), noise

    return content, f"onnxruntime {onnxruntime.__version__}", run


def _exported(graph: SynthesisGraph, texts: Mapping[str, str]) -> tuple[bytes, str, Synthesis | None]:
    frames, example = torch.export.Dim("frames", min=2, max=2**20), 7
    arguments: tuple[Tensor, ...] = (torch.zeros(1, graph.bands, example),)
    shapes: tuple[dict[int, Any], ...] = ({2: frames},)
    if graph.temp is None:
        arguments += (torch.zeros(1, graph.hop * (example - 1)),)
        shapes += ({1: graph.hop * frames - graph.hop},)
    else:
        shapes += (None,)
        arguments += (None,)
    with torch.no_grad():
        program = torch.export.export(graph, arguments, dynamic_shapes=shapes)
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"metadata.json": json.dumps(dict(texts))})
    content = buffer.getvalue()
    loaded = torch.export.load(io.BytesIO(content)).module()

    def run(mel: Tensor) -> tuple[Tensor, Tensor]:
        shape = (1, graph.hop * (mel.size(2) - 1))
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            if graph.temp is None:
                noise = torch.randn(shape)
                return loaded(mel, noise), noise
            state = torch.get_rng_state()
            audio = loaded(mel, None)
            torch.set_rng_state(state)
            return audio, graph.temp * torch.randn(shape)

    return content, f"torch {torch.__version__}", run


# --- comparing --------------------------------------------------------------------------------------------------------


def _difference(run: Synthesis, model: FlowVocoder, config: Config, temp: float | None) -> float:
    """Largest difference from the audio of `FlowVocoder.reverse_fast`, over clips of several lengths."""
    data, height = config.data_config, config.waveflow_config.n_height
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for frames in FRAMES:
        mel = torch.rand(1, data.n_mel_channels, frames, generator=generator)
        mel = mel if data.use_dbmel else 8 * mel - 10  # log magnitudes such as speech has
        audio, noise = run(mel)
        expected = model.reverse_fast(mel, z=as_rows(noise, height))[:, : audio.size(1)]
        scale = max(1.0, expected.abs().max().item())
        difference = (audio - expected).abs().max().item() / scale
        worst = max(worst, difference if math.isfinite(difference) else math.inf)
    return worst


def as_rows(noise: Tensor, n_height: int) -> Tensor:
    """Noise [1, T] as `FlowVocoder.reverse` takes it, [1, 1, h, W], zeros completing the last column."""
    padded = torch.nn.functional.pad(noise, (0, -noise.size(1) % n_height))
    return padded.view(1, 1, -1, n_height).transpose(2, 3)
