"""The floor of every run: linear prediction alone, with one scale fitted to training clips and no flow behind it.

Its likelihood is that of a residual of white Gaussian noise, its speech its filter driven by such noise. Nothing that
is trained should be believed to have learned anything before it is above.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from config import Config, DataConfig
from data import ClipDataset, read_file_list
from experiments.claims import ORDER, change
from experiments.measures import LL_CLIPS, speech_of
from experiments.runs import RESULTS, Result, Run, Setting, add_result, read_results
from harness import terminal
from linear_prediction import LinearPrediction
from modules import gaussian_log_density

ORDERS = (12, 24, 64, 128, 256)
FITTED_CLIPS = 24


def setting_of(order: int) -> Setting:
    """Setting under which a floor stands in the table; no other has no variant of any model."""
    return Setting(f"linear prediction alone, order {order}", (f"waveflow_config.linear_prediction={order}",), "floor")


def floor_result(results: Mapping[tuple[str, str, int, int], Result], corpus: str, order: int) -> Result | None:
    """Row of the floor for runs of an order; for those without linear prediction, of the order that all claims use."""
    return results.get((setting_of(order or ORDER).text, corpus, 0, 0))


def measure_floors(data: Path, orders: tuple[int, ...] = ORDERS, results: Path = RESULTS) -> None:
    """Rows of the orders that are not in the table yet."""
    for order in orders:
        if floor_result(read_results(results), data.name, order) is None:
            result = floor_of(data, order)
            add_result(results, result)
            terminal.say(
                f"{result.name}: log-likelihood {result.test_ll:.4f}, log-mel distance {result.log_mel:.3f}, STOI "
                f"{result.stoi:.3f}"
            )


@torch.no_grad()
def floor_of(data: Path, order: int) -> Result:
    """Measure it, as a row of the table: seed 0, no steps."""
    config = Run(change("floor"), data, seed=0, steps=0).config()
    filtering = fitted(config, order)
    likelihoods = _likelihoods(filtering, config)
    speech = speech_of(lambda mel, temp: _noise_filtered(filtering, mel, temp, config.data_config), config)
    return Result(
        name=setting_of(order).name,
        corpus=data.name,
        seed=0,
        steps=0,
        test_ll=sum(likelihoods) / len(likelihoods),
        ll_clips=len(likelihoods),
        parameters=1,
        synthesis_parameters=1,
        multiply_adds=order,
        order=order,
        train_loss=float("nan"),
        seconds=0.0,
        cpu_seconds=0.0,
        precision="float32",
        settings=setting_of(order).text,
        **vars(speech),
    )


def fitted(config: Config, order: int) -> LinearPrediction:
    """The filter with the scale that fits some training clips best.

    Whole ones: a crop begins without the past that its first samples are predicted from, and what is left of those is
    so loud that a scale fitted to crops costs whole clips half a nat per sample.
    """
    filtering = LinearPrediction(config.data_config, order)
    clips = ClipDataset(read_file_list(config.data_config.training_files)[:FITTED_CLIPS], config.data_config)
    power, samples = 0.0, 0
    for _, audio, mel in (clips[index] for index in range(len(clips))):
        power += filtering(audio[None].double(), mel[None])[0].square().sum().item()
        samples += len(audio)
    filtering.log_scale.fill_(math.log(max(power / samples, 1e-30)) / 2)
    return filtering


def _likelihoods(filtering: LinearPrediction, config: Config) -> list[float]:
    clips, results = ClipDataset(read_file_list(config.data_config.test_files), config.data_config), []
    for _, audio, mel in (clips[index] for index in range(min(len(clips), LL_CLIPS))):
        residual, log_det = filtering(audio[None], mel[None])
        results.append((gaussian_log_density(residual) + log_det).item() / len(audio))
    return results


def _noise_filtered(filtering: LinearPrediction, mel: torch.Tensor, temp: float, data: DataConfig) -> torch.Tensor:
    noise = temp * torch.randn(1, (mel.size(1) - 1) * data.hop_length)
    return filtering.inverse(noise, mel[None])[0]
