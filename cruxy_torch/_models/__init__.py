"""Whole models by name: what they take, and how they are loaded."""
