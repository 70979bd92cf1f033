"""What PyTorch's steps send between ranks, counted: sums packed, each matrix whole on one rank."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import torch_scale_workers as workers  # noqa: E402
from benchmarks._counted import Task  # noqa: E402
from benchmarks._torch.scale import measured  # noqa: E402

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="needs torch.distributed"
)
AXES = 2


@pytest.fixture(scope="module")
def counted():
    """The collectives of every optimizer's step, in a process of its own."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(here / "torch_scale_workers.py")]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


TWICE = {False: "along both axes", True: "along one axis twice"}


@pytest.mark.parametrize("twice", TWICE, ids=TWICE.get)
@pytest.mark.parametrize("name", workers.OPTIMIZERS)
def test_sums_of_all_tensors_go_together(counted, name, twice):
    _, stages = workers.OPTIMIZERS[name]
    found = counted[f"{name} twice" if twice else name]
    sums = {op: n for op, n in found.items() if "reduce" in op}
    assert sum(sums.values()) <= stages * AXES


@pytest.mark.parametrize("twice", TWICE, ids=TWICE.get)
@pytest.mark.parametrize("name", workers.OPTIMIZERS)
def test_nothing_is_gathered(counted, name, twice):
    found = counted[f"{name} twice" if twice else name]
    assert not [op for op in found if "gather" in op]


def test_each_rank_takes_one_matrix_at_a_time(counted):
    """Four matrices of four shapes on eight ranks: two messages to all."""
    sent = {op: n for op, n in counted["muon"].items() if "alltoall" in op or "all_to_all" in op}
    assert sum(sent.values()) == 2


def shares(name, ranks):
    """Matrices of a stack that a rank gets, at most, and the elements of one."""
    shape, _, group = workers.STACKS[name]
    axes = bool(group.get("stacked")) + group["role"].startswith("moe.expert")
    return math.ceil(math.prod(shape[:axes]) / ranks), math.prod(shape[axes:])


@pytest.mark.parametrize("name", workers.STACKS)
def test_matrices_of_a_stack_go_like_separate_ones(counted, name):
    """The first of eight ranks gets its share of them, one at a time."""
    rounds, size = shares(name, 8)
    assert counted[name][::2] == ([] if name == "whole" else [size] * rounds)
    assert len(counted[name][1::2]) == (0 if name == "whole" else rounds)


@pytest.mark.slow
def test_a_stack_is_spread_over_ranks(tmp_path):
    torch.multiprocessing.spawn(workers.spread, (str(tmp_path),), nprocs=4)
    seen = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(4)]
    assert max(off for one in seen for _, off in one.values()) < 1e-5
    for name, (shape, _, _) in workers.STACKS.items():
        most, size = shares(name, 4)
        got = [came[::2] for came, _ in (one[name] for one in seen)]
        assert all(elements in (0, size) for own in got for elements in own)
        assert max(map(sum, got)) <= most * size
        assert sum(map(sum, got)) == (0 if name == "whole" else math.prod(shape))


@pytest.mark.slow
def test_512_ranks_get_as_many_messages_as_8():
    tasks = [Task(name, "llama-1b", True) for name in ("self_driving", "axiom", "cosmic")]

    def numbers(mesh):
        return [len(one["messages"]) for one in measured(mesh, tasks, patience=300.0)]

    assert numbers({"data": 64, "model": 8}) == numbers({"data": 4, "model": 2})


def off_one_process(folder, twice, names):
    """By optimizer, how far a rank of four is off what one process has, at most."""
    torch.multiprocessing.spawn(workers.run, (str(folder), twice, names), nprocs=4)
    ranks = [torch.load(folder / f"rank{rank}.pt") for rank in range(4)]
    return {name: max(seen[name] for seen in ranks) for name in names}


def test_what_tensor_parallelism_and_fsdp_split_along_one_axis_trains_as_one(tmp_path):
    """Its placement no longer says that it is a shard, so that sums would be a rank's own."""
    found = off_one_process(tmp_path, True, ["self_driving", "axiom", "muon"])
    assert max(found.values()) < 1e-5


@pytest.mark.parametrize("twice", TWICE, ids=TWICE.get)
@pytest.mark.slow
def test_four_ranks_train_as_one(tmp_path, twice):
    found = off_one_process(tmp_path, twice, workers.TRAINED)
    assert {name: off for name, off in found.items() if off > 1e-5} == {}


def differences(folder, cases):
    """Of a step after a checkpoint of another mesh from the step without, by case."""
    torch.multiprocessing.spawn(workers.resume, (str(folder), cases), nprocs=4)
    return torch.load(folder / "rank0.pt")


@pytest.mark.slow
def test_a_run_on_one_mesh_goes_on_another(tmp_path):
    seen = differences(tmp_path, workers.FAST)
    assert {
        case: off for case, off in seen.items() if not isinstance(off, float) or off > 1e-6
    } == {}


@pytest.mark.slow
def test_every_run_on_one_mesh_goes_on_another(tmp_path):
    seen = differences(
        tmp_path, [(name, bits) for name in workers.RESUMED for bits in workers.BITS]
    )
    assert {
        case: off for case, off in seen.items() if not isinstance(off, float) or off > 1e-6
    } == {}
