"""Whole models by name: what they take."""
