"""What is measured of raw gradients, parameters and losses."""
