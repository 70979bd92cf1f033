"""The formulas that both frameworks share, written over an array namespace `xp`."""
