"""Published weights: reading files, recognising where they come from, and fitting them to a network."""

from .fit import LoadReport
from .load import load_weights

__all__ = ["LoadReport", "load_weights"]
