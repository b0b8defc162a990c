"""How fast the vocoder is, and how near to what the machine can do. Every speed in the README comes from here.

    python benchmark.py                                     the published configs, every workload, float32 and bfloat16
    python benchmark.py -c configs/waveflow-h16-r64.json -w queue engine --json speed.json
    python benchmark.py -w train train_checkpointed --memory --batch 8
    python benchmark.py -c CONFIG --fidelity                the sound of a trained model in half precision

Workloads take turns, round by round, so that a busy machine disturbs all of them alike; medians are reported. FLOP
counts are those of the network computed directly, with what the engine never needs left out (`flop_per_sample`), so
an engine that computes the same with fewer may pass 100 % of the matrix peak, which is measured in the same rounds.
Peak memory is that of one run, the model and its inputs included, in a process of its own.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmark.fidelity import measure_fidelity
from benchmark.memory import peak_memory
from benchmark.workloads import SEGMENT, baseline_step, checkpointed_step, loader_speed, training_step
from config import Config, WaveFlowConfig, load_config
from fast.engine import PRECISIONS, SynthesisEngine, slow_precision_warning
from fast.folding import EstimatorWeights, fold_estimators
from harness.stopping import exit_status
from model import Flow, FlowVocoder, build_model
from modules import unsqueeze

CONFIGS = [f"configs/{name}.json" for name in ("waveflow-h16-r64", "waveflow-h16-r128", "nanoflow-h16-r128-emb512")]
CLIP_SECONDS = 6.5  # the mean clip of LJSpeech
SLOW_SECONDS = 0.5  # of `reverse`, which does n_height times the work
PEAK_SIZE = 2048


# --- the baseline -----------------------------------------------------------------------------------------


@torch.no_grad()
def eager_conv_queue(model: FlowVocoder, mel: Tensor, z: Tensor) -> Tensor:
    """The published synthesis (Paine et al., 2016; WaveFlow, section 3.3), plainly: audio [B, h*W].

    Each layer keeps its last 2 dilation_h input rows; per row and layer one convolution over three rows, one of the
    conditioning row, the gate, and one convolution for residual and skip.
    """
    x, conditioning = z, model.condition(mel, z.size(2) * z.size(3))
    flows = model.flows()
    folded = fold_estimators(flows)
    for flow in reversed(flows):
        x = _invert_flow(flow, folded[flow.estimator], x, conditioning[:, :, list(flow.order)])
    return unsqueeze(x).squeeze(1)


def _invert_flow(flow: Flow, weights: EstimatorWeights, z: Tensor, conditioning: Tensor) -> Tensor:
    n_res = len(weights.front[1])
    queues = [[z.new_zeros(len(z), n_res, 1, z.size(3))] * (2 * dh) for dh, _ in weights.dilations]
    if flow.couples_first:
        z = z[:, :, list(flow.permutation)]
    rows = [z[:, :, :1] if flow.couples_first else torch.zeros_like(z[:, :, :1])]
    for row in range(int(flow.couples_first), z.size(2)):
        features = _row_features(flow, weights, rows[-1], conditioning[:, :, row : row + 1], queues)
        rows.append(flow.transform.inverse(z[:, :, row : row + 1], flow.transform.project(features)))
    return torch.cat(rows if flow.couples_first else [rows[1 + row] for row in flow.permutation], dim=2)


def _row_features(
    flow: Flow, weights: EstimatorWeights, previous: Tensor, conditioning: Tensor, queues: list[list[Tensor]]
) -> Tensor:
    hidden, features = F.conv2d(previous, *weights.front), 0
    for index, (layer, (dh, dw), queue) in enumerate(zip(weights.layers, weights.dilations, queues, strict=True)):
        rows = torch.cat([queue[0], queue[dh], hidden], dim=2)  # [B, R, 3, W]
        queue.append(hidden)
        queue.pop(0)
        both = F.conv2d(rows, layer.gate, layer.bias_of(flow.index), padding=(0, dw), dilation=(1, dw))
        both = both + F.conv2d(conditioning, layer.conditioning, layer.conditioning_bias)
        filters, gates = both.chunk(2, dim=1)
        out = F.conv2d(torch.tanh(filters) * torch.sigmoid(gates), layer.res_skip, layer.res_skip_bias)
        residual, skip = out.chunk(2, dim=1)
        features = features + skip
        if flow.gates is None:
            hidden = (hidden + residual) * weights.residual_scale
        else:
            hidden = hidden + residual * flow.gates[index].view(-1, 1, 1)
    return features


# --- workloads: name -> what to run, and how many samples of audio that is ------------------------------------


@dataclass
class Workload:
    """One thing to time. `flop` counts floating-point operations of one run; 0 where no count is meant."""

    name: str
    run: Callable[[], Any]
    samples: int
    flop: float
    precision: str
    seconds: list[float] = field(default_factory=list)
    peak_memory: int = 0


def flop_per_sample(config: WaveFlowConfig) -> float:
    """Operations (multiply-add = 2) for one audio sample of synthesis or of the likelihood, computed directly.

    The 3x3 and residual products, the skip branch merged with an affine projection, and the conditioning once per
    estimator.
    """
    n_res, n_layer = config.res_channels, config.n_layer
    flow = n_layer * 18 * n_res**2 + (n_layer - 1) * n_res**2 + n_layer * n_res * 2
    estimators = config.n_flow if config.coupling_type == "waveflow" else 1
    return 2.0 * (config.n_flow * flow + estimators * n_layer * config.cin_channels * 2 * n_res)


def make_workloads(
    config: WaveFlowConfig, chosen: Sequence[tuple[str, str]], options: argparse.Namespace
) -> list[Workload]:
    """Those chosen by name and precision, on one model; random weights: speed does not depend on what they are."""
    torch.manual_seed(0)
    model = build_model(config).to(options.device)
    flop = flop_per_sample(config)
    workloads = []
    for name, precision in chosen:
        run, samples, work = BUILDERS[name](model, options, precision)
        workloads.append(Workload(name, run, samples, work * samples * flop, precision))
    return workloads


def _precisions(workload: str, options: argparse.Namespace) -> list[str]:
    """Those asked for, where the workload has them: training knows one half precision for each kind of device."""
    half = "float16" if options.device.type == "cuda" else "bfloat16"
    trained = ["float32", half]
    known = {"engine": options.precision, "train": trained, "train_checkpointed": trained}.get(workload, ["float32"])
    return [precision for precision in options.precision if precision in known] or ["float32"]


def _clip(model: FlowVocoder, seconds: float, batch: int) -> tuple[Tensor, Tensor]:
    """A mel [B, M, F] and noise [B, 1, h, W] for at least `seconds` of audio at 22,050 Hz."""
    hop = model.config.hop_length
    frames = max(2, round(seconds * 22_050 / hop) + 1)
    device = next(model.parameters()).device
    mel = torch.randn(batch, model.config.cin_channels, frames, device=device)
    return mel, model.sample_noise(mel, 1.0)


def _forward(model: FlowVocoder, options: argparse.Namespace, _precision: str) -> tuple[Callable, int, float]:
    mel, _ = _clip(model, SEGMENT / 22_050, options.batch)
    audio = torch.randn(options.batch, model.config.hop_length * (mel.size(2) - 1), device=mel.device)

    @torch.no_grad()
    def run() -> None:
        model(audio, mel)

    return run, audio.numel(), 1.0


def _reverse(model: FlowVocoder, options: argparse.Namespace, _precision: str) -> tuple[Callable, int, float]:
    mel, z = _clip(model, min(SLOW_SECONDS, options.seconds), options.batch)
    rows = (model.config.n_height + 1) / 2  # each row recomputes those above
    return lambda: model.reverse(mel, z=z), z.numel(), rows


def _queue(model: FlowVocoder, options: argparse.Namespace, _precision: str) -> tuple[Callable, int, float]:
    mel, z = _clip(model, options.seconds, options.batch)
    return lambda: eager_conv_queue(model, mel, z), z.numel(), 1.0


def _engine(model: FlowVocoder, options: argparse.Namespace, precision: str) -> tuple[Callable, int, float]:
    mel, z = _clip(model, options.seconds, options.batch)
    engine = SynthesisEngine(model, precision=precision)
    return lambda: engine(mel, z), z.numel(), 1.0


BUILDERS = {
    "forward": _forward,
    "train_baseline": baseline_step,
    "train": training_step,
    "train_checkpointed": checkpointed_step,
    "reverse": _reverse,
    "queue": _queue,
    "engine": _engine,
}


BASELINES = dict.fromkeys(["train_baseline", "train", "train_checkpointed"], "train_baseline")  # of the others: queue


# --- measuring ----------------------------------------------------------------------------------------------


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one run, the device's queue drained before and after."""
    _synchronize(device)
    began = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - began


def matrix_peak(precision: str, device: torch.device, size: int = PEAK_SIZE) -> float:
    """FLOP/s of a large matrix product, the best of three."""
    a, b = torch.randn(2, size, size, device=device).to(PRECISIONS[precision])
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    return 2 * size**3 / min(timed(lambda: torch.mm(a, b, out=out), device) for _ in range(3))


def measure(workloads: list[Workload], repeats: int, device: torch.device) -> dict[str, float]:
    """Time all workloads in turn, `repeats` rounds after one to warm up; returns the matrix peak by precision."""
    precisions = sorted({workload.precision for workload in workloads})
    peaks = dict.fromkeys(precisions, 0.0)
    for workload in workloads:
        workload.run()
    for _ in range(repeats):
        for precision in precisions:
            peaks[precision] = max(peaks[precision], matrix_peak(precision, device))
        for workload in workloads:
            workload.seconds.append(timed(workload.run, device))
    return peaks


def run_once(config: WaveFlowConfig, name: str, precision: str, options: argparse.Namespace) -> None:
    """Make a workload and run it: what its peak memory is that of."""
    _set_up(options)
    [workload] = make_workloads(config, [(name, precision)], options)
    workload.run()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- reporting ----------------------------------------------------------------------------------------------


def summarise(workload: Workload, peaks: dict[str, float], baseline: Workload | None, rate: int) -> dict[str, Any]:
    """One row of the table."""
    seconds = statistics.median(workload.seconds)
    flop_rate = workload.flop / seconds
    row = {
        "workload": workload.name,
        "precision": workload.precision,
        "samples": workload.samples,
        "seconds": seconds,
        "fastest_seconds": min(workload.seconds),
        "samples_per_second": workload.samples / seconds,
        "times_real_time": workload.samples / seconds / rate,
        "flop_per_second": flop_rate,
        "percent_of_peak": 100 * flop_rate / peaks[workload.precision],
        "peak_memory_bytes": workload.peak_memory,
    }
    if baseline is not None:
        row[f"ratio_to_{baseline.name}"] = _ratio(workload, baseline)
    return row


def _ratio(workload: Workload, baseline: Workload) -> float:
    # Round by round, so that a machine that is busy for a while slows both sides of a ratio.
    pairs = zip(workload.seconds, baseline.seconds, strict=True)
    per_sample = workload.samples / baseline.samples
    return statistics.median(base / seconds * per_sample for seconds, base in pairs)


def print_table(name: str, rows: list[dict[str, Any]], peaks: dict[str, float]) -> None:
    """A Markdown table."""
    shown = ", ".join(f"{precision} {peak / 1e9:.0f} GFLOP/s" for precision, peak in peaks.items())
    print(f"\n{name} (matrix peak: {shown})\n")
    print("| workload | precision | kHz | x real time | GFLOP/s | % of peak | peak memory, MB | x baseline |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        ratio = next((f"{value:.2f}" for key, value in row.items() if key.startswith("ratio_to_")), "")
        print(
            f"| {row['workload']} | {row['precision']} | {row['samples_per_second'] / 1e3:.2f} | "
            f"{row['times_real_time']:.3f} | {row['flop_per_second'] / 1e9:.0f} | {row['percent_of_peak']:.0f} | "
            f"{row['peak_memory_bytes'] / 1e6:.0f} | {ratio} |"
        )


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-c", "--configs", nargs="+", default=CONFIGS, metavar="FILE", help="experiment files")
    add("-w", "--workloads", nargs="+", default=list(BUILDERS), choices=list(BUILDERS), help="what to time")
    add(
        "-p",
        "--precision",
        nargs="+",
        default=["float32", "bfloat16"],
        choices=list(PRECISIONS),
        help="of engine and train",
    )
    add("--seconds", type=float, default=CLIP_SECONDS, help="length of the synthesized clip (reverse: 0.5 at most)")
    add("--batch", type=int, default=1, help="clips at a time")
    add("--compile", action="store_true", help="train: with torch.compile, as train_config.compile")
    add("--memory", action="store_true", help="measure peak memory, one run each, and no times")
    add("--loader", action="store_true", help="measure the training data loader on a made-up corpus, and nothing else")
    add("--fidelity", action="store_true", help="log-mel distances of half-precision synthesis from a trained run")
    add("--repeats", type=int, default=5, help="rounds, after one to warm up")
    add("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    add("--device", type=torch.device, default=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    add("--tf32", action="store_true", help="allow TF32 in float32 products on CUDA")
    add("--json", metavar="FILE", help="write the figures here too")
    options = parser.parse_args(arguments)
    for flag, value in (("--seconds", options.seconds), ("--batch", options.batch), ("--repeats", options.repeats)):
        if not value > 0:
            parser.error(f"{flag} {value}: expected a number above 0")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads {options.threads}: expected at least 1")
    return options


def _fast_precisions(asked: Sequence[str], device: torch.device) -> list[str]:
    """Those asked for, without those that would take hours here; the engine would measure float32 in their place."""
    slow = {precision: warning for precision in asked if (warning := slow_precision_warning(precision, device))}
    for warning in slow.values():
        print(f"warning: {warning}", file=sys.stderr)
    return [precision for precision in asked if precision not in slow] or ["float32"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    options = parse_arguments(arguments)
    return exit_status(lambda: _measure_all(options))


def _set_up(options: argparse.Namespace) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = options.tf32


def _measure_all(options: argparse.Namespace) -> None:
    _set_up(options)
    options.precision = _fast_precisions(options.precision, options.device)
    report = {
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "device": str(options.device),
        "threads": torch.get_num_threads(),
        "models": {},
    }
    print(f"{report['device']}, {report['threads']} thread(s), torch {report['torch']}, load {os.getloadavg()[0]:.1f}")
    for path in options.configs:
        config = load_config(path)
        name = config.waveflow_config.model_name
        if options.loader:
            print(f"{name}: {loader_speed(config) / 1e6:.2f} M audio samples/s, 2 workers")
        elif options.fidelity:
            report["models"][name] = {"fidelity": measure_fidelity(config, options.device)}
        else:
            report["models"][name] = _measure_model(config, options)
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _measure_model(config: Config, options: argparse.Namespace) -> dict[str, Any]:
    name, rate = config.waveflow_config.model_name, config.data_config.sampling_rate
    chosen = [(workload, precision) for workload in options.workloads for precision in _precisions(workload, options)]
    memory = []
    for workload, precision in chosen:
        arguments = config.waveflow_config, workload, precision, options
        memory.append(peak_memory(options.device, run_once, *arguments))
        if options.memory:
            print(f"{name}, {workload}, {precision}: peak memory {memory[-1] / 1e6:,.0f} MB", flush=True)
    if options.memory:
        pairs = zip(chosen, memory, strict=True)
        return {"rows": [{"workload": w, "precision": p, "peak_memory_bytes": peak} for (w, p), peak in pairs]}
    workloads = make_workloads(config.waveflow_config, chosen, options)
    for one, peak in zip(workloads, memory, strict=True):
        one.peak_memory = peak
    peaks = measure(workloads, options.repeats, options.device)
    found = {workload.name: workload for workload in workloads}
    rows = [summarise(one, peaks, found.get(BASELINES.get(one.name, "queue")), rate) for one in workloads]
    print_table(name, rows, peaks)
    return {"peaks": peaks, "load": os.getloadavg()[0], "rows": rows}


if __name__ == "__main__":
    sys.exit(main())
