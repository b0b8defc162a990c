"""Flags of train.py, and which of them go with which job."""

import argparse
from collections.abc import Callable, Sequence

from harness.arguments import Help, Parser, add_general, number, whole_number
from synthesis.mel_matching import MAX_PASSES
from synthesis.mel_presets import PRESETS

TRAINING, EVALUATE, METRICS, SYNTHESIZE = "training", "--evaluate", "--evaluate --metrics", "--synthesize"
REPORT, CHECK = "--report", "--check_data"
_MODELS = (TRAINING, EVALUATE, METRICS, SYNTHESIZE)  # jobs that begin with the weights of a checkpoint
_SOUNDS = (METRICS, SYNTHESIZE)
# How long to train may stay behind a job: the same command line again, and what to do.
GOES_WITH = {
    "weights": _MODELS,
    "resume": _MODELS,
    "average_checkpoint": _MODELS,
    "epsilon": _MODELS,
    "warm_start": _MODELS,
    "input": _SOUNDS,
    "temp": _SOUNDS,
    "seed": _SOUNDS,
    "denoise": _SOUNDS,
    "precision": _SOUNDS,
    "match_mel": _SOUNDS,
    "output": (SYNTHESIZE, REPORT),
    "mel_preset": (SYNTHESIZE,),
    "format": (SYNTHESIZE,),
    "batch_seconds": (SYNTHESIZE,),
}


def job_of(options: argparse.Namespace) -> str:
    """The job that the flags ask for, as it is called in messages."""
    if options.report is not None:
        return REPORT
    if options.check_data:
        return CHECK
    if options.evaluate:
        return EVALUATE if options.metrics is None else METRICS
    return SYNTHESIZE if options.synthesize else TRAINING


def parse_arguments(description: str, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of the published train.py, and a few more."""
    parser = Parser(description=description, formatter_class=Help)
    add = parser.add_argument_group("model").add_argument
    add("-c", "--config", metavar="FILE", help="experiment file, see configs/; not needed with --weights")
    weights = "what to evaluate, synthesize or --warm_start with: a file, a run's folder, or a name"
    add("--weights", metavar="NAME_OR_PATH", help=weights)
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a config value")
    jobs = parser.add_argument_group("jobs other than training")
    job = jobs.add_mutually_exclusive_group().add_argument
    job("-v", "--evaluate", action="store_true", help="log-likelihood of the full test clips")
    job("-s", "--synthesize", action="store_true", help="synthesize every wav or mel of the test list, or each --input")
    job("--report", nargs="*", metavar="RUN_DIR", help="one HTML page about runs; without a folder, that of the config")
    job("--check_data", action="store_true", help="look for clips that would spoil the training, and do nothing else")
    others = "with --evaluate: metrics of copy-synthesis, beside other checkpoints and folders of sounds"
    jobs.add_argument("--metrics", nargs="*", metavar="PATH", help=others)
    add = parser.add_argument_group("where to start").add_argument
    add("-w", "--warm_start", action="store_true", help="take only the weights of the checkpoint, start at iteration 0")
    add("-a", "--average_checkpoint", type=whole_number(1), metavar="N", help="start from the average of the newest N")
    exponential = "with -a: exponential weights epsilon (1 - epsilon)^i instead of the mean"
    add("-e", "--epsilon", type=number(0, above=True, maximum=1, below=True), metavar="E", help=exponential)
    add("--resume", choices=["latest"], help="go on from the newest whole checkpoint of the run, if it has any")
    add = parser.add_argument_group("run").add_argument
    end = "stop training at iteration N (default: train_config.epochs)"
    add("--max_iterations", type=whole_number(1), metavar="N", help=end)
    hours = "save and end after H hours; --resume goes on (default: to the end)"
    add("--max_hours", type=number(0, above=True), metavar="H", help=hours)
    add("--deterministic", action="store_true", help="the same results twice on the same machine, at some speed")
    add("--device", help="cpu, cuda or cuda:N (default: CUDA where there is any)")
    _add_synthesis(parser.add_argument_group("with --synthesize").add_argument)
    add_general(parser)
    options = parser.parse_args(arguments)
    _check_combination(parser, options)
    return options


def _add_synthesis(add: Callable[..., object]) -> None:
    add("--input", nargs="+", metavar="PATH", help="sounds of any format and rate, mels (.npy, .pt), folders of both")
    output = "folder of the sounds, default one of the run; -: one sound to stdout; of --report: a file or folder"
    add("--output", metavar="DIR", help=output)
    add("--mel_preset", choices=list(PRESETS), metavar="NAME", help="front end of the mels: " + ", ".join(PRESETS))
    add("--format", choices=["wav", "flac"], help="of the sounds, 16 bits; default wav")
    noise = "standard deviation of the noise of synthesis, default 1; several make a folder each"
    add("-t", "--temp", type=number(0), nargs="+", action="extend", metavar="T", help=noise)
    add(
        "--seed",
        type=whole_number(0),
        metavar="N",
        help="of the first clip's noise, the next has N + 1; default: config",
    )
    add(
        "--denoise",
        type=number(0),
        metavar="STRENGTH",
        help="take off so much of what the model makes of silence (default 0)",
    )
    add("--precision", choices=["float32", "bfloat16", "float16"], help="of the products of synthesis, default float32")
    add(
        "--batch_seconds",
        type=number(0),
        metavar="S",
        help="seconds of audio at once, by default what suits; 0: a clip",
    )
    add(
        "--match_mel",
        type=whole_number(0, MAX_PASSES),
        metavar="N",
        help="filter each synthesis N times towards its mel (default 0)",
    )


def _check_combination(parser: Parser, options: argparse.Namespace) -> None:
    if options.metrics is not None and not options.evaluate:
        parser.error("--metrics are those of --evaluate; give it too")
    job = job_of(options)
    parser.refuse_unheeded(options, job, GOES_WITH)
    if job == METRICS and len(set(options.temp or ())) > 1:
        parser.error("--metrics are those of one temperature; give one value of --temp")
    if options.epsilon is not None and options.average_checkpoint is None:
        parser.error("--epsilon weights an average; give -a N with it")
    if not (options.config or options.weights or options.report):
        parser.error(
            "the following arguments are required: -c/--config, or --weights with a trained model, or --report with "
            "the folder of a run"
        )
    if options.set and not (options.config or options.weights):
        parser.error("--set overrides keys of a config; give it with -c, or leave --set out")
    _check_start(parser, options, trains=job == TRAINING)


def _check_start(parser: Parser, options: argparse.Namespace, trains: bool) -> None:
    """One place to start from; with --weights training has another, -c."""
    others = options.average_checkpoint is not None or options.warm_start
    if options.resume and others:
        parser.error("--resume, --average_checkpoint and --warm_start all say where to start; give one")
    if options.weights and trains and not (options.config and options.warm_start):
        parser.error(
            "--weights names what to --evaluate or --synthesize with, or with -c and --warm_start what to train from; "
            "to go on with a run give --resume latest or --set train_config.checkpoint_path=FILE"
        )
    if options.weights and (options.resume or options.average_checkpoint is not None or (others and not trains)):
        parser.error("--weights says which checkpoint; leave out --resume, --average_checkpoint and --warm_start")
