"""What somebody who comes from AdamW does on the first day, in PyTorch and in JAX."""

import subprocess
import sys
import warnings

import jax.numpy as jnp
import pytest
import torch

import cruxy_optax
import cruxy_torch
from cruxy_control import Meta3, PlateauGuard, SelfDriving
from cruxy_control.extras import require
from cruxy_torch import CruxyOptimizer


def parameter():
    return torch.nn.Parameter(torch.tensor([1.0, 2.0, -3.0]))


def group(*args, **kwargs):
    return CruxyOptimizer([parameter()], *args, **kwargs).param_groups[0]


class TestCalledLikeAdamW:
    def test_arguments_stand_in_its_order(self):
        own = group(0.01, (0.8, 0.9), 1e-6, 0.2, False)
        theirs = torch.optim.AdamW([parameter()], 0.01, (0.8, 0.9), 1e-6, 0.2, False)
        for name in ("lr", "betas", "eps", "weight_decay"):
            assert own[name] == theirs.param_groups[0][name]

    def test_what_cannot_be_meant_is_refused(self):
        with pytest.raises(ValueError, match="amsgrad must be False, got True"):
            group(amsgrad=True)
        with pytest.raises(TypeError, match=r"got 'self_driving'.*give mode='self_driving'"):
            group(0.01, "self_driving")

    @pytest.mark.parametrize(
        ("mode", "same"), [("meta_lion", "meta3"), ("self_driving_lion", "self_driving")]
    )
    def test_the_names_of_jax_are_modes(self, mode, same):
        ours, theirs = group(mode=mode), group(mode=same, use_lion=True)
        assert {k: v for k, v in ours.items() if k not in ("params", "controller")} == {
            k: v for k, v in theirs.items() if k not in ("params", "controller")
        }

    def test_an_unknown_mode_is_told_all_there_are(self):
        with pytest.raises(
            ValueError, match=r"mode must be one of 'meta3', 'meta_lion'.*got 'adam'"
        ):
            group(mode="adam")

    def test_the_loss_may_come_in_the_place_of_a_closure(self):
        shown = []
        for args, kwargs in (((2.5,), {}), ((torch.tensor(2.5),), {}), ((), {"loss": 2.5})):
            x = parameter()
            optimizer = CruxyOptimizer([x])
            x.grad = torch.ones(3)
            optimizer.step(*args, **kwargs)
            shown.append(optimizer.telemetry()["loss"])
        assert shown == [2.5] * 3
        with pytest.raises(TypeError, match=r"closure must be callable, got 1\.0 and loss=2\.0"):
            optimizer.step(1.0, loss=2.0)

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({}, "CruxyOptimizer under Meta3() ("),
            ({"mode": "self_driving", "total_steps": 9}, "under SelfDriving(total_steps=9) ("),
            (
                {"law": PlateauGuard(Meta3(), patience=7)},
                "under PlateauGuard(law=Meta3(), patience=7)",
            ),
            ({"law": SelfDriving(gain=2.0)}, "under SelfDriving(gain=2.0) ("),
        ],
    )
    def test_it_shows_its_law(self, options, text):
        assert text in repr(CruxyOptimizer([parameter()], **options))


class TestClippedBefore:
    def run(self, steps, clip):
        torch.manual_seed(0)
        layer = torch.nn.Linear(6, 4)
        optimizer = CruxyOptimizer(layer.parameters())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(steps):
                optimizer.zero_grad()
                (layer(torch.randn(8, 6)) - 3.0).square().sum().backward()
                if clip:
                    torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
                optimizer.step()
        return [str(w.message) for w in caught if "clips gradients" in str(w.message)]

    def test_it_is_said_once(self):
        (message,) = self.run(30, clip=True)
        assert message.startswith("the gradient norm is 1 step after step")

    def test_gradients_as_they_are_raise_no_alarm(self):
        assert self.run(30, clip=False) == []

    def test_nor_does_a_gradient_that_never_changes(self):
        x = parameter()
        optimizer = CruxyOptimizer([x])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(15):
                x.grad = torch.ones(3)
                optimizer.step()


def test_a_loss_under_the_wrong_name_is_not_swallowed_in_jax():
    tx, params = cruxy_optax.meta3(0.1), jnp.ones(2)
    with pytest.raises(TypeError, match=r"takes the loss as value=.*value=loss"):
        tx.update(params, tx.init(params), params, loss=1.0)


def test_packages_say_their_version():
    assert cruxy_optax.__version__ == cruxy_torch.__version__
    assert cruxy_optax.__version__[0].isdigit()


def test_what_is_missing_is_named_with_its_extra():
    with pytest.raises(ModuleNotFoundError, match=r'of which nowhere is not .*"cruxy-optax\[hf\]"'):
        require("cruxy_torch.integrations", "hf", ["torch", "nowhere"])


@pytest.mark.parametrize(
    ("package", "lacks", "extra"),
    [("cruxy_optax", "jax", "jax"), ("cruxy_torch", "torch", "torch")],
)
def test_an_import_without_its_extra_says_which(package, lacks, extra):
    code = (
        "import importlib.util as u; found = u.find_spec\n"
        f"u.find_spec = lambda name, *rest: None if name == {lacks!r} else found(name, *rest)\n"
        f"import {package}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f'pip install "cruxy-optax[{extra}]"' in done.stderr.splitlines()[-1]
