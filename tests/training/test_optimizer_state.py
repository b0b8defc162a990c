"""Optimizer state of honest files passes whatever its counts; its moments become tensors of their own, whatever their
layout in the file.
"""

import pytest
import torch

import checkpoint as ckpt
from config import load_config
from harness.checkpoints import save_whole
from model import build_model
from tests.training.test_damaged_state import vocoder  # noqa: F401 (a fixture)
from training.resuming import check_resumable, load_optimizer

# --- counts that differ for a reason


def counted(content, count):
    """The content with a count of steps for each of our names; None: without moments."""
    order = list(ckpt.our_weights(content["model"]))
    state = content["optimizer"]["state"]
    kept = {n: {**values, "step": torch.tensor(float(count(order[n])))}
            for n, values in state.items() if count(order[n]) is not None}  # fmt: skip
    return {**content, "optimizer": {**content["optimizer"], "state": kept}}


def of_parts(name):
    return name.startswith(("gates.", "flow_embedding.", "transforms."))


HONEST = {  # iteration, last_epoch, steps, trained_parts: all but the first of another kind of run
    "all steps": (2, 2, lambda name: 2, "all"),
    "published, which counts from 0": (1, 1, lambda name: 2, "all"),
    "published and resumed, each time without a step of the schedule": (60, 50, lambda name: 61, "all"),
    "published, of a warm start that kept the number": (10**6, 5, lambda name: 6, "all"),
    "skipped steps": (9, 9, lambda name: 3, "all"),
    "parts alone": (2, 2, lambda name: 2 if of_parts(name) else None, "gates-embedding-projections"),
    "parts, after all": (9, 9, lambda name: 9 if of_parts(name) else 4, "gates-embedding-projections"),
    "all, after parts": (9, 9, lambda name: 9 if of_parts(name) else 4, "all"),
    "all, before the first good step after parts": (9, 9, lambda name: 8 if of_parts(name) else 0, "all"),
}


@pytest.mark.parametrize("what", HONEST)
def test_honest_counts_pass(what, vocoder, monkeypatch):  # noqa: F811
    _, folder = vocoder
    iteration, scheduled, count, parts = HONEST[what]
    content = counted(ckpt.read_torch_file(folder / "waveflow_2"), count)
    content["iteration"] = iteration
    content["scheduler"] |= {"last_epoch": scheduled, "_step_count": scheduled + 1}
    content["config"]["train_config"]["trained_parts"] = parts
    monkeypatch.setattr(ckpt, "read_torch_file", lambda *_: content)
    check_resumable(ckpt.read_checkpoint("waveflow_2"))


# --- tensors that are written to


def spread(value):
    """The numbers of a tensor, but for its first dimension, repeated by a stride of 0."""
    return value.flatten()[:1].reshape(()).expand(value.shape)


def in_steps(value):
    """The same numbers, with gaps between them and the last dimension first in memory."""
    wide = torch.zeros(*value.shape, 3).transpose(0, -1).contiguous().transpose(0, -1)
    wide[..., 1] = value
    return wide[..., 1]


LAYOUTS = {
    "as they are": lambda state: state,
    "stride 0": lambda state: _each(state, lambda name, v: spread(v * 0) if name == "exp_avg" else v),
    "stride 0, all": lambda state: _each(state, lambda name, v: spread(v) if name != "step" else v),
    "gaps": lambda state: _each(state, lambda name, v: in_steps(v) if name != "step" else v),
    "one of the other": lambda state: {n: {**v, "exp_avg": v["exp_avg_sq"]} for n, v in state.items()},
    "one step for all": lambda state: {n: {**v, "step": state[0]["step"]} for n, v in state.items()},
    "a step that is a moment": lambda state: {n: {**v, "step": _one(v["step"])} for n, v in state.items()},
    "whole numbers as steps": lambda state: _each(state, lambda name, v: v if name != "step" else int(v)),
    "steps of more digits": lambda state: _each(state, lambda name, v: v if name != "step" else v.double()[None]),
    "a view of a larger one": lambda state: _each(state, lambda name, v: _tail(v) if name != "step" else v),
    "with gradients": lambda state: _each(state, lambda name, v: v.clone().requires_grad_() if name != "step" else v),
    "in float64": lambda state: _each(state, lambda name, v: v.double() if name != "step" else v),
    "a maximum too": lambda state: {n: {**v, "max_exp_avg_sq": spread(v["exp_avg"])} for n, v in state.items()},
}


def _each(state, change):
    return {n: {name: change(name, value) for name, value in values.items()} for n, values in state.items()}


def _one(step):
    return torch.stack([step] * 3)[1:2].expand(1, 1)


def _tail(value):
    return torch.cat([torch.full((7,), 1e9), value.flatten()])[7:].reshape(value.shape)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("what", LAYOUTS)
def test_moments_of_any_layout_become_tensors_of_their_own(what, fused, vocoder, tmp_path):  # noqa: F811
    _, folder = vocoder
    content = torch.load(folder / "waveflow_2", weights_only=True)
    del content["digest"]
    content["optimizer"]["state"] = LAYOUTS[what](content["optimizer"]["state"])
    save_whole(tmp_path / "waveflow_2", content)
    start = ckpt.read_checkpoint(tmp_path / "waveflow_2")
    check_resumable(start)
    model = build_model(load_config(vocoder[0]).waveflow_config, load_config(vocoder[0]).data_config)
    ckpt.load_weights(model, start.weights)
    optimizer = torch.optim.Adam(model.parameters(), fused=fused)
    load_optimizer(optimizer, model, start)
    own = [value for values in optimizer.state_dict()["state"].values() for value in values.values()]
    assert len({value.untyped_storage().data_ptr() for value in own}) == len(own)
    for parameter, values in optimizer.state.items():
        assert all(value.is_contiguous() and not value.requires_grad for value in values.values())
        assert values["exp_avg"].stride() == values["exp_avg_sq"].stride() == parameter.stride()
        assert values["step"].shape == () and values["step"].item() == 2
    saved = {name: start.optimizer["state"][number] for number, name in enumerate(start.parameter_order)}
    for name, parameter in model.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[parameter][key], saved[name][key].float())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert {values["step"].item() for values in optimizer.state.values()} == {3}
