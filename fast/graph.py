"""Twin of `FlowVocoder.reverse` for other programs: one function of tensors that `torch.export` can write down.

Rows of a flow are a scan, so that the graph does not grow with the height; flows and layers are written out. What a
layer must remember of the rows above travels through the scan as its state: the convolution queue of `cpu.py`, moved up
by a row at each step. Weights come folded from `folding.py`; those of a shared estimator are held once.

Linear prediction is a scan over frames. Each frame's filter answers an impulse first, all frames at once, and that
answer makes the frame one product. Filters follow from the mel as in `linear_prediction.py`, in float64, with the
inverse Fourier transform as a matrix of cosines and the Levinson-Durbin recursion as a scan over its steps.

One clip at a time. M mel bands, F frames, T = hop (F - 1) samples, h rows, W columns, R channels, P parameters of a
transform, p order of the prediction. `onnx_graph.py` writes the same modules as ONNX.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan

from fast.engine import Invertible
from fast.folding import FoldedFlow, FoldedLayer, fold_flows
from harness.errors import InputError
from linear_prediction import MAX_REFLECTION, PEAK_LIMIT, LinearPrediction
from modules import squeeze, unsqueeze


class SynthesisGraph(nn.Module):
    """Audio [1, T] of a mel [1, M, F], F at least 2, and noise [1, T], or standard normal noise times `temp`.

    Where h does not divide T, zeros stand for the noise of the samples that complete the last column.
    """

    def __init__(self, model: Invertible, temp: float | None = None) -> None:
        super().__init__()
        self.height, self.hop, self.temp = model.config.n_height, model.config.hop_length, temp
        if self.height > self.hop + 1:
            raise InputError(f"n_height {self.height}: more rows than a hop of {self.hop} samples are not exported")
        self.bands, self.upsampler = model.config.cin_channels, model.upsampler
        self.flows = nn.ModuleList(map(FlowGraph, reversed(fold_flows(model.flows(), torch.float32, _as_convolution))))
        self.prediction = model.linear_prediction and PredictionGraph(model.linear_prediction)

    def forward(self, mel: Tensor, noise: Tensor | None = None) -> Tensor:
        samples = self.hop * (mel.size(2) - 1)
        z = self.temp * torch.randn(1, samples) if noise is None else noise
        if self.hop % self.height:
            z = F.pad(z, (0, self.height - 1))[:, : -(-samples // self.height) * self.height]
        conditioning = squeeze(self.upsampler(mel)[:, :, : z.size(1)], self.height)
        conditioning = conditioning[0].transpose(0, 1)  # [h, M, W]
        x = squeeze(z.unsqueeze(1), self.height)[0, 0]  # [h, W]
        for flow in self.flows:
            x = flow(x, conditioning)
        audio = unsqueeze(x[None, None])[:, 0, :samples]
        return audio if self.prediction is None else self.prediction(audio, mel)


class FlowGraph(nn.Module):
    """The inverse of a flow: z [h, W], conditioning [h, M, W] of rows in their own order -> x [h, W]."""

    def __init__(self, flow: FoldedFlow) -> None:
        super().__init__()
        self.untouched, self.transform, self.n_params = flow.untouched, flow.transform, flow.n_params
        self.rows = len(flow.permutation)
        self.register_buffer("permutation", flow.permutation)
        self.register_buffer("order", torch.tensor(flow.order))
        self.register_buffer(
            "front", flow.front.t().clone(memory_format=torch.contiguous_format)
        )  # [R, 2], of x and of the mask
        self.register_buffer("offset", flow.offset[: self.n_params, None].clone())  # [P, 1]
        self.layers = nn.ModuleList(
            LayerGraph(layer, self.n_params, None if index else flow.entry) for index, layer in enumerate(flow.layers)
        )

    def forward(self, z: Tensor, conditioning: Tensor) -> Tensor:
        if self.untouched:
            z = z.index_select(0, self.permutation)
        nothing = torch.zeros_like(z[:1])
        # Two rows of x and two of the mask of what is no padding; then a queue for the input of each later layer.
        state = [z[:1].clone() if self.untouched else nothing, torch.cat([nothing] * 4)]
        for layer in self.layers[1:]:
            state.append(nothing.unsqueeze(0).expand(2 * layer.dilation[0], len(self.front), -1).clone())
        _, x = scan(self._row, tuple(state), (z[self.untouched :], conditioning.index_select(0, self.order)))
        return torch.cat([z[:1], x]) if self.untouched else x.index_select(0, self.permutation)

    def _row(self, state: tuple[Tensor, ...], inputs: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
        """The next row: state (x above [1, W], queues), inputs (z [W], conditioning [M, W]) -> state, x [W]."""
        (above, entry, *queues), (z, conditioning) = state, inputs
        inside = torch.ones_like(above)
        seen = torch.cat([entry[:2], above, entry[2:], inside])  # [6, W]
        hidden, grown = self.front @ torch.cat([above, inside]), [torch.cat([seen[1:3], seen[4:]])]
        params = self.offset
        for layer, queue in zip(self.layers, [None, *queues], strict=True):
            if queue is not None:
                seen = torch.cat([queue[0], queue[layer.dilation[0]], hidden])  # [3R, W]
                grown.append(torch.cat([queue[1:], hidden.unsqueeze(0)]))
            change, added = layer(seen, conditioning)
            params = params + added
            hidden = hidden if change is None else hidden + change
        x = self.transform.inverse(z.view(1, 1, 1, -1), params[None, :, None]).view(1, -1)
        return (x, *grown), x[0].clone()


class LayerGraph(nn.Module):
    """A gated layer for one row. The rows that it sees, as channels [n, W], and conditioning [M, W] -> the update of
    the hidden state [R, W], None of the last layer, and of the parameters [P, W]."""

    def __init__(self, layer: FoldedLayer, n_params: int, entry: Tensor | None) -> None:
        super().__init__()
        self.dilation, self.n_res = layer.dilation, len(layer.skip)
        gate = (
            layer.gate
            if entry is None
            else entry.view(6, 3, -1).permute(2, 0, 1).clone(memory_format=torch.contiguous_format)
        )
        self.register_buffer("gate", gate)  # [2R, n, 3]
        self.register_buffer(
            "conditioning", layer.conditioning[:-1].t().clone(memory_format=torch.contiguous_format)
        )  # [2R, M]
        self.register_buffer("gate_bias", layer.conditioning[-1].clone())  # [2R]
        skip, bias = layer.skip[:, :n_params], None
        if layer.residual is not None:
            bias = layer.residual[self.n_res, :, None].clone()
            skip = torch.cat([layer.residual[: self.n_res], skip], dim=1)
        self.register_buffer("bias", bias)  # [R, 1]
        self.register_buffer("out", skip.t().clone(memory_format=torch.contiguous_format))  # [R + P, R]

    def forward(self, seen: Tensor, conditioning: Tensor) -> tuple[Tensor | None, Tensor]:
        width = self.dilation[1]
        both = F.conv1d(seen.unsqueeze(0), self.gate, self.gate_bias, padding=width, dilation=width)[0]
        filters, gates = torch.sigmoid(both + self.conditioning @ conditioning).split(self.n_res)
        out = self.out @ ((1 - 2 * filters) * gates)
        return (None, out) if self.bias is None else (out[: self.n_res] + self.bias, out[self.n_res :])


class PredictionGraph(nn.Module):
    """The inverse of the linear prediction: residual [1, T], mel [1, M, F] -> audio [1, T]."""

    def __init__(self, prediction: LinearPrediction) -> None:
        super().__init__()
        order, hop, size = prediction.order, prediction.data.hop_length, prediction.data.filter_length
        self.prediction, self.order, self.hop = prediction, order, hop
        bins, lags = torch.arange(size // 2 + 1), torch.arange(order + 1)
        cosines = torch.cos(2 * math.pi / size * (torch.outer(bins, lags) % size).double())
        twice = torch.where((bins == 0) | (2 * bins == size), 1.0, 2.0).double()
        self.register_buffer("cosines", cosines * twice[:, None] / size)  # [K, p + 1], of the inverse transform
        self.register_buffer("impulse", F.one_hot(torch.tensor(0), hop).double())
        # Places of a step's reversed lags and predictors. Behind the predictors stand a row of zeros and one of -1.
        step, place = torch.arange(order)[:, None], torch.arange(order)
        turned = torch.where(place < step, step - 1 - place, torch.where(place == step, order + 1, order))
        self.register_buffer("lag_places", (step - place).clamp(min=0))  # [p, p]
        self.register_buffer("turned_places", turned)  # [p, p]
        # Places in a filter's answer, and in its coefficients, of matrices; behind the last stands a zero.
        row, column = torch.arange(hop)[:, None], torch.arange(hop)
        self.register_buffer("answer_places", torch.where(row >= column, row - column, hop))  # [hop, hop]
        row, column = torch.arange(min(order, hop))[:, None], torch.arange(order)
        past = torch.where(column >= row, row + order - column - 1, order)
        self.register_buffer("past_places", past)  # [min(hop, p), p]

    def forward(self, residual: Tensor, mel: Tensor) -> Tensor:
        lead, samples = self.hop // 2, residual.size(1)
        coefficients, gain = self._filters(mel)  # [F, p], [F]
        ends = (lead, self.hop - lead)  # of the first frame and the last, which the audio does not fill
        frames = F.pad(residual.double(), ends).view(-1, self.hop) * gain.unsqueeze(1)
        inside = F.pad(torch.ones_like(residual, dtype=torch.float64), ends).view(-1, self.hop)

        def answer(newest: Tensor, impulse: Tensor) -> tuple[Tensor, Tensor]:
            sample = impulse + (newest * coefficients).sum(1)  # [F]; the last p of them are the state
            return torch.cat([sample.unsqueeze(1), newest[:, :-1]], dim=1), sample

        _, answers = scan(answer, torch.zeros_like(coefficients), self.impulse)
        past = torch.zeros_like(coefficients[0])
        _, audio = scan(self._frame, past, (frames, coefficients, answers.t().contiguous(), inside))
        return audio.reshape(1, -1)[:, lead : lead + samples].to(residual.dtype)

    def _filters(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients [F, p] and gain [F]: `linear_prediction.levinson` as a scan over its steps."""
        lags = (self.prediction.power(mel.transpose(1, 2))[0] @ self.cosines).t().contiguous()  # [p + 1, F]
        ends = torch.stack([torch.zeros_like(lags[0]), -torch.ones_like(lags[0])])

        def step(state: tuple[Tensor, Tensor], inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, Tensor], Tensor]:
            (predictor, error), (lag, lag_places, turned_places) = state, inputs
            missing = lag - (predictor * lags.index_select(0, lag_places)).sum(0)
            reflection = (missing / error).clamp(-MAX_REFLECTION, MAX_REFLECTION)
            turned = torch.cat([predictor, ends]).index_select(0, turned_places)
            error = error * (1 - reflection.square())
            return (predictor - reflection * turned, error), error.clone()

        start = (torch.zeros_like(lags[1:]), lags[0].clone())
        (predictor, error), _ = scan(step, start, (lags[1:].clone(), self.lag_places, self.turned_places))
        return predictor.t().contiguous(), error.sqrt() * self.prediction.log_scale.double().exp()

    def _frame(self, past: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The next frame [hop] from its excitation, coefficients, answer and mask; past [p], oldest first."""
        excitation, coefficients, answer, inside = inputs
        heard = F.pad(coefficients, (0, 1))[self.past_places] @ past
        driven = excitation + F.pad(heard, (0, self.hop - len(self.past_places)))
        frame = F.pad(answer, (0, 1))[self.answer_places] @ driven
        peak = (frame * inside).abs().amax(0)
        frame = frame * torch.where(peak > PEAK_LIMIT, PEAK_LIMIT / peak, torch.ones_like(peak))
        return torch.cat([past, frame])[-self.order :].clone(), frame


def _as_convolution(taps: Tensor) -> Tensor:
    """Taps [3, 3, R, 2R], height by width, as a convolution along columns of three rows of channels: [2R, 3R, 3]."""
    return taps.permute(3, 0, 2, 1).flatten(1, 2).contiguous()
