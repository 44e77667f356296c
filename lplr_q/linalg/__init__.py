"""Rotations, block LDL, rounding with feedback, low-rank steps."""
