"""Changes that may make a model speak early, one at a time, to a nanoflow behind linear prediction, at equal steps."""

from experiments.claims import ORDER, Claim, change
from experiments.runs import Setting

REFERENCE = f"nanoflow + lp {ORDER}"


def _one(name: str, variant: str = "", cosine: bool = True, **changes: object) -> Setting:
    kept = {"coupling_type": "nanoflow", "linear_prediction": ORDER, **changes}
    return change(name, variant, cosine, **kept)


CLAIM = Claim(
    name="early",
    question="What helps at equal steps and batches, one change at a time?",
    settings=(
        _one(REFERENCE),
        _one("bipartite rows", bipartize=True),
        _one("Student-t noise", variant="student"),
        _one("learned gain of each frame", variant="gain"),
        _one("learned constants in the filter", variant="constants"),
        _one("learned correction of the bands", variant="bands"),
        _one("filters interpolated to half hops", variant="interpolated"),
        _one("crop context of a hop", train__crop_context=256),
        _one("dither", variant="dither"),
        _one("mel conditioner before upsampling", variant="conditioner"),
        _one("rank-1 adapters instead of gates", variant="adapters"),
        _one("8 flows of 3 layers", n_flow=8, n_layer=3),
        _one("height 32", n_height=32),
        _one("height 64", n_height=64),
        _one("order 24", linear_prediction=24),
        _one("order 64", linear_prediction=64),
        _one("order 256", linear_prediction=256),
        _one("no warm-up", train__warmup_steps=0),
        _one("no cosine", cosine=False),
        _one("no moving average", train__ema_decay=0),
        _one("separable, width 60", variant="separable", res_channels=60),  # the widest of no more parameters is 61
    ),
    reference=REFERENCE,
    seeds=1,
)
