"""The benchmark's training is the trainer's: its options reach the step; its loader loads."""

import pytest
import torch

from benchmark.workloads import BUILDERS, Bench, Conditions, flop_per_sample, has_workload, make_workloads
from config import load_config

PLAIN, CHECKPOINTED = "train_baseline", "train_checkpointed"


@pytest.fixture
def bench(config):
    return Bench(load_config(config()), Conditions(torch.device("cpu"), seconds=0.1))


def test_training_workloads_are_the_same_step_computed_in_other_ways(bench):
    weights = {}
    for workload in make_workloads(bench, [(name, "float32") for name in (PLAIN, "train", CHECKPOINTED)]):
        model = workload.job.model
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        torch.manual_seed(0)
        workload.job.run()
        weights[workload.name] = dict(model.named_parameters())
        same = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
        assert same <= {"estimators.0.front_conv.weight_v"}  # of one input each: only its sign matters
    executions = {name: BUILDERS[name](bench, "float32") for name in weights}
    for job in executions.values():
        job.run()
    assert executions[PLAIN].model.execution.plain and not executions["train"].model.execution.plain
    assert executions[CHECKPOINTED].model.execution.checkpoint_activations


def test_every_workload_runs_and_counts_its_work(config):
    path = config(waveflow_config__linear_prediction=8)
    bench = Bench(load_config(path), Conditions(torch.device("cpu"), seconds=0.1))
    for workload in make_workloads(bench, [(name, "float32") for name in BUILDERS]):
        workload.job.run()
        assert workload.job.samples > 0 and workload.flop > 0


def test_linear_prediction_is_counted_by_its_order_and_only_where_there_is_one(config, bench):
    assert not has_workload(bench.config, "linear_prediction") and has_workload(bench.config, "engine")
    predicted = Bench(load_config(config(waveflow_config__linear_prediction=8)), bench.conditions)
    assert has_workload(predicted.config, "linear_prediction")
    [workload] = make_workloads(predicted, [("linear_prediction", "float32")])
    assert workload.flop / workload.job.samples == pytest.approx(2 * 8 + 2 * 8**2 / 256)


def test_conditioning_is_counted_once_per_estimator(config):
    model = load_config(config()).waveflow_config
    own, released = (model.replace(coupling_type=kind) for kind in ("waveflow", "waveflow_official"))
    shared = model.replace(coupling_type="nanoflow_decomp")
    conditioning = 2 * model.n_layer * model.cin_channels * 2 * model.res_channels
    assert flop_per_sample(own) == flop_per_sample(released)
    assert flop_per_sample(own) - flop_per_sample(shared) == (model.n_flow - 1) * conditioning
