"""The command line of checkpoint.py: what a file holds, the same weights in another format, a card for them."""

import argparse
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import checkpoint as ckpt
from checkpoint import Checkpoint
from config import Config, load_config
from evaluation.run_tables import read_mean_likelihood
from harness import terminal
from harness.arguments import Help, Parser, add_general, number
from harness.errors import MAX_SHOWN, InputError, one_line
from harness.files import RefusedFile, written_whole
from harness.safetensors_files import SUFFIX
from harness.stopping import exit_status
from jobs.export import SUFFIXES, export
from model import FlowVocoder, count_parameters
from synthesis.denoiser import silent_mel
from synthesis.mel_checks import MelStatistics
from training.optimisation import make_schedule, schedule_state
from vocoder import Vocoder, config_of, find_checkpoint, trained_model


def main(arguments: Sequence[str] | None = None) -> int:
    """`python checkpoint.py info | convert | export`; returns the exit status."""
    options = parser().parse_args(arguments)
    return exit_status(lambda: options.run(options), quiet=options.quiet)


def parser() -> argparse.ArgumentParser:
    """Flags of the commands."""
    first = __doc__.splitlines()[0]
    whole = Parser(prog="checkpoint.py", description=first, formatter_class=Help)
    commands = whole.add_subparsers(required=True, metavar="command")
    info = commands.add_parser("info", help="what a file holds, in a few lines")
    convert = commands.add_parser("convert", help="the same weights in another format")
    exported = commands.add_parser("export", help="synthesis for other programs: ONNX, or torch.export")
    for command in (info, convert, exported):
        command.add_argument("file", metavar="FILE", help="a checkpoint, a run's folder, or a name, as --weights takes")
        command.add_argument("-c", "--config", metavar="FILE", help="experiment file, for weights that know none")
    info.set_defaults(run=_info)
    convert.add_argument("out", metavar="OUT", help=f"*{SUFFIX}, or else a torch file of the published layout")
    convert.add_argument("--card", action="store_true", help="write a model card beside OUT, as Markdown")
    convert.set_defaults(run=_convert)
    exported.add_argument("out", metavar="OUT", help="*.onnx, or *.pt2 for torch.export.load")
    exported.add_argument("--noise", choices=["inside", "input"], default="inside", help="drawn inside, or an input")
    noise = "standard deviation of the noise inside; default 1"
    exported.add_argument("-t", "--temp", type=number(0), metavar="T", help=noise)
    exported.set_defaults(run=_export)
    for command in (convert, exported):
        command.add_argument("--data", type=_text, default="", metavar="TEXT", help="what the weights were trained on")
        command.add_argument("--licence", type=_text, default="", metavar="TEXT", help="of the weights")
    add_general(whole)
    for command in (info, convert, exported):
        command.formatter_class = Help
        add_general(command, top=False)
    return whole


def _text(given: str) -> str:
    """An argparse type: text that a file can hold."""
    try:
        return given.encode() and given
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{one_line(given, MAX_SHOWN)}: expected text in UTF-8") from None


# --- info -------------------------------------------------------------------------------------------------


def _info(options: argparse.Namespace) -> None:
    checkpoint = find_checkpoint(options.file, terminal.warn)
    for name, value in facts_of(checkpoint, _config(checkpoint, options.config)).items():
        terminal.say(one_line(f"{name + ':':16} {value}"))  # what a file tells of itself may be anyone's


def facts_of(checkpoint: Checkpoint, config: Config | None) -> dict[str, str]:
    """Lines about a file, by name."""
    kinds = sorted({str(value.dtype).removeprefix("torch.") for value in checkpoint.weights.values()})
    held = {"optimizer": checkpoint.optimizer, "schedule": checkpoint.scheduler, "moving average": checkpoint.average}
    facts = {
        "file": f"{checkpoint.path}, {os.path.getsize(checkpoint.path):,} bytes",
        "iteration": f"{checkpoint.iteration:,}",
        "weights": f"{sum(value.numel() for value in checkpoint.weights.values()):,} numbers, {', '.join(kinds)}",
        "also holds": ", ".join(name for name, entry in held.items() if entry is not None) or "nothing",
    }
    if config is None:
        facts["config"] = "none: give -c with every use of it, or convert it with one"
    else:
        data = config.data_config
        facts["model"] = _described(config)
        facts["mel"] = (
            f"{data.n_mel_channels} bands, {data.mel_fmin:g} to {data.mel_fmax:g} Hz, hop {data.hop_length}, "
            f"{data.sampling_rate} Hz{', decibels' if data.use_dbmel else ', natural log'}"
        )
    if (known := MelStatistics.read(checkpoint.mel_statistics)) is not None:
        facts["training mels"] = (
            f"mean {known.mean:.3f}, deviation {known.std:.3f}, {known.low:.2f} to {known.high:.2f}"
        )
    return {**facts, **checkpoint.facts}


def _described(config: Config) -> str:
    kind = config.waveflow_config
    return (
        f"{kind.coupling_type}{', bipartite' if kind.bipartize else ''}, {kind.n_flow} flows, height {kind.n_height}, "
        f"{kind.n_layer} layers of {kind.res_channels} channels, {kind.transform}"
        + (f", linear prediction of order {kind.linear_prediction}" if kind.linear_prediction else "")
    )


def _config(checkpoint: Checkpoint, path: str | None) -> Config | None:
    """The config given, or the file's own; None where it knows none."""
    known = checkpoint.config is not None or (checkpoint.path.parent / "config.json").is_file()
    if not (known or path):
        return None
    return config_of(checkpoint, load_config(path) if path else None, "give it with -c FILE")


# --- convert ----------------------------------------------------------------------------------------------


def _convert(options: argparse.Namespace) -> None:
    checkpoint, config, out = _source(options)
    card = out.with_name(out.name.removesuffix(SUFFIX) + ".md")
    if options.card:
        _check_new(card)
    model, facts = trained_model(checkpoint, config), _facts(checkpoint, options)
    if (known := MelStatistics.read(checkpoint.mel_statistics)) is not None:
        facts["mel_statistics"] = json.dumps(known.to_dict())
    text = model_card(checkpoint, config, model, facts) if options.card else ""  # all that can fail comes first
    if out.suffix == SUFFIX:
        ckpt.export_weights(out, model, config, checkpoint.iteration, facts)
    else:
        _save_published(out, model, config, checkpoint)
    terminal.say(f"{out}: {os.path.getsize(out):,} bytes")
    if text:
        with written_whole(card) as temporary:
            temporary.write_text(text, encoding="utf-8")
        terminal.say(f"model card: {card}")


def _source(options: argparse.Namespace) -> tuple[Checkpoint, Config, Path]:
    """Weights that are to become another file, their config, and the file, which is not there yet."""
    checkpoint, out = find_checkpoint(options.file, terminal.warn), Path(options.out)
    config = _config(checkpoint, options.config)
    if config is None:
        raise InputError(f"{options.file}: does not know its config; give it with -c, see configs/")
    _check_new(out)
    return checkpoint, config, out


def _check_new(path: Path) -> None:
    if os.path.lexists(path):
        raise InputError(f"{path}: exists; choose another name, or remove it")


def _facts(checkpoint: Checkpoint, options: argparse.Namespace) -> dict[str, str]:
    given = {"data": options.data, "license": options.licence}
    return {**checkpoint.facts, **{name: text for name, text in given.items() if text}}


def _save_published(out: Path, model: FlowVocoder, config: Config, checkpoint: Checkpoint) -> None:
    """A file that the published code takes up: its five entries, and our config.

    The optimizer has no moments: that code numbers its parameters in another order, and would take each for another's.
    """
    train = config.train_config
    optimizer = torch.optim.Adam(model.parameters(), lr=train.learning_rate)
    schedule = make_schedule(optimizer, train, checkpoint.iteration)
    ckpt.save_checkpoint(
        out,
        model,
        iteration=checkpoint.iteration,
        learning_rate=optimizer.param_groups[0]["lr"],
        optimizer=optimizer.state_dict(),
        scheduler=schedule_state(schedule, train),
        config=config.to_dict(),
        mel_statistics=checkpoint.mel_statistics,
    )


# --- export -----------------------------------------------------------------------------------------------


def _export(options: argparse.Namespace) -> None:
    if Path(options.out).suffix not in SUFFIXES:
        raise InputError(f"{options.out}: expected a name that ends with {' or '.join(SUFFIXES)}")
    if options.noise == "input" and options.temp is not None:
        raise InputError("--temp is that of noise inside; scale the noise that you give, or leave --noise input out")
    checkpoint, config, out = _source(options)
    temp = None if options.noise == "input" else 1.0 if options.temp is None else options.temp
    facts = {**_facts(checkpoint, options), "iteration": str(checkpoint.iteration), "model": _described(config)}
    compared = export(out, trained_model(checkpoint, config), config, temp, facts)
    inputs = f"mel [1, {config.data_config.n_mel_channels}, frames]"
    samples = f"{config.data_config.hop_length} * (frames - 1)"
    if temp is None:
        inputs += f", noise [1, {samples}]"
    terminal.say(f"{out}: {os.path.getsize(out):,} bytes; {inputs} -> audio [1, {samples}]")
    if compared is None:
        terminal.say(
            "not compared with the model: onnxruntime is not installed; install the packages of requirements-extra.txt"
        )
    else:
        terminal.say(f"largest difference from the model's audio, by {compared.program}: {compared.difference:.1e}")


# --- the card ---------------------------------------------------------------------------------------------

_CARD = """# {name}

{model}.

| | |
|---|---|
{rows}

```python
from vocoder import Vocoder

vocoder = Vocoder.from_pretrained({file})
audio = vocoder(mel)  # mel [{bands}, frames] -> audio [{hop} (frames - 1)] at {rate} Hz
```

Mel: natural log of Slaney mel magnitudes, floor 1e-5, {bands} bands from {fmin:g} to {fmax:g} Hz, window {window}
and hop {hop} at {rate} Hz{decibels}.
"""


def model_card(checkpoint: Checkpoint, config: Config, model: FlowVocoder, facts: Mapping[str, str]) -> str:
    """Markdown about trained weights; what is not known is said to be."""
    data = config.data_config
    rows = {
        "training data": facts.get("data", "not stated"),
        "licence of the weights": facts.get("license", "not stated"),
        "training steps": f"{checkpoint.iteration:,}",
        "log-likelihood": facts.get("likelihood") or _likelihood(checkpoint),
        "parameters": f"{count_parameters(model):,} ({count_parameters(model, synthesis=True):,} for synthesis)",
        "speed": _speed(model, config),
    }
    return _CARD.format(
        name=_plain(config.waveflow_config.model_name),
        model=_described(config),
        rows="\n".join(f"| {name} | {_plain(value)} |" for name, value in rows.items()),
        file=json.dumps(checkpoint.path.name),
        bands=data.n_mel_channels,
        hop=data.hop_length,
        rate=data.sampling_rate,
        fmin=data.mel_fmin,
        fmax=data.mel_fmax,
        window=data.win_length,
        decibels=", as decibels mapped to [0, 1]" if data.use_dbmel else "",
    )


def _plain(text: str) -> str:
    """A text that may be anyone's as Markdown shows it: in one line, and nothing in it a sign."""
    return re.sub(r"([\\`*_\[\]<>#|~&!])", r"\\\1", one_line(text))


def _likelihood(checkpoint: Checkpoint) -> str:
    """The mean that --evaluate left in the run's folder."""
    path = checkpoint.path.parent / "evaluation" / f"{checkpoint.name}.csv"
    try:
        mean, clips = read_mean_likelihood(path)
    except FileNotFoundError:
        return "not evaluated"
    except (OSError, RefusedFile) as error:
        told = getattr(error, "strerror", None) or error
        terminal.warn(f"{path}: {told}; the card says that the weights were not evaluated")
        return "not evaluated"
    return f"{mean:.4f} nats/sample (mean over {clips} test clips)"


def _speed(model: FlowVocoder, config: Config) -> str:
    """The speed of synthesizing a second on this machine's CPU."""
    data = config.data_config
    vocoder = Vocoder(model, data)
    frames = data.sampling_rate // data.hop_length + 1
    clip = vocoder.clip("a second", silent_mel(data, frames), temp=1.0, seed=0)
    began = time.perf_counter()
    samples = sum(len(sound.audio) for batch in vocoder.synthesize([clip]) for sound in batch)
    seconds = time.perf_counter() - began
    return f"{samples / data.sampling_rate / seconds:.2f} x real time, on {torch.get_num_threads()} CPU thread(s)"
