"""torch.hub gives what Vocoder.from_pretrained does."""

import subprocess
import sys

from tests.support.experiments import ROOT

PROGRAM = """
import sys, torch
vocoder = torch.hub.load(sys.argv[1], "nanoflow", source="local", device="cpu")
audio = vocoder(torch.full((80, 4), -5.0), seed=0)
print(type(vocoder).__name__, vocoder.sampling_rate, tuple(audio.shape))
"""


def test_torch_hub_loads_the_weights_that_come_with_the_project(tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "Vocoder 22050 (768,)"
