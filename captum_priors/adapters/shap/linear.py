r"""LinearExplainer and AdditiveExplainer: closed forms.

Linear, with independent features: :math:`\phi = c\,(x - \mu)` with the coefficients :math:`c` of
the module. Additive: for :math:`f(x) = c + \sum_i g_i(x_i)`, each feature by itself, :math:`\phi_i
= f(x_i e_i) - f(0) - E[f(b_i e_i) - f(0)]`.

Private: what LinearExplainer keeps, ``_parse_model``, ``mean`` and ``feature_perturbation``
(0.51.0).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_priors.adapters.shap.adapter import Options, ShapAdapter, explanation
from captum_priors.adapters.shap.model import numbers, refused


class AdditiveAdapter(ShapAdapter):
    """Evaluates each feature by itself."""

    mechanism = "differences of recorded outputs"
    draws = ()
    # The axes behind rows and features in which SHAP's call gives the values once more.
    _effect: tuple[int, ...] = ()

    def _sample(self) -> Sequence[Any]:
        return [numbers(self.explainer.masker.data[:8])]

    def _phi(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Attributions ``(rows, features[, outputs])``, and the base value."""
        background = torch.as_tensor(numbers(self.explainer.masker.data)).to(x)
        n = background.shape[1]
        alone = torch.diag_embed(torch.cat([background, x])).flatten(0, 1)
        outputs = self._torch(torch.cat([x.new_zeros(1, n), alone])).flatten()
        references, values = outputs[1:].reshape(-1, n).split([len(background), len(x)])
        offsets = references.mean(0) - outputs[0]
        return values - outputs[0] - offsets, outputs[0] + offsets.sum()

    def _base(self) -> Tensor:
        return self._phi(self._rows(self._sample()[0][:1]))[1]

    def _rows(self, rows: Any) -> Tensor:
        """Rows in double precision on the model's device, with the graph that they have."""
        given = rows if isinstance(rows, Tensor) else torch.as_tensor(numbers(rows))
        return given.to(self._torch.convert(np.zeros(0)).device).double()

    def _explain(self, rows: Any, options: Options) -> Any:
        phi, base = self._phi(self._rows(rows))
        effects = numbers(phi).reshape(*phi.shape[:2], *self._effect)
        base = base.expand(len(phi), *base.shape)
        return explanation(phi, base, rows, self.explainer.feature_names, main_effects=effects)


class LinearAdapter(AdditiveAdapter):
    """Reads the coefficients off the torch module at every call."""

    mechanism = "coefficients read off the module"
    _effect = (-1,)

    def _start(self) -> None:
        if self.explainer.feature_perturbation != "interventional":
            raise refused(
                "`masker` of LinearExplainer",
                "independent features (shap.maskers.Independent or Partition)",
                "imputed ones",
                "SHAP averages those only once, for old coefficients: use an Independent masker.",
            )

    def _function(self) -> Any:
        coef, intercept = map(np.asarray, self.explainer._parse_model(self.explainer.model))
        return lambda rows: rows @ coef.T + intercept

    def _sample(self) -> Sequence[Any]:
        """Points that tell any affine function from any other, and from what is not affine."""
        n = self.explainer.M
        more = np.random.RandomState(0).standard_normal((8, n))
        return [np.concatenate([np.zeros((1, n)), np.eye(n), more])]

    def _phi(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = torch.as_tensor(numbers(self.explainer.mean).reshape(-1)).to(x)
        outputs = self._torch(torch.cat([x.new_zeros(1, len(mean)), torch.eye(len(mean)).to(x)]))
        coef = outputs[1:] - outputs[0]  # (features[, outputs])
        centred = x - mean
        phi = (centred if coef.dim() == 1 else centred.unsqueeze(-1)) * coef
        return phi, outputs[0] + mean @ coef
