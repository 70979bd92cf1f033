"""What one step applies to the tensors of a group: the controller's decisions as a few scalars."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


def scalar(number: Any, dtype: torch.dtype) -> Tensor:
    """A number as a 0-d tensor on the host, whatever device is the default; a tensor stays there.

    Args:
        number: of the controller's namespace.
        dtype: of the tensor.
    """
    device = number.device if isinstance(number, Tensor) else "cpu"
    return torch.as_tensor(number, dtype=dtype, device=device)


class Orders(NamedTuple):
    """Scalars of the controller's namespace: float32, but for `ok` and `key`.

    The C library takes them as numbers, everything else as tensors.

    Attributes:
        rate: the learning rate with all its factors.
        beta1: decay rate of the first moment.
        beta2: decay rate of the second moment.
        scale: factor on the raw gradient: clipping, loss scaling and the sign of `maximize`.
        ok: whether the step counts; where false the rate is 0 and both decay rates are 1.
        key: of this step's random bits, int32.
        limits: the largest rate of each tensor of the group, a vector; `None` for no limit.
        average_weight: the weight of the new parameters in their average.
        average_pull: by which share of their distance from it the parameters are pulled on, away
            from their average, before that moves; `None` for no pull.
        sign_weight: factor on the sign's part of a direction that blends one; 1 for none.
        decay_scale: factor on the weight decay; `None` where the law does not move it.
    """

    rate: Any
    beta1: Any
    beta2: Any
    scale: Any
    ok: Any
    key: Any
    limits: Any = None
    average_weight: Any = 0.0
    sign_weight: Any = 1.0
    decay_scale: Any = None
    average_pull: Any = None

    def guarded(self, ok: Any, factor: Any, *, xp: Any) -> "Orders":
        """The same for a gradient that counts where `ok`, and then is multiplied by `factor`."""
        pull = self.average_pull
        return self._replace(
            rate=xp.where(ok, self.rate, 0.0),
            beta1=xp.where(ok, self.beta1, 1.0),
            beta2=xp.where(ok, self.beta2, 1.0),
            scale=self.scale * xp.where(ok, factor, 1.0),
            ok=ok,
            average_pull=None if pull is None else xp.where(ok, pull, 0.0),
        )

    def to(self, device: torch.device) -> "Orders":
        """The same as 0-d tensors on a device."""
        if isinstance(self.ok, Tensor):
            return Orders(
                *(v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for v in self)
            )
        steered = self.decay_scale is not None
        numbers = [self.rate, self.beta1, self.beta2, self.scale]
        numbers += [self.average_weight, self.sign_weight, self.decay_scale if steered else 1.0]
        pulls = self.average_pull is not None
        numbers.append(self.average_pull if pulls else 0.0)
        numbers = torch.tensor(list(map(float, numbers)), dtype=torch.float32, device=device)
        rate, beta1, beta2, scale, weight, sign_weight, decay_scale, pull = numbers.unbind()
        return Orders(
            rate=rate,
            beta1=beta1,
            beta2=beta2,
            scale=scale,
            ok=torch.full((), bool(self.ok), dtype=torch.bool, device=device),
            key=int(self.key),
            limits=None if self.limits is None else self.limits.to(device),
            average_weight=weight,
            sign_weight=sign_weight,
            decay_scale=decay_scale if steered else None,
            average_pull=pull if pulls else None,
        )
