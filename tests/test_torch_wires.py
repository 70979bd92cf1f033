"""Compressed means and the vote on four ranks: bytes, no bias, ranks alike, the guard, resume."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torch.distributed.fsdp", reason="needs fully_shard")

from torch.multiprocessing import spawn  # noqa: E402

import cruxy_torch  # noqa: E402
import wire_workers as workers  # noqa: E402
from cruxy_exact.random_bits import random_bits, stream_key  # noqa: E402
from relatives import relatives  # noqa: E402


def run(tmp_path_factory, slow):
    folder = str(tmp_path_factory.mktemp("wires"))
    spawn(workers.run, (folder, slow), nprocs=workers.RANKS)
    return [torch.load(f"{folder}/rank{r}.pt", weights_only=False) for r in range(workers.RANKS)]


@pytest.fixture(scope="module")
def fast_results(tmp_path_factory):
    return run(tmp_path_factory, slow=False)


@pytest.fixture(scope="module")
def slow_results(tmp_path_factory):
    return run(tmp_path_factory, slow=True)


@pytest.fixture
def results(request):
    """What every rank saw, in the cases that are as fast or slow as the test."""
    speed = "slow" if request.node.get_closest_marker("slow") else "fast"
    return request.getfixturevalue(f"{speed}_results")


@pytest.mark.parametrize("kind", workers.KINDS)
class TestTraining:
    """A few steps of a small network under `CruxyOptimizer`."""

    def test_all_ranks_end_with_the_same_bits(self, results, kind):
        ours = [rank[f"trained-{kind}"] for rank in results]
        assert not torch.equal(ours[0]["after"], ours[0]["before"])
        assert all(torch.equal(ours[0]["after"], rank["after"]) for rank in ours)

    def test_the_bytes_reported_are_those_that_collectives_were_handed(self, results, kind):
        for rank in results:
            assert rank[f"trained-{kind}"]["sent"] == rank[f"trained-{kind}"]["counted"] > 0

    def test_one_ranks_nan_skips_the_step_on_all(self, results, kind):
        for rank in results:
            assert rank[f"trained-{kind}"]["skipped"] == 1
            assert rank[f"trained-{kind}"]["unmoved"]


@pytest.mark.parametrize("kind", [kind for kind in workers.KINDS if kind != "vote"])
def test_the_wire_carries_3_6_and_7_times_less(results, kind):
    for rank in results:
        case = rank[f"trained-{kind}"]
        assert case["uncompressed"] / case["sent"] > (3.6 if kind.endswith("8") else 7.0)


def test_what_is_uncompressed_is_counted_as_an_all_reduce_sends_it(results):
    count = sum(p.numel() for p in workers.network().parameters())
    want = workers.STEPS * 2 * 3 * count * 4 / 4
    got = results[0]["trained-ddp-8"]["uncompressed"]
    assert abs(got - want) <= workers.STEPS * 4  # a rounding a bucket


def test_a_vote_carries_a_bit_an_element_and_phase(results):
    count = sum(p.numel() for p in workers.network().parameters())
    want = workers.STEPS * 2 * 3 / 4 * count / 8
    got = results[0]["trained-vote"]["counted"]
    assert want <= got <= want + workers.STEPS * 2 * 3 * 4


@pytest.mark.parametrize("bits", relatives([8, 4], [4]))
@pytest.mark.parametrize("place", ["ddp", "fsdp"])
def test_the_mean_of_200_averages_is_the_exact_one(results, place, bits):
    cases = [rank[f"averages-{bits}"] for rank in results]
    exact = torch.stack([case["own"] for case in cases]).double().mean(0)
    if place == "ddp":
        draws = cases[0]["ddp"].double()
        assert all(torch.equal(case["ddp"], cases[0]["ddp"]) for case in cases)
    else:
        draws = torch.cat([case["fsdp"] for case in cases], 1).double()
    z = (draws.mean(0) - exact).abs() / (draws.std(0) / 200**0.5)
    assert (draws.std(0) > 0).all()
    # Of 2,100 normal numbers 6 lie beyond 3 and none beyond 6.
    assert (z > 3.0).double().mean() < 0.01
    assert z.max() < 6.0


class TestVote:
    """Lion's sign by majority."""

    def test_it_is_numpys_majority_with_the_coin_in_ties(self, results):
        cases = [rank["voted"] for rank in results]
        telemetry = cases[0]["telemetry"]
        beta1, beta2 = np.float32(telemetry["beta1"]), np.float32(telemetry["beta2"])
        own = []
        for case in cases:
            grad = case["grads"][1].numpy()
            scale = np.float32(telemetry["clip_scale"])
            # From the momentum after the step, as the one before is gone.
            before = (case["momentum"].numpy() - (1 - beta2) * grad * scale) / beta2
            own.append(beta1 * before + (1 - beta1) * grad * scale)
        own = np.stack(own)
        index = np.arange(37 * 53, dtype=np.int32).reshape(37, 53)
        with np.errstate(over="ignore"):
            key = stream_key(np.int32(0), 0, 0, xp=np)
            coin = (random_bits(key, index) < 0) ^ True  # in the second step it is turned over
        votes = np.where(own == 0.0, coin, own > 0.0)
        ayes = votes.sum(0)
        want = np.where(2 * ayes == 4, coin, 2 * ayes > 4)
        sure = (np.abs(own) > 1e-6).all(0) | (own == 0.0).all(0)
        assert (2 * ayes == 4).sum() > 400
        assert sure.mean() > 0.99
        for case in cases:
            moved = case["moved"].numpy()
            assert (np.abs(np.abs(moved) - telemetry["learning_rate"]) < 1e-6).all()
            np.testing.assert_array_equal((moved > 0)[sure], want[sure])

    def test_what_nobody_pushes_comes_back(self):
        from cruxy_exact.votes import coins

        index = torch.arange(1000, dtype=torch.int32)
        even, odd = (
            coins(torch.tensor(t, dtype=torch.int32), 0, 0, index, xp=torch) for t in (4, 5)
        )
        assert torch.equal(even, ~odd)
        assert 400 < even.sum() < 600

    def test_momenta_are_each_ranks_own(self, results):
        first, second = (rank["voted"]["momentum"] for rank in results[:2])
        assert not torch.equal(first, second)

    def test_the_law_sees_the_mean_of_all_squares(self, results):
        squares = [case["voted"]["grads"][1].double().square().sum() for case in results]
        for rank in results:
            got = rank["voted"]["telemetry"]["grad_norm"]
            assert got == pytest.approx(float(torch.stack(squares).mean().sqrt()), rel=1e-5)


class TestAnotherNumberOfRanks:
    """`merge_votes`: four ranks have voted, and two go on."""

    @pytest.fixture(params=[32, 8])
    def cases(self, results, request):
        return [rank["merged"][request.param] for rank in results]

    def test_every_rank_begins_with_the_mean_of_all_momenta(self, cases):
        case = cases[0]
        for i, state in case["merged"]["state"].items():
            own = [states["state"][i] for states in case["states"]]
            if "exp_avg" in state:
                want = np.stack([each["exp_avg"].double().numpy() for each in own]).mean(0)
                np.testing.assert_allclose(state["exp_avg"].numpy(), want, rtol=1e-5, atol=1e-9)
            else:
                want = np.stack([decoded(each) for each in own]).mean(0)
                # Half of the largest step, 1/4 of 14.75, and a scale rounded up to bfloat16.
                allowed = np.abs(want).max(1, keepdims=True) / 8 / 14.75 * (1 + 2**-7)
                assert (np.abs(decoded(state) - want) <= allowed).all()
        for rank in cases[:2]:
            for i, state in case["merged"]["state"].items():
                assert all(torch.equal(state[key], rank["begun"][i][key]) for key in state)

    def test_the_two_go_on_alike(self, cases):
        first, second = cases[:2]
        assert torch.equal(first["after"], second["after"])
        assert not torch.equal(first["after"], first["before"])
        assert first["steps"] == 2 * workers.STEPS

    def test_all_four_may_go_on_from_it_too(self, cases):
        assert all(torch.equal(cases[0]["all"], case["all"]) for case in cases)

    def test_the_next_state_is_a_ranks_own_again(self, cases):
        assert [case["saved"] for case in cases[:2]] == [
            f"Lion by vote of rank {rank} of 2" for rank in range(2)
        ]

    def test_what_another_number_has_saved_is_refused_and_says_what_to_do(self, cases):
        for rank, case in enumerate(cases[:2]):
            assert f"rank {rank} of 2, got one of Lion by vote of rank {rank} of 4" in case["error"]
            assert "cruxy_torch.merge_votes(states)" in case["error"]

    def test_states_that_are_not_all_or_of_other_steps_are_refused(self, cases):
        states = cases[0]["states"]
        with pytest.raises(ValueError, match="must be those of all ranks that voted, each once"):
            cruxy_torch.merge_votes(states[:3])
        with pytest.raises(ValueError, match="each once, got 4"):
            cruxy_torch.merge_votes([*states[:3], states[0]])
        with pytest.raises(ValueError, match="got 0: none"):
            cruxy_torch.merge_votes([])
        late = dict(states[3], param_groups=[dict(states[3]["param_groups"][0])])
        late["param_groups"][0]["controller"] = {
            **late["param_groups"][0]["controller"], "step": torch.tensor(3)
        }  # fmt: skip
        with pytest.raises(ValueError, match=r"after the same step, got steps \[3, 8\]"):
            cruxy_torch.merge_votes([*states[:3], late])


def decoded(state):
    """A momentum in 8 bits as its blocks, by the levels that `BlockCode` documents."""
    scales = state["exp_avg_scales"].double().numpy()[:, None]
    codes = state["exp_avg_codes"].numpy().astype(np.int64)
    k = np.abs(codes)
    levels = 2.0 ** (k // 32) * (1 + k % 32 / 32) - 1
    return np.sign(codes) * scales * levels / 14.75


def test_a_run_that_is_resumed_ends_with_the_same_bits(results):
    for rank in results:
        assert rank["resumed-ddp-8"]["same"]
        assert rank["resumed-vote"]["same"]


@pytest.mark.slow
def test_the_other_runs_too(results):
    for rank in results:
        assert all(rank[f"resumed-{kind}"]["same"] for kind in ("ddp-4", "fsdp-8", "fsdp-4"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", workers.KINDS)
def test_all_ranks_have_the_same_bits_after_100_steps_and_have_learnt(results, kind):
    ours = [rank[f"long-{kind}"] for rank in results]
    assert all(torch.equal(ours[0]["after"], rank["after"]) for rank in ours)
    assert all(rank["last"] < 0.5 * rank["first"] for rank in ours)


def test_what_cannot_be_is_refused(results):
    for rank, result in enumerate(results):
        other, sharded, plain, double, trainer = result["refused"]["errors"]
        assert f"Lion by vote of rank {rank} of 4, got one of Lion by vote of rank" in other
        assert "parameters must be whole on every rank where ranks vote" in sharded
        assert "use_lion must be True in every group where ranks vote" in plain
        assert "must be dense and of at most 32 bits an element, got torch.float64" in double
        assert "Trainer must be alone, got 4 processes" in trainer


class TestTopK:
    """`AXIOM_DDP`."""

    def test_the_mean_over_ranks_is_that_of_what_each_kept(self, results):
        want = torch.zeros(1000, dtype=torch.float64)
        for rank in results:
            own = rank["top_k"]["own"].double()
            kept = own.abs().topk(62).indices
            want[kept] += own[kept] / 4
        for rank in results:
            torch.testing.assert_close(rank["top_k"]["mean"].double(), want, atol=1e-6, rtol=0)
            assert torch.equal(rank["top_k"]["mean"], results[0]["top_k"]["mean"])
            assert rank["top_k"]["nbytes"] == 62 * 8

    def test_added_up_positions_are_refused(self, results):
        for rank in results:
            assert "those of several ranks must not be added up" in rank["top_k"]["error"]

    def test_what_is_left_behind_comes_with_the_next(self):
        wire = cruxy_torch.AXIOM_DDP(n=4, top_k_percent=25.0)
        gradient, total = torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.zeros(4)
        for _ in range(100):
            total += wire.decompress(*wire.compress(gradient))
        # What is still behind is at most what a few gradients bring.
        assert (total / 100 - gradient).abs().max() < 0.2

    def test_without_feedback_it_never_comes(self):
        wire = cruxy_torch.AXIOM_DDP(n=4, top_k_percent=25.0, feedback=False)
        for _ in range(3):
            got = wire.decompress(wire.compress(torch.tensor([4.0, 3.0, 2.0, 1.0])))
        assert torch.equal(got, torch.tensor([4.0, 0.0, 0.0, 0.0]))

    @pytest.mark.parametrize(
        ("act", "error"),
        [
            (lambda: cruxy_torch.AXIOM_DDP(n=0), "n must be"),
            (lambda: cruxy_torch.AXIOM_DDP(n=4, top_k_percent=0.0), "top_k_percent must be"),
            (
                lambda: cruxy_torch.AXIOM_DDP(n=4).compress(torch.ones(5)),
                "must have n = 4 elements",
            ),
            (lambda: cruxy_torch.AXIOM_DDP(n=4).decompress(torch.ones(1)), "need their indices"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, act, error):
        with pytest.raises(ValueError, match=error):
            act()


class TestWithoutProcesses:
    """What is refused at the door."""

    def test_other_bits(self):
        with pytest.raises(ValueError, match="bits must be 8 or 4, got 1"):
            cruxy_torch.CompressedAllReduce(1)

    def test_a_model_that_is_not_sharded(self):
        with pytest.raises(ValueError, match=r"must have modules under .*fully_shard, got none"):
            cruxy_torch.compress_fsdp(torch.nn.Linear(2, 2))

    def test_a_vote_without_a_process_group(self):
        with pytest.raises(TypeError, match="vote must be a process group, got 'data'"):
            cruxy_torch.CruxyOptimizer(
                [torch.nn.Parameter(torch.ones(3))], use_lion=True, vote="data"
            )
