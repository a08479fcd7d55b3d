"""SHAP's explainers, made differentiable.

SHAP's own code runs, on a copy of the explainer; what it asks of the model is answered by torch
with its graph, and the arithmetic that it does on the answers is done again on tensors and held
against its own numbers: at every call, and for GradientExplainer and DeepExplainer at the first.
``shap`` is imported when the first explainer is adapted.
"""

from captum_priors.adapters._shap._adapter import ShapAdapter
from captum_priors.adapters._shap._registry import ROWS, adapter_of, is_shap, shap_refusal

__all__ = ["ROWS", "ShapAdapter", "adapter_of", "is_shap", "shap_refusal"]
