"""The published synthesis, plainly: what the engine's speed is compared with."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fast.folding import EstimatorWeights, fold_estimators
from model import FlowVocoder
from modules import Flow, unsqueeze


@torch.no_grad()
def eager_conv_queue(model: FlowVocoder, mel: Tensor, z: Tensor) -> Tensor:
    """The published synthesis (Paine et al., 2016; WaveFlow, section 3.3), plainly: audio [B, h*W].

    Each layer keeps its last 2 dilation_h input rows; per row and layer one convolution over three rows, one of the
    conditioning row, the gate, and one convolution for residual and skip.
    """
    x, conditioning = z, model.condition(mel, z.size(2) * z.size(3))
    flows = model.flows()
    folded = fold_estimators(flows)
    for flow in reversed(flows):
        x = _invert_flow(flow, folded[flow.estimator], x, conditioning[:, :, list(flow.order)])
    return unsqueeze(x).squeeze(1)


def _invert_flow(flow: Flow, weights: EstimatorWeights, z: Tensor, conditioning: Tensor) -> Tensor:
    n_res = len(weights.front[1])
    queues = [[z.new_zeros(len(z), n_res, 1, z.size(3))] * (2 * dh) for dh, _ in weights.dilations]
    if flow.couples_first:
        z = z[:, :, list(flow.permutation)]
    rows = [z[:, :, :1] if flow.couples_first else torch.zeros_like(z[:, :, :1])]
    for row in range(int(flow.couples_first), z.size(2)):
        features = _row_features(flow, weights, rows[-1], conditioning[:, :, row : row + 1], queues)
        rows.append(flow.transform.inverse(z[:, :, row : row + 1], flow.transform.project(features)))
    return torch.cat(rows if flow.couples_first else [rows[1 + row] for row in flow.permutation], dim=2)


def _row_features(
    flow: Flow, weights: EstimatorWeights, previous: Tensor, conditioning: Tensor, queues: list[list[Tensor]]
) -> Tensor:
    hidden, features = F.conv2d(previous, *weights.front), 0
    for index, (layer, (dh, dw), queue) in enumerate(zip(weights.layers, weights.dilations, queues, strict=True)):
        rows = torch.cat([queue[0], queue[dh], hidden], dim=2)  # [B, R, 3, W]
        queue.append(hidden)
        queue.pop(0)
        both = F.conv2d(rows, layer.gate, layer.bias_of(flow.index), padding=(0, dw), dilation=(1, dw))
        both = both + F.conv2d(conditioning, layer.conditioning, layer.conditioning_bias)
        filters, gates = both.chunk(2, dim=1)
        out = F.conv2d(torch.tanh(filters) * torch.sigmoid(gates), layer.res_skip, layer.res_skip_bias)
        residual, skip = out.chunk(2, dim=1)
        features = features + skip
        if flow.gates is None:
            hidden = (hidden + residual) * weights.residual_scale
        else:
            hidden = hidden + residual * flow.gates[index].view(-1, 1, 1)
    return features
