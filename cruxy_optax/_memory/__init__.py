"""What a run keeps in memory: fewer bits, rounding, and what it comes to."""
