"""Twin of `graph.py` in ONNX: the same modules and weights, written down node by node.

Weights and other constants stand once, in the outermost graph, whose names the bodies of scans see. The operators are
those of opset 18 that onnxruntime has on a CPU for the precision in which they are used.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from fast.graph import FlowGraph, LayerGraph, PredictionGraph, SynthesisGraph
from harness.errors import InputError
from linear_prediction import (
    ABSOLUTE_FLOOR,
    LOG_MEL_LIMIT,
    MAX_REFLECTION,
    PEAK_LIMIT,
    RELATIVE_FLOOR,
    spectrum_of,
)
from modules import LEAKY_SLOPE, Affine, Spline, Transform, Upsampler
from spline import MIN_BIN

OPSET, IR_VERSION = 18, 8
FLOAT, DOUBLE, INT64 = TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT64
NOISE = "drawn_noise"  # name of the noise inside the graph


def onnx_model(graph: SynthesisGraph, metadata: Mapping[str, str]) -> onnx.ModelProto:
    """The graph as an ONNX model: input `mel` [1, M, F], and `noise` [1, T] unless it is drawn inside; output `audio`.

    metadata: texts by name, kept with the model.
    """
    body, bands = Body(), graph.bands
    inputs = [helper.make_tensor_value_info("mel", FLOAT, [1, bands, "frames"])]
    if graph.temp is None:
        inputs.append(helper.make_tensor_value_info("noise", FLOAT, [1, "samples"]))
    body.nodes.append(helper.make_node("Identity", [_synthesis(body, graph)], ["audio"]))
    outputs = [helper.make_tensor_value_info("audio", FLOAT, [1, "samples"])]
    whole = helper.make_graph(body.nodes, "synthesis", inputs, outputs, list(body.constants.values()))
    model = helper.make_model(whole, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    helper.set_model_props(model, dict(metadata))
    return model


# --- writing ----------------------------------------------------------------------------------------------------------


class Body:
    """A graph being written; `body.MatMul(a, b)` adds a node of that kind and returns the name of its result.

    Arguments are names, or values that become constants: tensors and arrays keep their type, numbers are int64 or
    float, lists are int64.
    """

    def __init__(self, outer: "Body | None" = None) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[Any, TensorProto] = {} if outer is None else outer.constants  # by kind, shape and content
        self._numbers = itertools.count() if outer is None else outer._numbers

    def __getattr__(self, kind: str) -> Callable[..., Any]:
        def add(*inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
            names = [self.name() for _ in range(outputs)]
            given = [value if isinstance(value, str) else self.constant(value) for value in inputs]
            self.nodes.append(helper.make_node(kind, given, names, **attributes))
            return names[0] if outputs == 1 else names

        return add

    def name(self) -> str:
        """A name that nothing has yet."""
        return f"v{next(self._numbers)}"

    def constant(self, value: Any) -> str:
        """The name of a constant."""
        if isinstance(value, Tensor):
            array = value.detach().numpy()
        else:
            array = np.asarray(value, None if isinstance(value, (np.ndarray, np.generic)) else _kind(value))
        key = (array.dtype.str, array.shape, sha256(array.tobytes()).digest())
        if key not in self.constants:
            self.constants[key] = numpy_helper.from_array(array.copy(), self.name())
        return self.constants[key].name

    def part(self, x: str, start: Any, stop: Any, axis: int = 0) -> str:
        """x[start:stop] along an axis; start and stop are numbers, or names of [1]."""
        ends = [end if isinstance(end, str) else [end] for end in (start, stop)]
        return self.Slice(x, *ends, [axis])

    def size(self, x: str, axis: int) -> str:
        """Length of an axis, as [1]."""
        return self.Shape(x, start=axis, end=axis + 1) if axis != -1 else self.Shape(x, start=-1)

    def zeros(self, shape: str, kind: int = FLOAT) -> str:
        """Zeros of a shape that is known when the graph runs."""
        return self.ConstantOfShape(shape, value=helper.make_tensor("zero", kind, [1], [0]))

    def scan(
        self,
        step: Callable[["Body", list[str], list[str]], tuple[list[str], list[str]]],
        state: Sequence["Typed"],
        inputs: Sequence["Typed"],
        stacked: Sequence["Typed"],
    ) -> list[str]:
        """A scan along the first axis of its inputs: the last state, then stacks of what the steps give.

        step writes one: from names of the state and the inputs, the next state and what is stacked. Each Typed says
        what a step sees of it; of what is stacked, the names are not used.
        """
        body = Body(self)
        names = [[body.name() for _ in values] for values in (state, inputs)]
        grown, given = step(body, *names)
        ends = [body.Identity(name) for name in (*grown, *given)]  # each has a name of its own
        graph = helper.make_graph(
            body.nodes,
            self.name(),
            [typed.info(name) for name, typed in zip(names[0] + names[1], [*state, *inputs], strict=True)],
            [typed.info(name) for name, typed in zip(ends, [*state, *stacked], strict=True)],
        )
        outer = [
            typed.name if isinstance(typed.name, str) else self.constant(typed.name) for typed in (*state, *inputs)
        ]
        results = self.Scan(*outer, outputs=len(ends), body=graph, num_scan_inputs=len(inputs))
        return [results] if len(ends) == 1 else results


class Typed(NamedTuple):
    """A value, by name or a constant, and the axes and the kind of numbers that a step of a scan sees of it."""

    name: Any
    axes: int
    kind: int = FLOAT

    def info(self, name: str) -> onnx.ValueInfoProto:
        """The description that ONNX wants of it; lengths are left open."""
        return helper.make_tensor_value_info(name, self.kind, [None] * self.axes)


def _kind(value: Any) -> type:
    return np.float32 if isinstance(value, float) else np.int64


# --- the graph --------------------------------------------------------------------------------------------------------


def _synthesis(body: Body, graph: SynthesisGraph) -> str:
    height, hop = graph.height, graph.hop
    samples = body.Mul(body.Sub(body.size("mel", 2), [1]), [hop])
    noise = "noise" if graph.temp is None else _drawn(body, samples, graph.temp)
    columns = body.Div(body.Add(samples, [height - 1]), [height])
    if hop % height:
        noise = body.Pad(noise, [0, 0, 0, height - 1], 0.0)
        noise = body.part(noise, 0, body.Mul(columns, [height]), axis=1)
    conditioning = body.part(_upsampled(body, graph.upsampler), 0, body.Mul(columns, [height]), axis=1)  # [M, hW]
    conditioning = body.Transpose(body.Reshape(conditioning, [graph.bands, -1, height]), perm=[2, 0, 1])  # [h, M, W]
    x = body.Transpose(body.Reshape(noise, [-1, height]), perm=[1, 0])
    for flow in graph.flows:
        x = _flow(body, flow, x, conditioning)
    audio = body.part(body.Reshape(body.Transpose(x, perm=[1, 0]), [1, -1]), 0, samples, axis=1)
    return audio if graph.prediction is None else _prediction(body, graph.prediction, audio)


def _drawn(body: Body, samples: str, temp: float) -> str:
    like = body.zeros(body.Concat([1], samples, axis=0))
    standard = body.RandomNormalLike(like)  # onnxruntime ends the process where it should draw with a scale of 0
    body.nodes.append(helper.make_node("Mul", [standard, body.constant(float(temp))], [NOISE]))
    return NOISE


def _upsampled(body: Body, upsampler: Upsampler) -> str:
    """[M, F hop]."""
    image = body.Unsqueeze("mel", [1])
    for conv, stride in zip(upsampler.convs, upsampler.strides, strict=True):
        before = (stride + 1) // 2
        weight = conv.weight().detach()
        image = body.ConvTranspose(
            image,
            weight,
            conv.bias,
            kernel_shape=list(weight.shape[2:]),
            strides=[1, stride],
            pads=[1, before, 1, before],
            output_padding=[0, stride % 2],
        )
        image = body.LeakyRelu(image, alpha=LEAKY_SLOPE)
    return body.Squeeze(image, [0, 1])


def _flow(body: Body, flow: FlowGraph, z: str, conditioning: str) -> str:
    if flow.untouched:
        z = body.Gather(z, flow.permutation, axis=0)
    first, width = body.part(z, 0, 1), body.size(z, 1)
    above = first if flow.untouched else body.zeros(body.Concat([1], width, axis=0))
    state = [Typed(above, 2), Typed(body.zeros(body.Concat([4], width, axis=0)), 2)]
    for layer in flow.layers[1:]:
        queue = body.zeros(body.Concat([2 * layer.dilation[0], len(flow.front)], width, axis=0))
        state.append(Typed(queue, 3))
    rows = body.part(z, 1, flow.rows) if flow.untouched else z
    inputs = [Typed(rows, 1), Typed(body.Gather(conditioning, flow.order, axis=0), 2)]
    x = body.scan(lambda inner, *names: _row(inner, flow, *names), state, inputs, [Typed("", 1)])[-1]
    return body.Concat(first, x, axis=0) if flow.untouched else body.Gather(x, flow.permutation, axis=0)


def _row(body: Body, flow: FlowGraph, state: list[str], inputs: list[str]) -> tuple[list[str], list[str]]:
    (above, entry, *queues), (z, conditioning) = state, inputs
    inside = body.Expand(1.0, body.Shape(above))
    seen = body.Concat(body.part(entry, 0, 2), above, body.part(entry, 2, 4), inside, axis=0)
    hidden = body.MatMul(flow.front, body.Concat(above, inside, axis=0))
    grown, params = [body.Concat(body.part(seen, 1, 3), body.part(seen, 4, 6), axis=0)], None
    for layer, queue in zip(flow.layers, [None, *queues], strict=True):
        if queue is not None:
            step, n_res = layer.dilation[0], layer.n_res
            rows = [body.Reshape(body.part(queue, row, row + 1), [n_res, -1]) for row in (0, step)]
            seen = body.Concat(*rows, hidden, axis=0)
            grown.append(body.Concat(body.part(queue, 1, 2 * step), body.Unsqueeze(hidden, [0]), axis=0))
        change, added = _layer(body, layer, seen, conditioning)
        params = body.Add(flow.offset if params is None else params, added)
        hidden = hidden if change is None else body.Add(hidden, change)
    x = _inverse(flow.transform)(body, flow.transform, body.Unsqueeze(z, [0]), params)
    return [x, *grown], [body.Squeeze(x, [0])]


def _layer(body: Body, layer: LayerGraph, seen: str, conditioning: str) -> tuple[str | None, str]:
    width, n_res = layer.dilation[1], layer.n_res
    both = body.Conv(
        body.Unsqueeze(seen, [0]),
        layer.gate,
        layer.gate_bias,
        dilations=[width],
        kernel_shape=[3],
        pads=[width, width],
    )
    both = body.Sigmoid(body.Add(body.Squeeze(both, [0]), body.MatMul(layer.conditioning, conditioning)))
    filters, gates = body.Split(both, [n_res, n_res], axis=0, outputs=2)
    out = body.MatMul(layer.out, body.Mul(body.Sub(1.0, body.Mul(filters, 2.0)), gates))
    if layer.bias is None:
        return None, out
    change, added = body.Split(out, [n_res, len(layer.out) - n_res], axis=0, outputs=2)
    return body.Add(change, layer.bias), added


# --- transforms: z [1, W] and parameters [P, W] -> x [1, W] -----------------------------------------------------------


def _inverse(transform: Transform) -> Callable[[Body, Any, str, str], str]:
    if type(transform) not in INVERSES:
        known = ", ".join(kind.__name__ for kind in INVERSES)
        raise InputError(f"{type(transform).__name__} cannot be written as ONNX; expected a transform of {known}")
    return INVERSES[type(transform)]


def _affine(body: Body, _transform: Affine, z: str, params: str) -> str:
    log_s, t = body.Split(params, [1, 1], axis=0, outputs=2)
    return body.Mul(body.Sub(z, t), body.Exp(body.Neg(log_s)))


def _spline(body: Body, transform: Spline, z: str, params: str) -> str:
    """`spline.rational_quadratic_spline`, inverse, with bins along the first axis."""
    bins, bound = transform.num_bin, float(transform.tail_bound)
    widths, heights, slopes = body.Split(params, [bins, bins, bins - 1], axis=0, outputs=3)
    knots_x, knots_y = _knots(body, widths, bins, bound), _knots(body, heights, bins, bound)
    edge = body.Expand(1.0, body.Shape(z))  # slope of the tails
    slopes = body.Concat(edge, body.Add(body.Softplus(slopes), MIN_BIN), edge, axis=0)
    clamped = body.Clip(z, -bound, bound)
    passed = body.Cast(body.GreaterOrEqual(clamped, body.part(knots_y, 1, bins)), to=INT64)
    place = body.ReduceSum(passed, [0], keepdims=1)  # [1, W]
    x0, x1, y0, y1, d0, d1 = (
        body.GatherElements(values, body.Add(place, [step]), axis=0)
        for values in (knots_x, knots_y, slopes)
        for step in (0, 1)
    )
    width, height, dy = body.Sub(x1, x0), body.Sub(y1, y0), body.Sub(clamped, y0)
    slope = body.Div(height, width)
    curve = body.Sub(body.Add(d0, d1), body.Mul(slope, 2.0))
    a = body.Add(body.Mul(height, body.Sub(slope, d0)), body.Mul(dy, curve))
    b = body.Sub(body.Mul(height, d0), body.Mul(dy, curve))
    c = body.Neg(body.Mul(slope, dy))
    discriminant = body.Max(body.Sub(body.Mul(b, b), body.Mul(body.Mul(a, c), 4.0)), 0.0)
    theta = body.Div(body.Mul(c, 2.0), body.Sub(body.Neg(b), body.Sqrt(discriminant)))
    mapped = body.Add(x0, body.Mul(theta, width))
    return body.Where(body.LessOrEqual(body.Abs(z), bound), mapped, z)


def _knots(body: Body, sizes: str, bins: int, bound: float) -> str:
    """Sizes [K, W] -> knots [K + 1, W]; running sums in float64."""
    shares = body.Add(body.Mul(body.Softmax(sizes, axis=0), 1 - MIN_BIN * bins), MIN_BIN)
    inner = body.Cast(body.part(shares, 0, bins - 1), to=DOUBLE)
    sums = body.Cast(body.MatMul(np.tril(np.ones((bins - 1, bins - 1))), inner), to=FLOAT)
    inner = body.Sub(body.Mul(sums, 2 * bound), bound)
    edge = body.Expand(bound, body.Shape(body.part(sizes, 0, 1)))
    return body.Concat(body.Neg(edge), inner, edge, axis=0)


INVERSES: dict[type[Transform], Callable[[Body, Any, str, str], str]] = {Affine: _affine, Spline: _spline}


# --- linear prediction, in float64 ------------------------------------------------------------------------------------


def _prediction(body: Body, graph: PredictionGraph, residual: str) -> str:
    lead, hop, order = graph.hop // 2, graph.hop, graph.order
    coefficients, gain = _filters(body, graph)  # [F, p], [F]
    ends = [0, lead, 0, hop - lead]
    residual = body.Cast(residual, to=DOUBLE)
    frames = body.Reshape(body.Pad(residual, ends, np.float64(0)), [-1, hop])
    frames = body.Mul(frames, body.Unsqueeze(gain, [1]))
    inside = body.Pad(body.Expand(np.float64(1), body.Shape(residual)), ends, np.float64(0))
    inside = body.Reshape(inside, [-1, hop])

    def answer(inner: Body, state: list[str], inputs: list[str]) -> tuple[list[str], list[str]]:
        sample = inner.ReduceSum(inner.Mul(*state, coefficients), [1], keepdims=1)  # [F, 1]
        sample = inner.Add(sample, *inputs)
        return [inner.Concat(sample, inner.part(*state, 0, order - 1, axis=1), axis=1)], [inner.Squeeze(sample, [1])]

    def frame(inner: Body, state: list[str], inputs: list[str]) -> tuple[list[str], list[str]]:
        return _frame(inner, graph, *state, inputs)

    line = [Typed("", 1, DOUBLE)]
    nothing = Typed(body.zeros(body.Shape(coefficients), DOUBLE), 2, DOUBLE)
    answers = body.scan(answer, [nothing], [Typed(graph.impulse, 0, DOUBLE)], line)[-1]  # [hop, F]
    inputs = [frames, coefficients, body.Transpose(answers, perm=[1, 0]), inside]
    audio = body.scan(frame, [Typed(np.zeros(order), 1, DOUBLE)], [Typed(name, 1, DOUBLE) for name in inputs], line)[-1]
    audio = body.Reshape(audio, [1, -1])
    return body.Cast(body.part(audio, lead, body.Add(body.size(residual, 1), [lead]), axis=1), to=FLOAT)


def _frame(body: Body, graph: PredictionGraph, past: str, inputs: list[str]) -> tuple[list[str], list[str]]:
    excitation, coefficients, answer, inside = inputs
    nought, beyond = np.float64(0), graph.hop - len(graph.past_places)
    heard = body.MatMul(body.Gather(body.Pad(coefficients, [0, 1], nought), graph.past_places, axis=0), past)
    driven = body.Add(excitation, body.Pad(heard, [0, beyond], nought))
    frame = body.MatMul(body.Gather(body.Pad(answer, [0, 1], nought), graph.answer_places, axis=0), driven)
    peak = body.ReduceMax(body.Abs(body.Mul(frame, inside)), [0], keepdims=0)
    limit = np.float64(PEAK_LIMIT)
    frame = body.Mul(frame, body.Where(body.Greater(peak, limit), body.Div(limit, peak), np.float64(1)))
    return [body.part(body.Concat(past, frame, axis=0), -graph.order, np.iinfo(np.int64).max)], [frame]


def _filters(body: Body, graph: PredictionGraph) -> tuple[str, str]:
    """Coefficients [F, p] and gain [F]."""
    lags = body.Transpose(body.MatMul(_power(body, graph), graph.cosines), perm=[1, 0])  # [p + 1, F]
    first, later = body.part(lags, 0, 1), body.part(lags, 1, graph.order + 1)
    nothing = body.zeros(body.Shape(first), DOUBLE)
    ends = body.Concat(nothing, body.Sub(nothing, np.float64(1)), axis=0)

    def step(inner: Body, state: list[str], inputs: list[str]) -> tuple[list[str], list[str]]:
        (predictor, error), (lag, lag_places, turned_places) = state, inputs
        seen = inner.Mul(predictor, inner.Gather(lags, lag_places, axis=0))
        missing = inner.Sub(lag, inner.ReduceSum(seen, [0], keepdims=0))
        limit = np.float64(MAX_REFLECTION)
        reflection = inner.Clip(inner.Div(missing, error), -limit, limit)
        turned = inner.Gather(inner.Concat(predictor, ends, axis=0), turned_places, axis=0)
        error = inner.Mul(error, inner.Sub(np.float64(1), inner.Mul(reflection, reflection)))
        return [inner.Sub(predictor, inner.Mul(reflection, turned)), error], []

    start = [Typed(body.zeros(body.Shape(later), DOUBLE), 2, DOUBLE), Typed(body.Squeeze(first, [0]), 1, DOUBLE)]
    places = [Typed(graph.lag_places, 1, INT64), Typed(graph.turned_places, 1, INT64)]
    predictor, error = body.scan(step, start, [Typed(later, 1, DOUBLE), *places], [])
    scale = graph.prediction.log_scale.detach().double().exp()
    return body.Transpose(predictor, perm=[1, 0]), body.Mul(body.Sqrt(error), scale)


def _power(body: Body, graph: PredictionGraph) -> str:
    """Power spectrum [F, K] of each frame, as `LinearPrediction.power` has it."""
    data = graph.prediction.data
    spectrum = spectrum_of(data, torch.device("cpu"))
    mel = body.Cast(body.Transpose(body.Squeeze("mel", [0]), perm=[1, 0]), to=DOUBLE)
    if data.use_dbmel:
        decibels = body.Sub(body.Mul(mel, np.float64(100)), np.float64(90))
        mel = body.Mul(decibels, np.float64(math.log(10) / 20))
    spoilt = body.Mul(mel, np.float64(0))  # NaN where a value is not finite, and nought elsewhere
    mel = body.Add(body.Clip(mel, np.float64(-LOG_MEL_LIMIT), np.float64(LOG_MEL_LIMIT)), spoilt)
    power = body.Exp(body.Add(body.MatMul(mel, 2 * spectrum.interpolate), spectrum.offset))
    mean = body.ReduceMean(power, [1], keepdims=1)
    floor = body.Add(body.Mul(mean, np.float64(RELATIVE_FLOOR)), np.float64(ABSOLUTE_FLOOR))
    return body.Add(power, floor)
