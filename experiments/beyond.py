"""The best combination under nanoflow's budget, beside nanoflow: configs/nanoflow-h64-r128-lp256.json scaled down.

As the published config it comes from, scaled alike to the demo's size: both lose the same channels, layers and flows.
"""

from experiments.claims import Claim, change

BEST = "best combination"  # of what `early` found to help, one by one

CLAIM = Claim(
    name="beyond",
    question="How much better is the best combination at equal steps, and how does the gain shrink with steps?",
    settings=(
        change("nanoflow", coupling_type="nanoflow"),
        change(
            BEST,
            coupling_type="nanoflow",
            linear_prediction=256,
            n_height=64,
            bipartize=True,
            train__crop_context=256,
        ),
    ),
    reference="nanoflow",
    pairs=((BEST, "nanoflow"),),
    headlines=((BEST, "nanoflow"),),
    steps=600,
)
