r"""LinearExplainer and AdditiveExplainer: closed forms.

Linear: :math:`\phi = T(c)\,(x - \mu)` with the coefficients :math:`c` of the module. For
independent features :math:`T(c) = \operatorname{diag}(c)`. For imputed ones :math:`T` is an average
over random orders of the features: linear in :math:`c`, and estimated by SHAP once, when its
explainer is made. That estimate is kept as it is, and what later changes of the coefficients add to
it is estimated from as many orders of our own.

Additive: for :math:`f(x) = c + \sum_i g_i(x_i)`, each feature by itself, :math:`\phi_i = f(x_i e_i)
- f(0) - E[f(b_i e_i) - f(0)]`.

Private: what LinearExplainer keeps, ``_parse_model``, ``coef``, ``cov``, ``mean``, ``avg_proj``,
``x_transform``, ``valid_inds`` (0.51.0).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_priors.adapters.shap.adapter import ShapAdapter, explanation
from captum_priors.adapters.shap.model import as_array, numbers, refused


class AdditiveAdapter(ShapAdapter):
    """Evaluates each feature by itself."""

    mechanism = "differences of recorded outputs"
    draws = ()

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
        return self._phi(self._rows(self.explainer.masker.data[:0]))[1]

    def _rows(self, rows: Any) -> Tensor:
        """Rows in double precision on the model's device, with the graph that they have."""
        given = rows if isinstance(rows, Tensor) else torch.as_tensor(numbers(rows))
        return given.to(self._torch.convert(np.zeros(0)).device).double()

    def _explain(self, args: Sequence[Any], options: dict[str, Any]) -> Any:
        phi, base = self._phi(self._rows(args[0]))
        names = self.explainer.feature_names
        effects = self._main_effects(as_array(phi))
        base = base.expand(len(phi), *base.shape)
        return explanation(phi, base, args[0], names, main_effects=effects)

    def _main_effects(self, values: np.ndarray) -> np.ndarray:
        """Return the values in the shape in which SHAP's call gives them once more."""
        return values


class LinearAdapter(AdditiveAdapter):
    """Reads the coefficients off the torch module at every call."""

    mechanism = "coefficients read off the module"

    held_fixed = "orders of imputed features"
    _slopes: Tensor | None = None

    def _function(self) -> Any:
        coef, intercept = map(np.asarray, self.explainer._parse_model(self.explainer.model))
        return lambda rows: rows @ coef.T + intercept

    def _sample(self) -> Sequence[Any]:
        """Points that tell any affine function from any other, and from what is not affine."""
        n = len(self._mean())
        more = np.random.RandomState(0).standard_normal((8, n))
        return [np.concatenate([np.zeros((1, n)), np.eye(n), more])]

    def _mean(self) -> np.ndarray:
        """Mean of all features; SHAP's own attribute loses some of them."""
        found, data = getattr(self.explainer.masker, "mean", None), self.explainer.masker.data
        if found is None and isinstance(data, (dict, tuple)):
            found = data["mean"] if isinstance(data, dict) else data[0]
        return (numbers(data).mean(0) if found is None else numbers(found)).reshape(-1)

    def _phi(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = torch.as_tensor(self._mean()).to(x)
        outputs = self._torch(torch.cat([x.new_zeros(1, len(mean)), torch.eye(len(mean)).to(x)]))
        coef = outputs[1:] - outputs[0]  # (features[, outputs])
        base = outputs[0] + mean @ coef
        if self.explainer.feature_perturbation != "interventional":
            return self._imputed(x, coef), base
        centred = x - mean
        return (centred if coef.dim() == 1 else centred.unsqueeze(-1)) * coef, base

    def _base(self) -> Tensor:
        return self._phi(self._rows(self._mean()[None]))[1]

    def _imputed(self, x: Tensor, coef: Tensor) -> Tensor:
        if coef.dim() > 1:
            raise refused(
                "LinearExplainer with an Impute masker",
                "a model with one output",
                f"{coef.shape[1]}",
                "SHAP has no such values; explain one output at a time.",
            )
        stock = self.explainer
        if self._slopes is None:
            self._slopes = transform_slopes(stock.cov, int(stock.nsamples))
        mean, projection, transform, before, slopes = (
            torch.as_tensor(np.asarray(a, dtype=float)).to(x)
            for a in (stock.mean, stock.avg_proj, stock.x_transform, stock.coef, self._slopes)
        )
        kept = torch.as_tensor(stock.valid_inds, device=x.device)
        change = (projection > 0).to(x) @ coef[kept] - before
        transform = transform + torch.einsum("k,kij->ij", change, slopes)
        phi = (x[:, kept] @ projection.T - mean) @ transform.T @ projection
        return torch.zeros_like(x).index_copy(1, kept, phi)

    def _main_effects(self, values: np.ndarray) -> np.ndarray:
        return values.reshape(*values.shape[:2], -1)


def transform_slopes(covariance: np.ndarray, n_orders: int) -> Tensor:
    r"""Derivative of SHAP's transform by each coefficient, ``(coefficients, features, features)``.

    With :math:`R_S = \Sigma_{\cdot S}\Sigma_{SS}^{-1}`, the prediction of all features from those
    in :math:`S`, feature :math:`i` that joins :math:`S` receives :math:`c_i x_i + c_{\bar{S i}}
    R_{Si} x_{Si} - c_{\bar S} R_S x_S`, on average over the orders.
    """
    n = len(covariance)
    random = np.random.RandomState(0)
    slopes = np.zeros((n, n, n))
    for _ in range(n_orders):
        order = random.permutation(n)
        before = np.zeros((n, 0))
        for j, i in enumerate(order):
            known, rest = order[: j + 1], order[j + 1 :]
            after = np.linalg.solve(covariance[np.ix_(known, known)], covariance[known]).T
            slopes[i, i, i] += 1
            slopes[rest[:, None], i, known] += after[rest]
            slopes[order[j:, None], i, order[:j]] -= before[order[j:]]
            before = after
    return torch.as_tensor(slopes / n_orders)
