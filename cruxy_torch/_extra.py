"""Says what to install where PyTorch is missing, before anything needs it."""

from cruxy_control.extras import require

require("cruxy_torch", "torch", ("numpy", "torch"))
