"""Made-up speech at any rate."""

import numpy as np


def speech(seconds, rate, pitch):
    """Audio [T], float64: harmonics under a moving envelope, with a little noise."""
    time = np.arange(int(seconds * rate)) / rate
    harmonics = sum(np.sin(2 * np.pi * pitch * k * time) / k for k in range(1, 10))
    noise = np.random.default_rng(pitch).normal(0, 0.003, len(time))
    return 0.2 * harmonics * (0.6 + 0.4 * np.sin(2 * np.pi * 4 * time)) + noise
