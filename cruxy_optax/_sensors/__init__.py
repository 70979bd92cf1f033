"""What is measured of raw gradients."""
