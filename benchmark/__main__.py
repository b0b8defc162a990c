"""Speed of the vocoder, and its distance from what the machine can do. Every speed in the README comes from here.

    python -m benchmark                                     the published configs, every workload, float32 and bfloat16
    python -m benchmark -c configs/waveflow-h16-r64.json -w queue engine --json speed.json
    python -m benchmark -w train train_checkpointed --memory --batch 8
    python -m benchmark -c CONFIG --fidelity                the sound of a trained model in half precision

Workloads take turns, round by round, so that a busy machine disturbs all of them alike; medians are reported. FLOP
counts are those of the network computed directly, with what the engine never needs left out (`flop_per_sample`), so
an engine that computes the same with fewer may pass 100 % of the matrix peak, which is measured in the same rounds.
Peak memory is that of one run, the model and its inputs included, in a process of its own.
"""

if __name__ == "__main__":
    import harness.start  # noqa: F401

import argparse
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmark.fidelity import measure_fidelity
from benchmark.made_up import loader_speed
from benchmark.measuring import Measured, measure, summarise
from benchmark.memory import peak_memory
from benchmark.workloads import BUILDERS, CLIP_SECONDS, Bench, Conditions, has_workload, make_workloads, run_once
from config import load_config
from fast.engine import PRECISIONS, slow_precision_warning
from harness import terminal
from harness.arguments import Help, Parser, add_general, number, whole_number
from harness.devices import choose_device
from harness.errors import InputError
from harness.stopping import exit_status, leave

CONFIGS = [f"configs/{name}.json" for name in ("waveflow-h16-r64", "waveflow-h16-r128", "nanoflow-h16-r128-emb512")]
TRAINING = ("train_baseline", "train", "train_checkpointed")
BASELINES = {  # of the others: queue
    **dict.fromkeys(TRAINING, "train_baseline"),
    "linear_prediction": "engine",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    options = parse_arguments(arguments)
    return exit_status(lambda: _measure_all(options), quiet=options.quiet)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog="python -m benchmark", description=__doc__, formatter_class=Help)
    precisions, device = ["float32", "bfloat16"], "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument_group("what is measured").add_argument
    add("-c", "--configs", nargs="+", default=CONFIGS, metavar="FILE", help="experiment files")
    add("-w", "--workloads", nargs="+", default=list(BUILDERS), choices=list(BUILDERS), help="what to time")
    add("-p", "--precision", nargs="+", default=precisions, choices=list(PRECISIONS), help="of engine and train")
    add("--memory", action="store_true", help="measure peak memory, one run each, and no times")
    add("--loader", action="store_true", help="measure the training data loader on a made-up corpus, and nothing else")
    add("--fidelity", action="store_true", help="log-mel distances of half-precision synthesis from a trained run")
    add = parser.add_argument_group("conditions").add_argument
    seconds = "of a synthesized clip (reverse: 0.5 at most)"
    add("--seconds", type=number(0, above=True, maximum=3600), default=CLIP_SECONDS, metavar="S", help=seconds)
    add("--batch", type=whole_number(1, 2**12), default=1, metavar="N", help="clips at a time")
    add("--compile", action="store_true", help="train: with torch.compile, as train_config.compile")
    add("--repeats", type=whole_number(1, 10**6), default=5, metavar="N", help="rounds, after one to warm up")
    add("--threads", type=whole_number(1, 2**10), metavar="N", help="CPU threads (default: PyTorch's choice)")
    add("--device", type=_device, default=device, help="cpu, cuda or cuda:N (default: CUDA where there is any)")
    add("--tf32", action="store_true", help="allow TF32 in float32 products on CUDA")
    add("--json", metavar="FILE", help="write the figures here too")
    add_general(parser)
    return parser.parse_args(arguments)


def _device(text: str) -> torch.device:
    try:
        device = choose_device(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return torch.device("cuda", 0) if device == torch.device("cuda") else device  # one, where training would take all


def _measure_all(options: argparse.Namespace) -> None:
    names = ("device", "batch", "seconds", "compile", "threads", "tf32")
    conditions = Conditions(**{name: getattr(options, name) for name in names})
    conditions.set_up()
    machine = platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    report = {"torch": torch.__version__, "machine": machine, "device": str(options.device), "threads": threads}
    terminal.tell(f"{options.device}, {threads} thread(s), torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    chosen = _chosen(options.workloads, _fast_precisions(options.precision, options.device), options.device)
    models = {}
    for path in options.configs:
        bench = Bench(load_config(path), conditions)
        name = bench.config.waveflow_config.model_name
        if options.loader:
            terminal.say(f"{name}: {loader_speed(bench.config) / 1e6:.2f} M audio samples/s, 2 workers")
        elif options.fidelity:
            models[name] = {"fidelity": measure_fidelity(bench.config, options.device)}
        elif options.memory:
            models[name] = {"rows": _memory_of(bench, _of_model(bench, chosen))}
        else:
            models[name] = _times_of(bench, _of_model(bench, chosen), options.repeats)
    if options.json:
        Path(options.json).write_text(json.dumps({**report, "models": models}, indent=2) + "\n", encoding="utf-8")


def _fast_precisions(asked: Sequence[str], device: torch.device) -> list[str]:
    """Precisions asked for, but for those that would take hours here, where the engine would measure float32."""
    slow = {precision: warning for precision in asked if (warning := slow_precision_warning(precision, device))}
    for warning in slow.values():
        terminal.warn(warning)
    return [precision for precision in asked if precision not in slow] or ["float32"]


def _chosen(workloads: Sequence[str], precisions: Sequence[str], device: torch.device) -> list[tuple[str, str]]:
    """Workloads with the precisions that they have; the baselines have those of what is compared with them."""
    trained = ["float32", "bfloat16", *(["float16"] if device.type == "cuda" else [])]
    known = {"engine": precisions, "queue": precisions}
    known |= dict.fromkeys(["train_baseline", "train", "train_checkpointed"], trained)
    pairs = []
    for workload in workloads:
        own = [precision for precision in precisions if precision in known.get(workload, ["float32"])]
        pairs += [(workload, precision) for precision in own or ["float32"]]
    return pairs


def _of_model(bench: Bench, chosen: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Workloads that there are for a model; InputError where there is none."""
    found = [pair for pair in chosen if has_workload(bench.config, pair[0])]
    if not found:
        name = bench.config.waveflow_config.model_name
        raise InputError(
            f"{name} has no linear prediction to time; name a config with waveflow_config.linear_prediction"
        )
    return found


def _memory_of(bench: Bench, chosen: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    rows = []
    for workload, precision in chosen:
        peak = peak_memory(bench.conditions.device, run_once, bench, workload, precision)
        name = bench.config.waveflow_config.model_name
        terminal.say(f"{name}, {workload}, {precision}: peak memory {peak / 1e6:,.0f} MB")
        rows.append({"workload": workload, "precision": precision, "peak_memory_bytes": peak})
    return rows


def _times_of(bench: Bench, chosen: Sequence[tuple[str, str]], repeats: int) -> dict[str, Any]:
    device, rate = bench.conditions.device, bench.config.data_config.sampling_rate
    memory = [peak_memory(device, run_once, bench, *pair) for pair in chosen]
    measured = [Measured(one, peak) for one, peak in zip(make_workloads(bench, chosen), memory, strict=True)]
    peaks = measure(measured, repeats, device)
    named = {(one.workload.name, one.workload.precision): one for one in measured}
    rows = []
    for one in measured:
        baseline = named.get((BASELINES.get(one.workload.name, "queue"), one.workload.precision))
        arithmetic = bench.conditions.arithmetic(one.workload.name, one.workload.precision)
        rows.append({**summarise(one, peaks, baseline, rate), "arithmetic": arithmetic})
    _say_table(bench.config.waveflow_config.model_name, rows, peaks)
    return {"peaks": peaks, "load": os.getloadavg()[0], "rows": rows}


def _say_table(name: str, rows: list[dict[str, Any]], peaks: dict[str, float]) -> None:
    """A Markdown table."""
    shown = ", ".join(f"{precision} {peak / 1e9:.0f} GFLOP/s" for precision, peak in peaks.items())
    terminal.say(f"\n{name} (matrix peak: {shown})\n")
    terminal.say("| workload | arithmetic | kHz | x real time | GFLOP/s | % of peak | peak memory, MB | x baseline |")
    terminal.say("|---|---|---|---|---|---|---|---|")
    for row in rows:
        ratio = next((f"{value:.2f}" for key, value in row.items() if key.startswith("ratio_to_")), "")
        terminal.say(
            f"| {row['workload']} | {row['arithmetic']} | {row['samples_per_second'] / 1e3:.2f} | "
            f"{row['times_real_time']:.3f} | {row['flop_per_second'] / 1e9:.0f} | {row['percent_of_peak']:.0f} | "
            f"{row['peak_memory_bytes'] / 1e6:.0f} | {ratio} |"
        )


if __name__ == "__main__":
    leave(main())
