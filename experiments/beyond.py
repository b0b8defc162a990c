"""The best combination under nanoflow's budget, beside nanoflow: configs/nanoflow-h16-r128-lp128.json scaled down.

As the published config it comes from, scaled alike to the demo's size: both lose the same channels, layers and flows.
"""

from experiments.claims import ORDER, Claim, change

CLAIM = Claim(
    name="beyond",
    question="How much better is the best combination at equal steps, and how does the gain shrink with steps?",
    settings=(
        change("nanoflow", coupling_type="nanoflow"),
        change("best combination", coupling_type="nanoflow", linear_prediction=ORDER, bipartize=True),
    ),
    reference="nanoflow",
    pairs=(("best combination", "nanoflow"),),
    steps=600,
)
