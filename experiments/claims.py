"""A claim: settings that differ in one thing each, and what they are compared with."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.runs import Run, Setting

# Of all claims but where they say otherwise: the demo's model without what is to be shown.
BASE = {
    "train_config.lr_decay_step": "200000",
    "waveflow_config.bipartize": "false",
    "waveflow_config.linear_prediction": "0",
}
ORDER = 128  # of linear prediction, where there is one


@dataclass(frozen=True)
class Claim:
    """Settings to run, and the pairs whose difference is the claim."""

    name: str
    question: str
    settings: tuple[Setting, ...]
    reference: str  # setting that the others are compared with
    pairs: tuple[tuple[str, str], ...] = ()  # (better, worse) settings, as the claim says
    headlines: tuple[tuple[str, str], ...] = ()  # those of them that the README tells
    seeds: int = 3
    steps: int = 300

    def runs(self, data: Path, seeds: Sequence[int], steps: int) -> list[Run]:
        """All runs, a seed after the other, so that an interrupted series has whole seeds."""
        return [Run(setting, data, seed, steps) for seed in seeds for setting in self.settings]


def change(name: str, variant: str = "", cosine: bool = True, **changes: object) -> Setting:
    """BASE with changes of keys of `waveflow_config`, or of `train_config` where their names begin with `train__`."""
    values = dict(BASE)
    for key, value in changes.items():
        path = f"train_config.{key[7:]}" if key.startswith("train__") else f"waveflow_config.{key}"
        values[path] = str(value).lower() if isinstance(value, bool) else str(value)
    return Setting(name, tuple(f"{key}={value}" for key, value in sorted(values.items())), variant, cosine)
