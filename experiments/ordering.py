"""The paper's claim at small scale: nanoflow > decomp > naive, and nanoflow near waveflow with far fewer parameters."""

from experiments.claims import ORDER, Claim, change
from experiments.runs import Setting

COUPLINGS = {"waveflow": "waveflow", "nanoflow": "nanoflow", "decomp": "nanoflow_decomp", "naive": "nanoflow_naive"}


def _settings(order: int, suffix: str) -> list[Setting]:
    return [
        change(f"{name}{suffix}", coupling_type=coupling, linear_prediction=order)
        for name, coupling in COUPLINGS.items()
    ]


WITH = f" + lp {ORDER}"
CLAIM = Claim(
    name="ordering",
    question="Is nanoflow better than decomp, and decomp than naive; and how near is nanoflow to waveflow?",
    settings=(*_settings(ORDER, WITH), *_settings(0, "")),
    reference=f"nanoflow{WITH}",
    pairs=tuple(
        (f"{better}{suffix}", f"{worse}{suffix}")
        for suffix in (WITH, "")
        for better, worse in (("waveflow", "nanoflow"), ("nanoflow", "decomp"), ("decomp", "naive"))
    )
    + tuple((f"{name}{WITH}", name) for name in COUPLINGS),
)
