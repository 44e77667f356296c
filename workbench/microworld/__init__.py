"""The microworld: generated text with known truth and known entropy, and real docstrings."""

from workbench.microworld.natural import stdlib_docstrings, stdlib_sources
from workbench.microworld.sampling import Sample, World

__all__ = ["Sample", "World", "stdlib_docstrings", "stdlib_sources"]
