"""bfloat16 parameters that learn, and fewer bits together with gradient release."""

import math

import pytest

torch = pytest.importorskip("torch")

from cruxy_control import Meta3  # noqa: E402
from cruxy_torch import CruxyOptimizer  # noqa: E402
from relatives import crossed  # noqa: E402
from torch_low_bit import PATHS, assert_same, gradients, parameters, state_of, train  # noqa: E402
from torch_released import OFF  # noqa: E402


class TestBfloat16Parameters:
    """Weights near 1 at a rate of 1e-3: a quarter of the distance to the next bfloat16."""

    def moved(self, dtype, steps=100, **options):
        p = torch.nn.Parameter(torch.ones(8192, dtype=dtype))
        optimizer = CruxyOptimizer(
            [p], lr=1e-3, weight_decay=0.0, **options,
            law=Meta3(phase_strength=0, rate_gain=0, clip_threshold=None),
        )  # fmt: skip
        for _ in range(steps):
            p.grad = torch.full_like(p, 0.01)
            optimizer.step()
        return p.detach()

    @pytest.mark.parametrize(
        ("options", "path"),
        crossed([{}, {"use_lion": True}, {"state_bits": 8}], ["single", "foreach"]),
    )
    def test_they_move_as_float32_does(self, options, path):
        whole = self.moved(torch.float32, **options)
        ours = self.moved(torch.bfloat16, stochastic_rounding=True, **options, **PATHS[path])
        assert (whole < 0.95).all()
        # A hundred roundings, each off by less than 2^-8, of each of 8,192 elements: five standard
        # deviations of their mean.
        allowed = 5 * 2.0**-8 * math.sqrt(100 / 8192)
        assert abs(ours.float().mean() - whole.mean()) < allowed
        stuck = self.moved(torch.bfloat16, **options)
        assert (stuck == 1.0).all()

    def test_reproducible_and_off_for_other_dtypes(self):
        ours = [self.moved(torch.bfloat16, 5, stochastic_rounding=True) for _ in range(2)]
        assert torch.equal(*ours)
        for dtype in (torch.float32, torch.float16):
            pair = [self.moved(dtype, 5, stochastic_rounding=on) for on in (False, True)]
            assert torch.equal(*pair)

    @pytest.mark.parametrize("path", ["single", "foreach"])
    def test_a_skipped_step_leaves_them(self, path):
        params = parameters((64, 100), (7,), dtype=torch.bfloat16)
        optimizer = CruxyOptimizer(params, stochastic_rounding=True, **PATHS[path])
        train(params, optimizer, 3)
        before = [p.detach().clone() for p in params]
        gradients(params, 3)
        params[1].grad[0] = math.nan
        optimizer.step()
        assert all(map(torch.equal, params, before))


class TestReleased:
    """Low bits and gradient release together."""

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("bits", [16, 8, 4])
    def test_released_steps_equal_ordinary_ones(self, bits, path):
        def run(release):
            torch.manual_seed(0)
            net = torch.nn.Sequential(torch.nn.Linear(70, 90), torch.nn.Linear(90, 1))
            net[0].to(torch.bfloat16) if path != "native" else None
            options = {"lr": 1e-3, "state_bits": bits, "law": OFF, "stochastic_rounding": True}
            # One tensor at a time is what foreach does with one tensor too.
            optimizer = CruxyOptimizer([{"params": [p]} for p in net.parameters()], **options,
                                       **PATHS[path])  # fmt: skip
            if release:
                optimizer.register_hooks()
            for step in range(6):
                generator = torch.Generator().manual_seed(step)
                x = torch.randn(16, 70, generator=generator)
                loss = net[1](net[0](x.to(net[0].weight.dtype)).float()).square().mean()
                loss.backward()
                optimizer.step(loss=loss)
                optimizer.zero_grad()
            return list(net.parameters()), state_of(optimizer)

        (ours, ours_state), (theirs, theirs_state) = run(True), run(False)
        assert all(map(torch.equal, ours, theirs))
        assert_same(ours_state, theirs_state)

    def test_a_bad_tensor_keeps_its_codes(self):
        params = parameters((64, 100), (64, 100))
        optimizer = train(params, CruxyOptimizer(params, state_bits=8), 2)
        optimizer.register_hooks()
        before = state_of(optimizer)
        gradients(params, 2)
        params[1].grad[0, 0] = math.nan
        optimizer.step()
        after = state_of(optimizer)
        assert_same(after[1:], before[1:])
        assert not torch.equal(after[0]["exp_avg_codes"], before[0]["exp_avg_codes"])
