"""The paper's claim at small scale: nanoflow > decomp > naive, and nanoflow near waveflow with far fewer parameters."""

from itertools import pairwise

from experiments.claims import ORDER, Claim, change
from experiments.runs import Setting

COUPLINGS = {"waveflow": "waveflow", "nanoflow": "nanoflow", "decomp": "nanoflow_decomp", "naive": "nanoflow_naive"}


def _settings(order: int, suffix: str) -> list[Setting]:
    return [
        change(f"{name}{suffix}", coupling_type=coupling, linear_prediction=order)
        for name, coupling in COUPLINGS.items()
    ]


def _order(suffix: str) -> list[tuple[str, str]]:
    names = [f"{name}{suffix}" for name in COUPLINGS]
    return list(pairwise(names))


WITH = f" + lp {ORDER}"
CLAIM = Claim(
    name="ordering",
    question="Is nanoflow better than decomp, and decomp than naive; and how near is nanoflow to waveflow?",
    settings=(*_settings(ORDER, WITH), *_settings(0, "")),
    reference=f"nanoflow{WITH}",
    pairs=(*_order(WITH), *_order(""), *((f"{name}{WITH}", name) for name in COUPLINGS)),
    headlines=(*_order(""), (f"nanoflow{WITH}", "nanoflow")),
)
