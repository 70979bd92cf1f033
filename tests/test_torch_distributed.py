"""`CruxyOptimizer` on two processes: one controller, the result of one process, checkpoints."""

import pytest

torch = pytest.importorskip("torch")

import torch_workers as workers  # noqa: E402

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="needs torch.distributed"
)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Every case's result on both ranks; one start of two processes serves all tests."""
    folder = str(tmp_path_factory.mktemp("ranks"))
    torch.multiprocessing.spawn(workers.run, (folder,), nprocs=2)
    return [torch.load(f"{folder}/rank{rank}.pt") for rank in (0, 1)]


def difference(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max(
        (ours[key].double() - theirs[key].double()).abs().max().item()
        for key in ours
        if ours[key].numel()
    )


@pytest.mark.parametrize("name", workers.OPTIONS)
@pytest.mark.parametrize("case", ["ddp", "fsdp"])
class TestTraining:
    """Each rank passes its own loss, once one has none, once neither has."""

    def test_all_ranks_hold_the_same_controller(self, results, case, name):
        ours = [rank[f"{case}-{name}"]["ours"] for rank in results]
        assert difference(ours[0][1], ours[1][1]) == 0.0
        assert difference(ours[0][0], ours[1][0]) == 0.0

    def test_two_processes_train_as_one(self, results, case, name):
        ours, alone = (results[0][f"{case}-{name}"][key] for key in ("ours", "alone"))
        # Sums over half batches round otherwise, by a few ulps of values of order one a step.
        allowed = workers.STEPS * 32 * 2.0**-24
        assert difference(ours[0], alone[0]) <= allowed
        assert difference(ours[1], alone[1]) <= allowed * 8  # norms of order eight


@pytest.mark.parametrize("name", workers.OPTIONS)
def test_a_bad_shard_on_one_rank_skips_the_step_on_all(results, name):
    for rank in results:
        case = rank[f"bad_shard-{name}"]
        assert difference(case["after"][0], case["before"][0]) == 0.0
        assert case["after"][1]["skipped_total"] == 1
        assert case["after"][1]["step"] == case["before"][1]["step"]


@pytest.mark.parametrize("key", [k for k in workers.CASES if k.startswith(("checkpoint", "full"))])
def test_resuming_from_a_distributed_checkpoint_is_bit_identical(results, key):
    for rank in results:
        assert difference(rank[key]["ours"][0], rank[key]["theirs"][0]) == 0.0
        assert difference(rank[key]["ours"][1], rank[key]["theirs"][1]) == 0.0
