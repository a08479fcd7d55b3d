"""What an adapter's call returns: SHAP's Explanation, with tensors beside its arrays."""

import sys
from typing import Any

from torch import Tensor

from captum_priors.adapters._shap._door import shap

_NAME = "DifferentiableExplanation"


def _make() -> type:
    def __getstate__(self: Any) -> dict[str, Any]:  # noqa: N807  # copied and pickled without
        return {k: v for k, v in vars(self).items() if k not in ("tensor", "tensor_base")}

    members = {
        "__module__": __name__,
        "__doc__": "A ``shap.Explanation`` with its ``tensor`` and ``tensor_base`` beside it.",
        "__getstate__": __getstate__,
    }
    made: type = type(shap().Explanation)(_NAME, (shap().Explanation,), members)
    return made


def __getattr__(name: str) -> Any:
    if name != _NAME:
        raise AttributeError(name)
    setattr(sys.modules[__name__], name, _make())
    return globals()[name]


def with_tensors(explanation: Any, values: Tensor | None, base: Tensor | None) -> Any:
    """Put the tensors beside the arrays of an Explanation.

    A graph cannot be copied, and SHAP's plots copy: the tensors stay with this object and are not
    on its slices, copies and pickles.
    """
    explanation.__class__ = getattr(sys.modules[__name__], _NAME)
    explanation.tensor, explanation.tensor_base = values, base
    return explanation
