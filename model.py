"""NanoFlow and WaveFlow: one flow vocoder whose variants differ by what the flows share.

WaveFlow (Ping et al., ICML 2020) gives each flow its own estimator; NanoFlow (Lee et al., NeurIPS 2020) gives
one estimator to all of them, and tells it which flow it is working for:

    coupling_type     estimator   projection   flow embedding and gates
    waveflow          per flow    per flow
    nanoflow_naive    shared      shared
    nanoflow_decomp   shared      per flow
    nanoflow          shared      per flow     yes
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config import WaveFlowConfig, section_from_dict
from fast.engine import SynthesisEngine
from fast.estimators import BoundEstimator, Estimator, WinogradEstimator
from fast.winograd import Workspace
from harness.errors import InputError
from modules import (
    Affine,
    FlowEmbedding,
    Spline,
    Upsampler,
    WeightNorm,
    permute_rows,
    row_permutation,
    shift_down,
    squeeze,
    unsqueeze,
)


class Sharing(NamedTuple):
    """What the flows of a variant have in common."""

    estimator: bool
    projection: bool
    embedding: bool


SHARING = {
    "waveflow": Sharing(estimator=False, projection=False, embedding=False),
    "nanoflow_naive": Sharing(estimator=True, projection=True, embedding=False),
    "nanoflow_decomp": Sharing(estimator=True, projection=False, embedding=False),
    "nanoflow": Sharing(estimator=True, projection=False, embedding=True),
}
TRANSFORMS = {"affine": Affine, "spline": Spline}


@dataclass
class Flow:
    """One invertible step of the vocoder: permute rows, shift down, estimate, transform every row.

    Made anew for each pass by `FlowVocoder.flows`, which knows what is shared; `order` is the row order that the
    conditioning has when this flow sees it.
    """

    index: int
    permutation: tuple[int, ...]
    order: tuple[int, ...]
    estimator: BoundEstimator | WinogradEstimator
    transform: Affine | Spline
    gates: Tensor | None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Data to noise: x [B, 1, h, W] -> z [B, 1, h, W], log|det| [B]."""
        x = permute_rows(x, self.permutation)
        params = self._params(shift_down(x), self.estimator.prepare(self.order))
        z, log_det = self.transform(x, params)
        return z, log_det.flatten(1).sum(1)

    def inverse(self, z: Tensor) -> Tensor:
        """Noise to data, one row after the other, recomputing the rows above each time."""
        x, prepared = torch.zeros_like(z), self.estimator.prepare(self.order)
        for row in range(z.size(2)):
            params = self._params(shift_down(x[:, :, : row + 1]), prepared)
            x[:, :, row : row + 1] = self.transform.inverse(z[:, :, row : row + 1], params[:, :, row:])
        return permute_rows(x, self.permutation)  # its own inverse

    def forward_recomputed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`forward`, keeping its input only and computing the rest again in the backward pass."""
        if self.estimator.keeps:
            self.estimator.prepare(self.order)  # made here, outside what is recomputed
        return checkpoint(self.forward, x, use_reentrant=False)

    def _params(self, shifted: Tensor, prepared: Tensor | list[Tensor]) -> Tensor:
        return self.estimator.params(shifted, prepared, self.index, self.gates, self.transform)


class FlowVocoder(nn.Module):
    """Mel spectrogram to speech by n_flow invertible steps; forward is data to noise.

    audio [B, T] in [-1, 1], mel [B, M, F]; T a multiple of n_height.
    """

    def __init__(self, config: WaveFlowConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = False  # keep one flow's activations at a time, recomputing them for gradients
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

    def forward(self, audio: Tensor, mel: Tensor) -> tuple[Tensor, Tensor]:
        """The change of variables of WaveFlow, eq. 2: z [B, 1, h, T/h] and log|det dz/dx| [B]."""
        if audio.dim() != 2 or len(audio) != len(mel):
            raise InputError(
                f"audio of shape {list(audio.shape)} and mel of shape {list(mel.shape)}: expected [batch, samples] "
                "and [batch, bands, frames]"
            )
        x = squeeze(audio.unsqueeze(1), self.config.n_height)  # [B, 1, h, W]
        log_det = x.new_zeros(len(x))
        recompute = self.checkpoint_activations and torch.is_grad_enabled()
        for flow in self.flows(self.condition(mel, audio.size(1)), workspace=Workspace()):
            x, flow_log_det = (flow.forward_recomputed if recompute else flow.forward)(x)
            log_det = log_det + flow_log_det
        return x, log_det

    @torch.no_grad()
    def reverse(self, mel: Tensor, temp: float = 1.0, z: Tensor | None = None) -> Tensor:
        """The plain inverse, recomputing each row: the reference for `reverse_fast`. Returns audio [B, T'].

        Without z, noise of standard deviation temp and T' = hop * (F - 1); z [B, 1, h, T'/h] is used as it is.
        """
        x = self._noise(mel, temp, z)
        for flow in self.flows(self.condition(mel, x.size(2) * x.size(3)), backwards=True):
            x = flow.inverse(x)
        return unsqueeze(x).squeeze(1)

    @torch.no_grad()
    def reverse_fast(self, mel: Tensor, temp: float = 1.0, z: Tensor | None = None) -> Tensor:
        """The same audio as `reverse`, through the convolution queue of `synthesis.py`; the model stays as it is."""
        return SynthesisEngine(self)(mel, self._noise(mel, temp, z))

    def flows(
        self, conditioning: Tensor, backwards: bool = False, workspace: Workspace | None = None
    ) -> Iterator[Flow]:
        """The flows in turn, sharing what the variant shares; conditioning [B, M, h, W]; workspace as in `bind`."""
        table = None if self.flow_embedding is None else self.flow_embedding.table()
        shared = len(self.estimators) == 1
        one_for_all = self.estimators[0].bind(conditioning, table, shared, workspace) if shared else None
        steps = list(enumerate(row_orders(self.config)))
        for index, (permutation, order) in reversed(steps) if backwards else steps:
            yield Flow(
                index=index,
                permutation=permutation,
                order=order,
                estimator=one_for_all or self.estimators[index].bind(conditioning, workspace=workspace),
                transform=self.transforms[index % len(self.transforms)],
                gates=None if self.gates is None else self.gates[index],
            )

    def condition(self, mel: Tensor, n_samples: int) -> Tensor:
        """Upsample, cut to the audio's length and squeeze: mel [B, M, F] -> [B, M, h, n_samples/h]."""
        self._check_mel(mel)
        upsampled = self.upsampler(mel)
        if upsampled.size(2) < n_samples:
            raise InputError(
                f"a mel of {mel.size(2)} frames covers {upsampled.size(2)} samples, but the audio has {n_samples}"
            )
        return squeeze(upsampled[:, :, :n_samples], self.config.n_height)

    def sample_noise(self, mel: Tensor, temp: float) -> Tensor:
        """z [B, 1, h, hop*(F-1)/h] for a mel [B, M, F], of standard deviation temp."""
        self._check_mel(mel)
        n_samples = self.config.hop_length * (mel.size(2) - 1)
        if n_samples < 1:
            raise InputError(f"a mel of {mel.size(2)} frame(s) covers no audio; expected at least 2")
        return temp * torch.randn(len(mel), 1, self.config.n_height, n_samples // self.config.n_height).to(mel)

    def _noise(self, mel: Tensor, temp: float, z: Tensor | None) -> Tensor:
        if z is None:
            return self.sample_noise(mel, temp)
        if z.dim() != 4 or z.shape[:3] != (len(mel), 1, self.config.n_height):
            raise InputError(f"z of shape {list(z.shape)}: expected [{len(mel)}, 1, {self.config.n_height}, columns]")
        return z

    def _check_mel(self, mel: Tensor) -> None:
        if mel.dim() != 3 or mel.size(1) != self.config.cin_channels:
            raise InputError(f"mel of shape {list(mel.shape)}: expected [batch, {self.config.cin_channels}, frames]")


def build_model(waveflow_config: dict[str, Any] | WaveFlowConfig) -> FlowVocoder:
    """A freshly initialised vocoder from the `waveflow_config` section of an experiment file."""
    return FlowVocoder(section_from_dict(WaveFlowConfig, waveflow_config, "waveflow_config."))


def row_orders(config: WaveFlowConfig) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """For each flow its row permutation, and the row order that the conditioning has once permuted.

    The permutations of the conditioning add up from flow to flow; tracking the order makes odd n_flow and any
    bipartite split right in both directions.
    """
    order = tuple(range(config.n_height))
    steps = []
    for index in range(config.n_flow):
        halves = config.bipartize and index >= config.n_flow / 2
        permutation = tuple(row_permutation(config.n_height, halves))
        order = tuple(order[row] for row in permutation)
        steps.append((permutation, order))
    return steps


def count_parameters(model: FlowVocoder, synthesis: bool = False) -> int:
    """Trainable parameters; for synthesis as published: weight norm folded, the embedding and its convolutions
    folded into n_flow * L * 2R constants."""
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
