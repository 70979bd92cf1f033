"""`CruxyOptimizer` on two processes: one controller, the result of one process, checkpoints."""

import pytest

torch = pytest.importorskip("torch")

import torch_workers as workers  # noqa: E402
from relatives import relatives  # noqa: E402

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="needs torch.distributed"
)


def run(tmp_path_factory, keys):
    folder = str(tmp_path_factory.mktemp("ranks"))
    torch.multiprocessing.spawn(workers.run, (folder, keys), nprocs=2)
    return [torch.load(f"{folder}/rank{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def fast_results(tmp_path_factory):
    return run(tmp_path_factory, workers.FAST)


@pytest.fixture(scope="module")
def slow_results(tmp_path_factory):
    return run(tmp_path_factory, workers.SLOW)


@pytest.fixture
def results(request):
    """The cases' results on both ranks; one start of two processes serves all fast tests."""
    speed = "slow" if request.node.get_closest_marker("slow") else "fast"
    return request.getfixturevalue(f"{speed}_results")


RELEASED = relatives(
    workers.RELEASED, [name for name in workers.RELEASED if f"released-{name}" in workers.FAST]
)


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


@pytest.mark.parametrize("name", workers.EVERY)
def test_a_bad_shard_on_one_rank_skips_the_step_on_all(results, name):
    for rank in results:
        case = rank[f"bad_shard-{name}"]
        assert difference(case["after"][0], case["before"][0]) == 0.0
        assert case["after"][1]["skipped_total"] == 1
        assert case["after"][1]["step"] == case["before"][1]["step"]


@pytest.mark.parametrize(
    "key",
    relatives([k for k in workers.CASES if k.startswith(("checkpoint", "full"))], workers.FAST),
)
def test_resuming_from_a_distributed_checkpoint_is_bit_identical(results, key):
    for rank in results:
        assert difference(rank[key]["ours"][0], rank[key]["theirs"][0]) == 0.0
        assert difference(rank[key]["ours"][1], rank[key]["theirs"][1]) == 0.0


@pytest.mark.parametrize("name", workers.LOW_BIT)
def test_codes_are_sharded_as_their_parameter_is(results, name):
    for rank in results:
        case = rank[f"fsdp_low_bit-{name}"]
        # 451 and 450 rows of 7: 13 blocks on each rank, the last of them not full.
        bits = workers.LOW_BIT[name]["state_bits"]
        if bits == 16:
            assert case["local"]["exp_avg"] in ((451, 7), (450, 7))
            continue
        assert case["shapes"]["exp_avg_codes"] == (26, 32 * bits)
        assert case["local"]["exp_avg_codes"] == (13, 32 * bits)
        assert case["local"]["exp_avg_scales"] == (13,)


@pytest.mark.parametrize("name", workers.LOW_BIT)
def test_sharded_low_bit_training_agrees_on_all_ranks(results, name):
    ours = [rank[f"fsdp_low_bit-{name}"]["ours"] for rank in results]
    assert difference(ours[0][1], ours[1][1]) == 0.0
    assert difference(ours[0][0], ours[1][0]) == 0.0
    assert ours[0][1]["step"] == workers.STEPS


@pytest.mark.parametrize(("bits", "part"), [(16, 0.5 / 32), (8, 0.5)])
def test_averages_in_fewer_bits_are_those_of_each_shard(results, bits, part):
    # After so few steps an average is about as far away as one step goes, for which there is room.
    for rank in results:
        case = rank[f"fsdp_average-{bits}"]
        exact, coded, now = case["exact"], case["coded"], case["now"]
        assert case["local"] == (13, 256)
        for name in ("0.weight", "2.weight"):
            distance = (exact[name] - now[name]).norm()
            assert (coded[name] - exact[name]).norm() < part * distance
        assert difference(coded, results[0][f"fsdp_average-{bits}"]["coded"]) == 0.0


class TestReleased:
    """Gradients released in the backward pass under `fully_shard`."""

    @pytest.mark.parametrize("name", RELEASED)
    def test_all_ranks_hold_the_same_controller_and_no_gradient(self, results, name):
        ours = [rank[f"released-{name}"] for rank in results]
        assert difference(ours[0]["ours"][1], ours[1]["ours"][1]) == 0.0
        assert difference(ours[0]["ours"][0], ours[1]["ours"][0]) == 0.0
        assert ours[0]["left"] == ours[1]["left"] == 0

    @pytest.mark.parametrize("name", [one for one in RELEASED if one.values[0] in workers.OPTIONS])
    def test_two_processes_train_as_one(self, results, name):
        ours, alone = (results[0][f"released-{name}"][key] for key in ("ours", "alone"))
        allowed = workers.STEPS * 32 * 2.0**-24
        assert difference(ours[0], alone[0]) <= allowed
        assert difference(ours[1], alone[1]) <= allowed * 8

    @pytest.mark.parametrize("name", RELEASED)
    def test_a_tensor_that_is_bad_on_one_rank_stays_as_it_was_on_all(self, results, name):
        for rank in results:
            case = rank[f"released-{name}"]
            values, memory = case["after"]
            still = {key for key in values if torch.equal(values[key], case["before"][key])}
            assert still == {"2.weight"}
            assert memory["skipped_total"] == 1

    def test_data_parallel_replicas_are_refused(self, results):
        for rank in results:
            named, unnamed = rank["ddp_released-"]
            assert "process_group must be None to release gradients" in named
            assert "with several processes every parameter must be a DTensor" in unnamed


@pytest.mark.parametrize("name", ["adam8", "lion4"])
def test_codes_of_another_sharding_are_refused(results, name):
    for rank in results:
        message = rank[f"resharded-{name}"]
        assert "shards of 3157 elements for shards of 6307; load them on as many" in message


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What two replicas saw, by rank."""
    import torch_replicas as replicas

    folder = str(tmp_path_factory.mktemp("replicas"))
    torch.multiprocessing.spawn(replicas.run, (folder,), nprocs=2)
    return [torch.load(f"{folder}/rank{rank}.pt") for rank in (0, 1)]


def test_replicas_that_pass_losses_of_their_own_are_warned_once(seen):
    for rank in seen:
        assert len(rank["own"]) == 1
        assert "give process_group=torch.distributed.group.WORLD" in rank["own"][0]
        assert rank["reduced"] == rank["group"] == []


def test_partial_gradients_are_added_up(seen):
    for rank in seen:
        assert torch.equal(rank["partial"], rank["whole"])
        assert (rank["whole"] < 1.0).all()
