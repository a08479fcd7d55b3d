"""The engine: input gradients that can be trained on, and the conditions they are taken under."""

from captum_priors._engine._input_gradients import input_gradients
from captum_priors._engine._recompute import Program, Visit, keep_graph, recompute

__all__ = ["Program", "Visit", "input_gradients", "keep_graph", "recompute"]
