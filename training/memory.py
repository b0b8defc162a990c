"""Memory that a vocoder's training takes at least, asked for before it is taken."""

import torch

from config import Config
from harness.memory import require_memory
from harness.processes import world_size

BYTES_PER_WEIGHT = 16  # itself, its gradient and Adam's two moments
KEPT = {"cpu": 3, "cuda": 1}  # of each layer for the backward pass, in its residual channels; measured on a CPU: 3.4


def check_memory(config: Config, device: torch.device) -> None:
    """InputError where a training step takes more memory than the device has left."""
    train, data, model = config.train_config, config.data_config, config.waveflow_config
    devices = torch.cuda.device_count() if device.type == "cuda" and world_size() == 1 else world_size()
    samples = train.batch_size * (data.segment_length - train.crop_context) / train.accumulation_steps / max(1, devices)
    layers = model.n_layer * (1 if train.checkpoint_activations else model.n_flow)
    kept = KEPT[device.type] * layers * model.res_channels * samples * (2 if train.fp16_run else 4)
    crops = 4.0 * train.batch_size * data.segment_length / world_size()
    require_memory(
        BYTES_PER_WEIGHT * model.weights_at_least + kept + crops,
        f"training {model.model_name} with res_channels {model.res_channels}, n_flow {model.n_flow}, n_layer "
        f"{model.n_layer} on batches of {train.batch_size} x {data.segment_length} samples",
        "lower batch_size, segment_length or res_channels, raise accumulation_steps, or set checkpoint_activations",
        device,
    )
