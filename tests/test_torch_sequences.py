"""Random sequences of what users do, against a plain re-computation in float64.

`CRUXY_SEQUENCES=2000 python -m pytest tests/test_torch_sequences.py` runs more of them.
"""

import copy
import io
import os
import random

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from cruxy_control import Meta3, Signals, betas, meta_learning_rate  # noqa: E402
from cruxy_control.formulas.averaging import averaging_weight  # noqa: E402
from cruxy_torch import CruxyOptimizer  # noqa: E402
from cruxy_torch._native import library  # noqa: E402
from torch_released import OFF  # noqa: E402

SEQUENCES = int(os.environ.get("CRUXY_SEQUENCES", "120"))
PATHS = {"single": {"fused": False}, "foreach": {"foreach": True}, "native": {}}
SHAPES = [(3, 4), (5,), (), (2, 3, 2)]


class Reference:
    """The optimizer again: dictionaries, float64, one parameter at a time."""

    def __init__(self, law, lion, averaging):
        self.law, self.lion, self.averaging = law, lion, averaging
        self.state = law.init(np.float32(0.0), xp=np)
        self.count, self.kept = 0, {}

    def step(self, params, grads, loss, rates):
        """Parameters are float64 arrays by key, `grads` those of them that have one."""
        if not grads:
            return
        flat = np.concatenate([g.reshape(-1) for g in grads.values()])
        with np.errstate(all="ignore"):
            # The sums are float32: what overflows there is no step.
            norm = np.sqrt(np.float32((flat**2).sum()))
            powers = np.float32((np.abs(flat) ** self.law.gamma).sum())
            sigma = powers ** (1 / self.law.gamma)
            signals = Signals(*map(np.float32, (norm, sigma, loss)))
            self.state, controls = self.law.step(self.state, signals, xp=np)
        for key in grads:
            self.kept.setdefault(key, self.start(params[key]))
        if not controls.ok:
            return
        weight = averaging_weight(self.count * 1.0, self.averaging, xp=np)
        self.count += 1
        beta1, beta2 = map(float, betas(controls, 0.9, 0.99, xp=np))
        for key, g in grads.items():
            rate = meta_learning_rate(controls, np.float32(rates[key]), xp=np)
            rate = float(rate * controls.phase_scale)
            kept, x = self.kept[key], g * float(controls.clip_scale)
            if self.lion:
                u = np.sign(beta1 * kept["m"] + (1 - beta1) * x)
                kept["m"] = beta2 * kept["m"] + (1 - beta2) * x
            else:
                kept["m"] = beta1 * kept["m"] + (1 - beta1) * x
                kept["v"] = beta2 * kept["v"] + (1 - beta2) * x * x
                kept["b1"], kept["b2"] = kept["b1"] * beta1, kept["b2"] * beta2
                ahead = beta1 * kept["m"] + (1 - beta1) * x
                m_hat = ahead / (1 - beta1 * kept["b1"])
                u = m_hat / (np.sqrt(kept["v"] / (1 - kept["b2"])) + 1e-8)
            params[key] = params[key] - rate * (u + 0.01 * params[key])
        for key, kept in self.kept.items():
            if key in params:
                kept["average"] += weight * (params[key] - kept["average"])

    def start(self, p):
        zero = np.zeros_like(p)
        return {"m": zero, "v": zero, "b1": 1.0, "b2": 1.0, "average": p.copy()}


class Run:
    """One sequence: the optimizer and its reference, and what may be done to both."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.numbers = np.random.default_rng(seed)
        self.path = self.random.choice(list(PATHS))
        self.lion = self.random.random() < 0.3
        self.released = self.random.random() < 0.3
        self.law = OFF if self.released else Meta3()
        self.params, self.ours, self.next = {}, {}, 0
        self.frozen, self.rates, self.log = set(), {}, []
        first = [self.new() for _ in range(3)]
        self.optimizer = self.make([{"params": [self.params[k] for k in first], "lr": 0.01}])
        self.rates |= dict.fromkeys(first, 0.01)
        self.groups = [first]
        self.reference = Reference(self.law, self.lion, 16.0)

    def make(self, groups):
        return CruxyOptimizer(
            groups, betas=(0.9, 0.99), law=self.law, use_lion=self.lion, averaging=16.0,
            **PATHS[self.path],
        )  # fmt: skip

    def new(self):
        """A parameter and its twin; returns their key."""
        key, self.next = self.next, self.next + 1
        value = self.numbers.normal(size=self.random.choice(SHAPES))
        self.params[key] = torch.nn.Parameter(torch.tensor(value, dtype=torch.float32))
        self.ours[key] = np.asarray(self.params[key].detach().numpy(), np.float64)
        return key

    def grads(self):
        chosen = {}
        for key, p in self.params.items():
            if key not in self.frozen and self.random.random() < 0.9:
                g = self.numbers.normal(size=tuple(p.shape)).astype(np.float32)
                chosen[key] = np.asarray(g)
        return chosen

    def step(self, *, bad=False, scale=None):
        grads, loss = self.grads(), float(self.numbers.normal())
        if bad and grads and not self.released:  # a pass leaves only the bad tensor as it was
            key = self.random.choice(list(grads))
            grads[key] = np.full_like(grads[key], self.random.choice([np.nan, np.inf, 1e30]))
        given = {k: torch.tensor(g, dtype=torch.float32) for k, g in grads.items()}
        if self.optimizer._release is not None:
            if given:
                sum((self.params[k] * g).sum() for k, g in given.items()).backward()
            scale = None
        else:
            for k, p in self.params.items():
                p.grad = given.get(k) if scale is None or k not in given else given[k] * scale
        if scale is not None:
            self.optimizer.grad_scale = torch.tensor(scale, dtype=torch.float32)
            self.optimizer.found_inf = torch.tensor(0.0, dtype=torch.float32)
        self.optimizer.step(loss=loss)
        if scale is not None:
            del self.optimizer.grad_scale, self.optimizer.found_inf
        self.optimizer.zero_grad()
        wide = {k: g.astype(np.float64) for k, g in grads.items()}
        self.reference.step(self.ours, wide, loss, self.rates)

    def skip(self):
        self.step(bad=True)

    def scaled(self):
        self.step(scale=self.random.choice([8.0, 1024.0]))

    def freeze(self):
        key = self.random.choice(list(self.params))
        self.frozen ^= {key}

    def add(self):
        key = self.new()
        self.optimizer.add_param_group({"params": [self.params[key]], "lr": 0.02})
        self.rates[key] = 0.02
        self.groups.append([key])

    def replace(self):
        at = self.random.randrange(len(self.groups))
        place = self.random.randrange(len(self.groups[at]))
        old, key = self.groups[at][place], self.new()
        self.optimizer.state.pop(self.params[old], None)
        self.optimizer.param_groups[at]["params"][place] = self.params[key]
        if self.optimizer._release is not None:
            self.optimizer.register_hooks()
        del self.params[old], self.ours[old]
        self.reference.kept.pop(old, None)
        self.rates[key] = self.rates.pop(old)
        self.groups[at][place] = key

    def save_and_load(self):
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        file.seek(0)
        hooked = self.optimizer._release is not None
        self.optimizer.remove_hooks()
        groups = [{"params": [self.params[k] for k in keys]} for keys in self.groups]
        self.optimizer = self.make(groups)
        self.optimizer.load_state_dict(torch.load(file, weights_only=True))
        if hooked:
            self.optimizer.register_hooks()

    def copy(self):
        hooked = self.optimizer._release is not None
        self.optimizer.remove_hooks()
        self.optimizer, self.params = copy.deepcopy((self.optimizer, self.params))
        if hooked:
            self.optimizer.register_hooks()

    def average(self):
        before = {k: p.detach().clone() for k, p in self.params.items()}
        with self.optimizer.averaged():
            for key, p in self.params.items():
                if key in self.reference.kept:
                    self.close(p, self.reference.kept[key]["average"], f"average {key}")
        assert all(torch.equal(p, before[k]) for k, p in self.params.items())

    def hooks(self):
        if not self.released:
            return
        if self.optimizer._release is None:
            self.optimizer.register_hooks()
        else:
            self.optimizer.remove_hooks()

    def rate(self):
        at = self.random.randrange(len(self.groups))
        lr = self.random.choice([0.0, 0.003, 0.01])
        self.optimizer.param_groups[at]["lr"] = lr
        self.rates |= dict.fromkeys(self.groups[at], lr)

    def dtype(self):
        torch.set_default_dtype(self.random.choice([torch.float32, torch.float64, torch.bfloat16]))

    def close(self, got, wanted, what):
        got = got.detach().double().numpy()
        error = np.abs(got - wanted).max(initial=0.0)
        assert error <= 2e-4 * (1.0 + np.abs(wanted).max(initial=0.0)), (what, error, self.log)

    def play(self, length=14):
        actions = ["step"] * 6 + [
            "skip", "scaled", "freeze", "add", "replace", "save_and_load", "copy", "average",
            "hooks", "rate", "dtype",
        ]  # fmt: skip
        for _ in range(length):
            action = self.random.choice(actions)
            self.log.append(action)
            getattr(self, action)()
        for key, p in self.params.items():
            self.close(p, self.ours[key], f"parameter {key}")


@pytest.mark.parametrize("part", range(4))
def test_whatever_is_done_an_optimizer_computes_what_it_says(part):
    if not library.available():
        PATHS.pop("native", None)
    for seed in range(part, SEQUENCES, 4):
        run = Run(seed)
        try:
            run.play()
        except Exception as error:
            raise AssertionError(
                f"sequence {seed}: {run.path}, lion={run.lion}, released={run.released}, {run.log}"
            ) from error
        finally:
            torch.set_default_dtype(torch.float32)
