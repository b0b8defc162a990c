"""Glow and its shared-estimator relatives: one multi-scale flow whose types differ by what its steps share.

Glow (Kingma & Dhariwal, 2018) gives each step its own estimator; NanoFlow (Lee et al., NeurIPS 2020) gives one to
all K steps of a level, and tells it which step it is working for:

    model_type              estimator    depth     projection   indication and gates
    glow                    per step     shallow   per step
    glow_large              per step     deep      per step
    nanoflow_naive          per level    deep      per level
    nanoflow_decomp         per level    deep      per step
    nanoflow                per level    deep      per step     yes
    nanoflowalt_naive       per level    shallow   per level
    nanoflowalt_decomp      per level    shallow   per step
    nanoflowalt             per level    shallow   per step     yes
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from harness.errors import InputError, show
from harness.settings import Settings, Sizes, Switch, parse_section
from image_density_experiments.checkpoint import load_weights as load_weights
from image_density_experiments.memory import MEMORY_MODES
from image_density_experiments.modules import (
    COUPLINGS,
    BoundStep,
    Estimator,
    FlowIndication,
    FlowStep,
    Split,
    ZeroConv,
    ZeroLinear,
    gaussian_log_density,
    make_permutation,
    squeeze,
    unsqueeze,
)
from image_density_experiments.splits import MAX_CLASSES


class Depth(NamedTuple):
    """Kernel sizes of an estimator's layers and of the projection behind them."""

    layers: tuple[int, ...]
    projection: int


class Design(NamedTuple):
    """Parts that the steps of a level have in common, and the depth of their estimator."""

    shared_estimator: bool
    depth: Depth
    shared_projection: bool
    indication: bool


SHALLOW = Depth(layers=(3, 1), projection=3)
DEEP = Depth(layers=(3,) * 6, projection=1)
DESIGNS = {
    "glow": Design(shared_estimator=False, depth=SHALLOW, shared_projection=False, indication=False),
    "glow_large": Design(shared_estimator=False, depth=DEEP, shared_projection=False, indication=False),
    "nanoflow_naive": Design(shared_estimator=True, depth=DEEP, shared_projection=True, indication=False),
    "nanoflow_decomp": Design(shared_estimator=True, depth=DEEP, shared_projection=False, indication=False),
    "nanoflow": Design(shared_estimator=True, depth=DEEP, shared_projection=False, indication=True),
    "nanoflowalt_naive": Design(shared_estimator=True, depth=SHALLOW, shared_projection=True, indication=False),
    "nanoflowalt_decomp": Design(shared_estimator=True, depth=SHALLOW, shared_projection=False, indication=False),
    "nanoflowalt": Design(shared_estimator=True, depth=SHALLOW, shared_projection=False, indication=True),
}
GATES = 6  # allocated per step; nanoflowalt uses two, and keeps six so that counts and checkpoints agree
MAX_HIDDEN, MAX_STEPS, MAX_LEVELS, MAX_SIDE = 2**14, 2**10, 12, 2**12
MIN_SCALE, MAX_SCALE = 1e-6, 1e6
PERMUTATIONS = ("invconv", "shuffle", "reverse")


class ImageModelConfig(Settings):
    """The architecture, under the names of the published flags; image_shape is (H, W, C)."""

    model_type: Literal[*DESIGNS] = "nanoflow"
    image_shape: Sizes = (32, 32, 3)
    hidden_channels: int = Field(512, ge=1, le=MAX_HIDDEN)
    K: int = Field(32, ge=1, le=MAX_STEPS)
    L: int = Field(3, ge=1, le=MAX_LEVELS)
    actnorm_scale: float = Field(1.0, ge=MIN_SCALE, le=MAX_SCALE)
    flow_permutation: Literal[*PERMUTATIONS] = "invconv"
    flow_coupling: Literal[*COUPLINGS] = "affine"
    LU_decomposed: Switch = True
    flow_embed_dim: int = Field(1, ge=1, le=MAX_HIDDEN)
    learn_top: Switch = True
    y_condition: Switch = False
    y_classes: int = Field(10, ge=1, le=MAX_CLASSES)
    n_bits: int = Field(8, ge=1, le=8)

    @model_validator(mode="after")
    def _relations(self) -> Self:
        if len(self.image_shape) != 3 or min(self.image_shape) < 1 or max(self.image_shape) > MAX_SIDE:
            raise InputError(
                f"image_shape {show(list(self.image_shape))}: expected (height, width, channels), each 1 to {MAX_SIDE}"
            )
        height, width, _ = self.image_shape
        block = 2**self.L
        if height % block or width % block:
            raise InputError(
                f"images of {height}x{width} cannot be halved {self.L} times; expected height and width to be "
                f"multiples of 2^L = {block}, or a smaller L"
            )
        return self

    @property
    def design(self) -> Design:
        """The row of DESIGNS."""
        return DESIGNS[self.model_type]

    @property
    def weights_at_least(self) -> int:
        """Weights of the estimators and permutations, which are most of them."""
        hidden, depth, total = self.hidden_channels, self.design.depth, 0
        for level in range(self.L):
            channels, height, width = self.level_shape(level)
            first, *others = depth.layers
            estimator = hidden * (first**2 * channels // 2 + hidden * sum(kernel**2 for kernel in others))
            projection = depth.projection**2 * hidden * channels // 2
            total += estimator * (1 if self.design.shared_estimator else self.K)
            total += projection * (1 if self.design.shared_projection else self.K)
            total += channels**2 * self.K if self.flow_permutation == "invconv" else 0
            total += self.K * height * width * self.flow_embed_dim * 2**level if self.design.indication else 0
        return total

    def numbers_per_image(self, memory: str | None) -> float:
        """Numbers that an image takes at least: in a training step of that memory mode, or None: in a pass forward."""
        of_a_layer = [self.hidden_channels * math.prod(self.level_shape(level)[1:]) for level in range(self.L)]
        n_layers = len(self.design.depth.layers)
        if memory == "plain":  # what a layer gives, before and behind its normalisation; and what a step is given
            return 2 * self.K * (n_layers * sum(of_a_layer) + self.n_dims)
        steps = self.K * self.n_dims if memory == "checkpoint" else 2 * self.n_dims
        return 2 * max(of_a_layer) * (1 if memory is None else n_layers) + steps

    def describe(self) -> str:
        """Sizes that decide on memory, in words."""
        sizes = f"hidden_channels {self.hidden_channels}, K {self.K}, L {self.L}"
        return f"{self.model_type} of {sizes} for {self.image_shape[0]}x{self.image_shape[1]} pixels"

    @property
    def n_dims(self) -> int:
        """Numbers per image."""
        return math.prod(self.image_shape)

    def level_shape(self, level: int) -> tuple[int, int, int]:
        """(channels, height, width) of the steps of a level: squeezing makes C 4C, the split before it halves C."""
        height, width, channels = self.image_shape
        return channels * 2 ** (level + 2), height // 2 ** (level + 1), width // 2 ** (level + 1)


class Level(nn.Module):
    """Squeeze, K steps, and a split at all levels but the last."""

    def __init__(self, config: ImageModelConfig, level: int) -> None:
        super().__init__()
        design = config.design
        channels, height, width = config.level_shape(level)
        indication_channels = config.flow_embed_dim * 2**level if design.indication else 0
        inputs = channels // 2 + indication_channels
        self.coupling = COUPLINGS[config.flow_coupling]
        outputs = channels // 2 * self.coupling.params_per_channel
        self.steps = nn.ModuleList(
            FlowStep(
                channels,
                make_permutation(config.flow_permutation, channels, config.LU_decomposed),
                config.actnorm_scale,
                FlowIndication(indication_channels, height, width) if design.indication else None,
                nn.Parameter(torch.zeros(GATES, config.hidden_channels, 1, 1)) if design.indication else None,
            )
            for _ in range(config.K)
        )
        self.estimators = nn.ModuleList(
            Estimator(inputs, config.hidden_channels, design.depth.layers)
            for _ in range(1 if design.shared_estimator else config.K)
        )
        self.projections = nn.ModuleList(
            ZeroConv(config.hidden_channels, outputs, design.depth.projection)
            for _ in range(1 if design.shared_projection else config.K)
        )
        self.split = Split(channels) if level < config.L - 1 else None

    def forward(self, x: Tensor, memory: str) -> tuple[Tensor, Tensor | None, Tensor]:
        """x [B, C, H, W] -> what goes on, the noise that leaves here (None at the last level), log|det| [B]."""
        x, log_det = MEMORY_MODES[memory](self.bound_steps(), squeeze(x))
        if self.split is None:
            return x, None, log_det
        x, noise, split_log_det = self.split(x)
        return x, noise, log_det + split_log_det

    def inverse(self, x: Tensor, noise: Tensor | None) -> Tensor:
        """Bring what came on and what left back to the level's input."""
        if self.split is not None:
            x = self.split.inverse(x, noise)
        for step in reversed(self.bound_steps()):
            x = step.inverse(x)
        return unsqueeze(x)

    def bound_steps(self) -> list[BoundStep]:
        """The steps in order, each with what it owns or shares."""
        return [
            BoundStep(
                step,
                self.estimators[index % len(self.estimators)],
                self.projections[index % len(self.projections)],
                self.coupling,
            )
            for index, step in enumerate(self.steps)
        ]


class ImageFlow(nn.Module):
    """A density of images [B, C, H, W] quantised to n_bits and centred (`data.quantise`), in bits per dimension."""

    half: torch.dtype | None = None  # of the estimators' products, where they are not in full precision

    def __init__(self, config: ImageModelConfig) -> None:
        super().__init__()
        self.config = config
        self.memory = "plain"  # how the backward pass gets its activations, see memory.MEMORY_MODES
        self.levels = nn.ModuleList(Level(config, level) for level in range(config.L))
        channels = config.level_shape(config.L - 1)[0]
        self.top_prior = ZeroConv(2 * channels, 2 * channels, 3) if config.learn_top else None
        self.class_prior = ZeroLinear(config.y_classes, 2 * channels) if config.y_condition else None
        self.classifier = ZeroLinear(channels, config.y_classes) if config.y_condition else None

    def forward(
        self, x: Tensor, y_onehot: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Top latent z [B, C', H', W'], bits per dimension [B], and class logits [B, y_classes] or None.

        noise in [0, 2^-n_bits) fills the gaps between the quantised values (Theis et al., 2016); drawn if not given.
        """
        if self.half is None:
            return self._likelihood(x, y_onehot, noise)
        with torch.autocast(x.device.type, dtype=self.half):  # here, where each thread of nn.DataParallel comes by
            return self._likelihood(x, y_onehot, noise)

    def _likelihood(
        self, x: Tensor, y_onehot: Tensor | None, noise: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        latents, log_det = self.encode(x + (self.draw_noise(x) if noise is None else noise))
        *noises, z = latents
        objective = log_det - self.config.n_bits * math.log(2) * self.config.n_dims
        for left in noises:
            objective = objective + gaussian_log_density(left)
        objective = objective + gaussian_log_density(z, *self.prior(len(x), y_onehot))
        y_logits = None if self.classifier is None else self.classifier(z.mean(dim=(2, 3)))
        return z, -objective / (math.log(2) * self.config.n_dims), y_logits

    def encode(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Dequantised images to all their latents, the top one last, and log|det| [B]; `decode` is its inverse."""
        height, width, channels = self.config.image_shape
        if x.shape[1:] != (channels, height, width):
            raise InputError(f"images of shape {list(x.shape)}: expected [batch, {channels}, {height}, {width}]")
        latents, log_det = [], x.new_zeros(len(x))
        for level in self.levels:
            x, noise, level_log_det = level(x, self.memory)
            log_det = log_det + level_log_det
            if noise is not None:
                latents.append(noise)
        return [*latents, x], log_det

    @torch.no_grad()
    def decode(self, latents: Sequence[Tensor]) -> Tensor:
        """All latents, as from `encode`, to images [B, C, H, W]."""
        *noises, x = latents
        for level, noise in zip(reversed(self.levels), (None, *reversed(noises)), strict=True):
            x = level.inverse(x, noise)
        return x

    @torch.no_grad()
    def reverse(
        self, z: Tensor | None = None, y_onehot: Tensor | None = None, temperature: float = 1.0, n: int | None = None
    ) -> Tensor:
        """Images [n, C, H, W] from a top latent z, or from one drawn from the prior; n defaults to len(y_onehot), or 1.

        temperature scales the standard deviation of all that is drawn: the splits' noise, and the top if not given.
        """
        if z is None:
            n = (1 if y_onehot is None else len(y_onehot)) if n is None else n
            if n < 1:
                raise InputError(f"n {n}: expected at least 1 image")
            mean, log_std = self.prior(n, y_onehot)
            z = mean + torch.exp(log_std) * temperature * torch.randn(mean.shape).to(mean)
        channels, height, width = self.config.level_shape(self.config.L - 1)
        if z.shape[1:] != (channels, height, width):
            raise InputError(f"z of shape {list(z.shape)}: expected [n, {channels}, {height}, {width}]")
        noises = []
        for level in range(self.config.L - 1):
            channels, height, width = self.config.level_shape(level)
            noises.append(temperature * torch.randn(len(z), channels // 2, height, width).to(z))
        return self.decode([*noises, z])

    def prior(self, n: int, y_onehot: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation of n top latents, each [n, C', H', W']."""
        channels, height, width = self.config.level_shape(self.config.L - 1)
        like = self.levels[-1].steps[0].actnorm.logs
        params = like.new_zeros(1, 2 * channels, height, width)
        if self.top_prior is not None:
            params = self.top_prior(params)  # the published model learns it as a convolution of zeros
        if self.class_prior is not None:
            params = params + self.class_prior(self._checked(y_onehot, n))[:, :, None, None]
        return params.expand(n, -1, -1, -1).chunk(2, dim=1)

    def draw_noise(self, x: Tensor) -> Tensor:
        """Uniform dequantisation noise for x, from the CPU's generator so that it is the same on every device."""
        return torch.rand(x.shape).to(x) / 2**self.config.n_bits

    def _checked(self, y_onehot: Tensor | None, n: int) -> Tensor:
        expected = f"[{n}, {self.config.y_classes}]"
        if y_onehot is None:
            raise InputError(f"the model is conditioned on classes: expected y_onehot of shape {expected}, got none")
        if y_onehot.shape != (n, self.config.y_classes):
            raise InputError(f"y_onehot of shape {list(y_onehot.shape)}: expected {expected}")
        return y_onehot


def build_model(**options: Any) -> ImageFlow:
    """A freshly initialised model; the options are the fields of ImageModelConfig. Raises InputError."""
    return ImageFlow(parse_section(ImageModelConfig, options))


def count_parameters(model: nn.Module) -> int:
    """Trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
