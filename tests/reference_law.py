"""The control law read a second time, in plain float64 Python: what the implementation must equal.

Written from the equations alone, with branches, lists and floats, so that it shares no line and no
trick with `cruxy_control`. Each class takes one step's norms and loss and returns what an
optimizer would use with `lr = 1`, `b1 = 0.9`, `b2 = 0.999`.
"""

import math

BETA1, BETA2 = 0.9, 0.999


class _Average:
    def __init__(self, decay):
        self.decay, self.value, self.weight = decay, 0.0, 0.0

    def see(self, x):
        self.weight = self.decay * self.weight + (1 - self.decay)
        self.value += (1 - self.decay) / self.weight * (x - self.value)


class _Windows:
    def __init__(self):
        self.fast, self.slow, self.seen = _Average(0.9), _Average(0.999), 0

    def see(self, sigma):
        if self.slow.value > 0:
            sigma = min(sigma, 10 * self.slow.value)
        self.fast.see(sigma)
        self.slow.see(sigma)
        self.seen += 1

    def misled(self, sigma):
        return 0 < self.seen < 10 and 0 < 10 * sigma < self.slow.value


def _clip(x, lower, upper):
    return min(max(x, lower), upper)


class ReferenceV1:
    """Two windows over the squared norm, and PD control."""

    def __init__(self):
        self.windows, self.error, self.u = _Windows(), 0.0, 0.0

    def step(self, norm, gamma_norm, loss):
        ok = math.isfinite(norm) and math.isfinite(gamma_norm)
        if ok:
            if self.windows.misled(norm**2):
                self.windows = _Windows()
            self.windows.see(norm**2)
            fast, slow = self.windows.fast.value, self.windows.slow.value
            error = (fast - slow) / (slow + 1e-8)
            self.u = math.tanh((0.05 * error + 0.02 * (error - self.error)) / 0.1)
            self.error = error
        fast, slow = self.windows.fast.value, self.windows.slow.value
        phi = fast / (fast + slow + 1e-8)
        if phi > 0.55:
            rate = 1 - 0.3 * phi
        elif phi < 0.45:
            rate = 1 + 0.2 * (1 - phi)
        else:
            rate = 1.0
        beta2 = _clip(BETA2 * (1 + 0.15 * self.u), 0.9, 0.9999)
        if not ok:
            return {"rate": 0.0, "beta1": 1.0, "beta2": 1.0, "phase": phi}
        return {"rate": rate, "beta1": BETA1, "beta2": beta2, "phase": phi}


class _V2Sensors:
    def __init__(self):
        self.windows, self.history, self.rising = _Windows(), [], 0
        self.bend, self.pair = 0.0, None

    def see(self, norm, gamma_norm, loss):
        if self.windows.misled(gamma_norm):
            self.windows, self.history, self.rising = _Windows(), [], 0
        first, before = not self.history, self.windows.fast.value
        self.windows.see(gamma_norm)
        fast = self.windows.fast
        self.history = [fast.value, *self.history][:14]
        weights = [math.exp(-k / 5) for k in range(len(self.history))]
        past = sum(w * v for w, v in zip(weights, self.history, strict=True)) / sum(weights)
        fast.value += 0.2 * (past - fast.value)
        self.rising = self.rising + 1 if fast.value > before and not first else 0
        if math.isfinite(loss):
            if self.pair is not None:
                slope = _clip((loss - self.pair[0]) / (self.pair[1] + 1e-8), -1, 1)
                self.bend = 0.95 * self.bend + 0.05 * slope
            self.pair = (loss, norm)

    @property
    def beta1(self):
        return _clip(BETA1 * (1 + 0.15 * math.tanh((self.bend - 0.01) / 0.05)), 0.85, 0.95)

    @property
    def threshold(self):
        return 1 + 0.5 * math.sqrt(self.windows.fast.value / (self.windows.slow.value + 1e-8))

    @property
    def warning(self):
        surge = self.windows.fast.value / (self.windows.slow.value + 1e-8) > 2.5
        return 0.5 * surge + 0.2 * (abs(self.bend) > 0.1) + 0.3 * (self.rising >= 5)


class ReferenceV2:
    """Gamma norm with memory, curvature, predictive clipping, early warning."""

    def __init__(self):
        self.sensors, self.error, self.u, self.scale = _V2Sensors(), 0.0, 0.0, 1.0

    def step(self, norm, gamma_norm, loss):
        ok = math.isfinite(norm) and math.isfinite(gamma_norm)
        if ok:
            self.sensors.see(norm, gamma_norm, loss)
        fast, slow = self.sensors.windows.fast.value, self.sensors.windows.slow.value
        phi = fast / (fast + slow + 1e-8) * (1 + 0.1 * math.tanh(self.sensors.bend))
        emergency = self.sensors.warning > 0.7
        if ok:
            error = (fast - slow) / (slow + 1e-8)
            heat = 0.15 if fast > slow else 0.08 if fast < slow else 0.1
            self.u = math.tanh((0.05 * error + 0.02 * (error - self.error)) / heat)
            self.error = error
            if phi > 0.55:
                self.scale *= math.exp(-0.15 * (phi - 0.55))
            elif phi < 0.50:
                self.scale *= 1 + 0.08 * (0.55 - phi)
            self.scale = _clip(self.scale * (0.5 if emergency else 1.0), 1e-3, 1.0)
        shown = {
            "phase": phi,
            "clip_threshold": self.sensors.threshold,
            "warning": self.sensors.warning,
            "curvature": self.sensors.bend,
        }
        if not ok:
            return {"rate": 0.0, "beta1": 1.0, "beta2": 1.0, **shown}
        beta2 = _clip(BETA2 * (1 + 0.15 * self.u), 0.9, 0.9999)
        beta2 = min(beta2 + 0.01, 0.9999) if emergency else beta2
        return {"rate": self.scale, "beta1": self.sensors.beta1, "beta2": beta2, **shown}


class ReferenceMeta3:
    """The slow loop every ten steps, the fast loop every step."""

    def __init__(self):
        self.sensors, self.reference, self.t = _V2Sensors(), [], 0
        self.eta, self.beta2 = 1.0, BETA2

    def step(self, norm, gamma_norm, loss):
        ok = math.isfinite(norm) and math.isfinite(gamma_norm)
        if ok:
            if self.sensors.windows.misled(gamma_norm):
                self.reference = []
            self.sensors.see(norm, gamma_norm, loss)
            self.reference = [*self.reference, self.sensors.windows.fast.value][-50:]
            self.t += 1
            if self.t % 10 == 0 and self.t >= 2:
                mean = sum(self.reference) / len(self.reference)
                z = (self.sensors.windows.fast.value - mean) / (mean + 1e-6)
                self.eta = _clip(self.eta * math.exp(-0.05 * math.tanh(z)), 0.01, 10.0)
                self.beta2 += 0.03 * math.tanh(z) * (1 - self.beta2)
        fast, slow = self.sensors.windows.fast.value, self.sensors.windows.slow.value
        phi = fast / (fast + slow + 1e-8)
        shown = {
            "phase": phi,
            "clip_threshold": self.sensors.threshold,
            "warning": self.sensors.warning,
            "curvature": self.sensors.bend,
        }
        if not ok:
            return {"rate": 0.0, "beta1": 1.0, "beta2": 1.0, **shown}
        beta2 = _clip(self.beta2 * (1 - 0.3 * phi), 0.9, 0.99999)
        return {
            "rate": self.eta * (1 - 0.5 * phi),
            "beta1": self.sensors.beta1,
            "beta2": beta2,
            **shown,
        }
