"""Names of a vocoder's weights: ours, and those of the published code's files, which depend on what a variant shares.

Files keep the published names, in both directions: what was trained there loads here, and the other way round.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache

from torch import Tensor

# Ours and the published: i numbers a flow, l a layer, u an upsampling (the published code counts its LeakyReLUs too);
# t is the rest. e is where a variant keeps its estimators, f what each flow owns, p the projection of its transform.
_NAMES = (
    ("upsampler.convs.{u}.{t}", "upsample_conv.{u}.{t}"),
    ("estimators.{i}.front_conv.{t}", "{e}.front_conv.0.conv.{t}"),
    ("estimators.{i}.layers.{l}.gate_conv.{t}", "{e}.res_blocks.{l}.filter_gate_conv.conv.{t}"),
    ("estimators.{i}.layers.{l}.cond_conv.{t}", "{e}.res_blocks.{l}.filter_gate_conv_c.{t}"),
    ("estimators.{i}.layers.{l}.embed_conv.{t}", "{e}.res_blocks.{l}.filter_gate_conv_h.{t}"),
    ("estimators.{i}.layers.{l}.res_skip_conv.{t}", "{e}.res_blocks.{l}.res_skip_conv.{t}"),
    ("transforms.{i}.{t}", "{f}.{p}.{t}"),
    ("gates.{i}", "flows.{i}.multgate"),
)
_PLACES = {
    "waveflow": ("flows.{i}.coupling.net", "flows.{i}.coupling"),
    "waveflow_official": ("flows.{i}.coupling.net", "flows.{i}.coupling"),
    "nanoflow_naive": ("flow.coupling.net", "flow.coupling"),
    "nanoflow_decomp": ("estimator.net", "flows.{i}"),
    "nanoflow": ("estimator.net", "flows.{i}"),
}
PROJECTIONS = {"affine": "proj_log_s_t", "spline": "proj"}


@cache
def _names(coupling_type: str, transform: str) -> tuple[tuple[str, str], ...]:
    """The names of a variant: templates of ours and of the published."""
    estimator, flow = _PLACES[coupling_type]
    fixed = {"{e}": estimator, "{f}": flow, "{p}": PROJECTIONS[transform]}

    def fill(template: str) -> str:
        for part, text in fixed.items():
            template = template.replace(part, text)
        return template

    return tuple((ours, fill(published)) for ours, published in _NAMES)


@cache
def _pattern(template: str) -> re.Pattern[str]:
    kinds = {"t": ".+", "i": r"\d{1,9}", "l": r"\d{1,9}", "u": r"\d{1,9}"}
    return re.compile(re.sub(r"\\{(\w)\\}", lambda match: f"(?P<{match[1]}>{kinds[match[1]]})", re.escape(template)))


def _renamed(name: str, pairs: Iterable[tuple[str, str]], upsampling: Callable[[int], int]) -> str:
    for source, target in pairs:
        if match := _pattern(source).fullmatch(name):
            parts = {"i": "0", **match.groupdict()}  # what is shared has no number in its published name
            parts["u"] = upsampling(int(parts.get("u", 0)))
            return target.format(**parts)
    return name


def to_published(name: str, coupling_type: str, transform: str) -> str:
    """The published name of one of our keys, which depends on what the variant shares."""
    return _renamed(name, _names(coupling_type, transform), lambda number: 2 * number)


def from_published(name: str) -> str:
    """Our name of a published key of any variant; a name that is already ours is returned as it is."""
    variants = (_names(coupling_type, transform) for coupling_type in _PLACES for transform in PROJECTIONS)
    pairs = dict.fromkeys((published, ours) for names in variants for ours, published in names)
    return _renamed(name.removeprefix("module."), pairs, lambda number: number // 2)


RELEASED = "weights of the WaveFlow that its authors released (without proj_log_s_t.scale)"


def is_released(state_dict: Mapping[str, Tensor]) -> bool:
    """Recognise the weights of the WaveFlow that its authors released, in either layout: it scales no projection."""
    names = {from_published(name) for name in state_dict}
    return "transforms.1.conv.weight" in names and "transforms.0.scale" not in names and "gates.0" not in names


def our_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of either layout under our names; entries that are no weights are left out."""
    return {from_published(name): value for name, value in state_dict.items() if not is_stray(name)}


def is_stray(name: str) -> bool:
    """Recognise an entry that is no weight."""
    return name.removeprefix("module.") == "h_cache"  # a cached tensor that the published code saves
