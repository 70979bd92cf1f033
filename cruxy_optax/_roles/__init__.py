"""What each parameter of a tree is: labels, masks, rates and tables."""

from cruxy_optax._roles.labels import label_roles, role_mask
from cruxy_optax._roles.parameters import labelled

__all__ = ["label_roles", "labelled", "role_mask"]
