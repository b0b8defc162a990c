"""NanoFlow and WaveFlow: one flow vocoder whose variants differ by what the flows share.

WaveFlow (Ping et al., ICML 2020) gives each flow its own estimator; NanoFlow (Lee et al., NeurIPS 2020) gives
one estimator to all of them, and tells it which flow it is working for:

    coupling_type       estimator   projection   flow embedding and gates
    waveflow            per flow    per flow
    waveflow_official   per flow    per flow     (as released: its flows couple before they permute)
    nanoflow_naive      shared      shared
    nanoflow_decomp     shared      per flow
    nanoflow            shared      per flow     yes
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from config import DataConfig, WaveFlowConfig
from fast.engine import engine_of
from fast.estimators import Execution, FastFlows, folded_flows
from harness.errors import InputError
from harness.memory import require_memory
from harness.settings import parse_section
from linear_prediction import LinearPrediction
from modules import (
    Affine,
    Estimator,
    Flow,
    FlowEmbedding,
    ReleasedFlow,
    Spline,
    Transform,
    Upsampler,
    WeightNorm,
    row_permutation,
    squeeze,
    unsqueeze,
)


class Sharing(NamedTuple):
    """Parts that all flows of a variant have in common."""

    estimator: bool
    projection: bool
    embedding: bool


SHARING = {
    "waveflow": Sharing(estimator=False, projection=False, embedding=False),
    "waveflow_official": Sharing(estimator=False, projection=False, embedding=False),
    "nanoflow_naive": Sharing(estimator=True, projection=True, embedding=False),
    "nanoflow_decomp": Sharing(estimator=True, projection=False, embedding=False),
    "nanoflow": Sharing(estimator=True, projection=False, embedding=True),
}
TRANSFORMS: dict[str, type[Transform]] = {"affine": Affine, "spline": Spline}


class FlowVocoder(nn.Module):
    """Mel spectrogram to speech by n_flow invertible steps; forward is data to noise.

    audio [B, T] in [-1, 1], mel [B, M, F]; T a multiple of n_height. With linear prediction, which needs to know what
    the mel's numbers mean (data_config), the flows see its residual in place of the audio.
    """

    def __init__(self, config: WaveFlowConfig, data_config: DataConfig | None = None) -> None:
        super().__init__()
        if config.linear_prediction and data_config is None:
            raise InputError(
                "linear_prediction needs to know how the mel is made: build_model(waveflow_config, data_config)"
            )
        self.config = config
        self.execution = Execution()  # how `forward` is computed, never what it gives
        shared = SHARING[config.coupling_type]
        n_flow = config.n_flow
        self.upsampler = Upsampler(config.upsample_strides)
        self.estimators = nn.ModuleList(Estimator(config) for _ in range(1 if shared.estimator else n_flow))
        self.transforms = nn.ModuleList(
            TRANSFORMS[config.transform](config) for _ in range(1 if shared.projection else n_flow)
        )
        self.flow_embedding, self.gates = None, None
        if shared.embedding:
            self.flow_embedding = FlowEmbedding(n_flow, config.size_flow_embed, config.use_weightnorm_embed)
            self.gates = nn.ParameterList(torch.ones(config.n_layer, config.res_channels) for _ in range(n_flow))
        self.linear_prediction = None
        if config.linear_prediction:
            self.linear_prediction = LinearPrediction(data_config, config.linear_prediction)

    def forward(self, audio: Tensor, mel: Tensor, context: int = 0) -> tuple[Tensor, Tensor]:
        """The change of variables of WaveFlow, eq. 2: z [B, 1, h, T/h] and log|det dz/dx| [B].

        context: samples at the start, a multiple of h, that are given: only linear prediction hears them, and z
        [B, 1, h, (T - context)/h] is that of the rest.
        """
        if audio.dim() != 2 or len(audio) != len(mel):
            raise InputError(
                f"audio of shape {list(audio.shape)} and mel of shape {list(mel.shape)}: expected [batch, samples] "
                "and [batch, bands, frames]"
            )
        with self.execution.products(audio):
            conditioning, log_det = self.condition(mel, audio.size(1), context), audio.new_zeros(len(audio))
            if self.linear_prediction is None:
                audio = audio[:, context:]
            else:
                audio, log_det = self.linear_prediction(audio, mel, context)
            x, flows = squeeze(audio.unsqueeze(1), self.config.n_height), self.flows()
            fast = None if self.execution.plain else FastFlows(flows, conditioning, self.execution)
            for flow in flows:
                x, flow_log_det = fast(flow, x) if fast else flow.forward(x, conditioning)
                log_det = log_det + flow_log_det
            return x, log_det

    @torch.no_grad()
    def reverse(self, mel: Tensor, temp: float = 1.0, z: Tensor | None = None) -> Tensor:
        """Inverse row by row, recomputing those above: the reference for `reverse_fast`. Returns audio [B, T'].

        Without z, noise of standard deviation temp and T' = hop * (F - 1); z [B, 1, h, T'/h] is used as it is.
        """
        x, length = self._noise(mel, temp, z)
        conditioning = self.condition(mel, x.size(2) * x.size(3))
        # Each row runs the estimator over all rows above it; what these do not change is folded once.
        flows = self.flows() if self.execution.plain else folded_flows(self.flows(), conditioning)
        for flow in reversed(flows):
            x = flow.inverse(x, conditioning)
        audio = unsqueeze(x).squeeze(1)
        if self.linear_prediction is not None:
            audio = self.linear_prediction.inverse(audio, mel)
        return audio[:, :length]

    @torch.no_grad()
    def reverse_fast(self, mel: Tensor, temp: float = 1.0, z: Tensor | None = None) -> Tensor:
        """Audio of `reverse` to 1e-4, through the engine of `fast/`; the model stays as it is."""
        noise, length = self._noise(mel, temp, z)
        return engine_of(self)(mel, noise)[:, :length]

    def initialise(self, audio: Tensor, mel: Tensor, context: int = 0) -> None:
        """Fit to a first batch what depends on data: the scale of the linear prediction, where there is one."""
        if self.linear_prediction is not None:
            self.linear_prediction.initialise(audio, mel, context)

    def flows(self) -> list[Flow]:
        """The flows in the order of the likelihood, with what the variant lets them share."""
        table = None if self.flow_embedding is None else self.flow_embedding.table()  # [n_flow, E]
        kind = ReleasedFlow if self.config.couples_first else Flow
        return [
            kind(
                index=index,
                permutation=permutation,
                order=order,
                estimator=self.estimators[index % len(self.estimators)],
                transform=self.transforms[index % len(self.transforms)],
                embedding=None if table is None else table[index],
                gates=None if self.gates is None else self.gates[index],
            )
            for index, (permutation, order) in enumerate(row_orders(self.config))
        ]

    def condition(self, mel: Tensor, n_samples: int, start: int = 0) -> Tensor:
        """Upsample, cut to samples from start to n_samples and squeeze: mel [B, M, F] -> [B, M, h, W].

        W = (n_samples - start) / h.
        """
        self._check_mel(mel)
        upsampled = self.upsampler(mel)
        if upsampled.size(2) < n_samples:
            raise InputError(
                f"a mel of {mel.size(2)} frames covers {upsampled.size(2)} samples, but the audio has {n_samples}"
            )
        return squeeze(upsampled[:, :, start:n_samples], self.config.n_height)

    def sample_noise(self, mel: Tensor, temp: float, generator: torch.Generator | None = None) -> Tensor:
        """z [B, 1, h, W] for a mel [B, M, F], of standard deviation temp; by a generator of the CPU.

        W = hop * (F - 1) / h, rounded up: where the height does not divide the hop, audio ends in up to h - 1 samples
        that are to be cut off.
        """
        self._check_mel(mel)
        n_samples = self.config.hop_length * (mel.size(2) - 1)
        if n_samples < 1:
            raise InputError(f"a mel of {mel.size(2)} frame(s) covers no audio; expected at least 2")
        shape = (len(mel), 1, self.config.n_height, -(-n_samples // self.config.n_height))
        return temp * torch.randn(shape, generator=generator).to(mel)

    def _noise(self, mel: Tensor, temp: float, z: Tensor | None) -> tuple[Tensor, int]:
        """Noise to start from, and the length of the audio that is wanted of it."""
        if z is None:
            return self.sample_noise(mel, temp), self.config.hop_length * (mel.size(2) - 1)
        if z.dim() != 4 or z.shape[:3] != (len(mel), 1, self.config.n_height):
            raise InputError(f"z of shape {list(z.shape)}: expected [{len(mel)}, 1, {self.config.n_height}, columns]")
        return z, z[0].numel()

    def _check_mel(self, mel: Tensor) -> None:
        if mel.dim() != 3 or mel.size(1) != self.config.cin_channels:
            raise InputError(f"mel of shape {list(mel.shape)}: expected [batch, {self.config.cin_channels}, frames]")


def build_model(
    waveflow_config: dict[str, Any] | WaveFlowConfig, data_config: dict[str, Any] | DataConfig | None = None
) -> FlowVocoder:
    """A freshly initialised vocoder from the `waveflow_config` section of an experiment file.

    With linear prediction also from its `data_config`, which says how the mel is made.
    """
    if data_config is not None:
        data_config = parse_section(DataConfig, data_config, "data_config.")
    config = parse_section(WaveFlowConfig, waveflow_config, "waveflow_config.")
    sizes = f"res_channels {config.res_channels}, n_layer {config.n_layer}, n_flow {config.n_flow}"
    require_memory(4.0 * config.weights_at_least, f"a model of {sizes}", "lower res_channels, n_layer or n_flow")
    return FlowVocoder(config, data_config)


def row_orders(config: WaveFlowConfig) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Row permutation of each flow, and the row order of the conditioning that its estimator sees.

    The permutations of the conditioning add up from flow to flow; tracking the order makes odd n_flow and any
    bipartite split right in both directions.
    """
    order = tuple(range(config.n_height))
    steps = []
    for index in range(config.n_flow):
        halves = config.bipartize and index >= config.n_flow / 2
        permutation = tuple(row_permutation(config.n_height, halves))
        before, order = order, tuple(order[row] for row in permutation)
        steps.append((permutation, before if config.couples_first else order))
    return steps


def count_parameters(model: FlowVocoder, synthesis: bool = False) -> int:
    """Trainable parameters.

    For synthesis, as published: weight norm folded, the embedding and its convolutions n_flow * L * 2R constants.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    if not synthesis:
        return total
    total -= sum(module.weight_g.numel() for module in model.modules() if isinstance(module, WeightNorm))
    if model.flow_embedding is not None:
        config = model.config
        total -= sum(parameter.numel() for parameter in model.flow_embedding.parameters())
        for layer in model.estimators[0].layers:
            total -= layer.embed_conv.weight_v.numel() + layer.embed_conv.bias.numel()
        total += config.n_flow * config.n_layer * 2 * config.res_channels
    return total
