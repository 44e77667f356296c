"""Decomposition of a matrix under the second moment of its inputs, and the layer holding it."""
