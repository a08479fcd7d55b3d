r"""LinearExplainer and AdditiveExplainer: closed forms.

Linear: :math:`\phi = T(c)\,(x - \mu)` with the coefficients :math:`c` of the module. For
independent features :math:`T(c) = \operatorname{diag}(c)`. For imputed ones :math:`T` is an average
over random orders of the features: linear in :math:`c`, and estimated by SHAP once, when its
explainer is made. That estimate is kept as it is, and what later changes of the coefficients add to
it is estimated from as many orders of our own.

Additive: for :math:`f(x) = c + \sum_i g_i(x_i)`, each feature by itself, :math:`\phi_i = f(x_i e_i)
- f(0) - E[f(b_i e_i) - f(0)]`.

Private: ``_parse_model``, ``coef``, ``cov``, ``mean``, ``avg_proj``, ``x_transform``,
``valid_inds`` of LinearExplainer (0.51.0).
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_priors._errors import NotDifferentiableError, expected_found
from captum_priors.adapters.shap.adapter import ShapAdapter, explanation
from captum_priors.adapters.shap.model import table


class LinearAdapter(ShapAdapter):
    """Reads the coefficients off the torch module at every call."""

    options = ("silent",)
    draws = ()
    _slopes: Tensor | None = None

    def _function(self) -> Any:
        coef, intercept = self.explainer._parse_model(self.explainer.model)
        return lambda rows: rows @ np.asarray(coef).T + np.asarray(intercept)

    def _sample(self) -> tuple[Any, ...]:
        """Points that tell any affine function from any other, and from what is not affine."""
        n = len(self._mean())
        more = np.random.RandomState(0).standard_normal((8, n))
        return (np.concatenate([np.zeros((1, n)), np.eye(n), more]),)

    def _mean(self) -> np.ndarray:
        """Mean of all features; SHAP's own attribute loses some of them."""
        found, data = getattr(self.explainer.masker, "mean", None), self.explainer.masker.data
        if found is None and isinstance(data, (dict, tuple)):
            found = data["mean"] if isinstance(data, dict) else data[0]
        return table(np.mean(table(data), 0) if found is None else found).reshape(-1)

    def _coefficients(self) -> tuple[Tensor, Tensor]:
        """Coefficients ``(features[, outputs])`` of the module, and its base value."""
        mean = self._mean()
        outputs = self._torch(np.concatenate([np.zeros((1, len(mean))), np.eye(len(mean))]))
        coef = outputs[1:] - outputs[0]
        return coef, outputs[0] + torch.as_tensor(mean).to(coef) @ coef

    def _base(self) -> Tensor:
        return self._coefficients()[1]

    def _explain(self, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        coef, base = self._coefficients()
        rows = args[0] if isinstance(args[0], Tensor) else torch.as_tensor(table(args[0]))
        x, stock = rows.to(coef), self.explainer
        if stock.feature_perturbation != "interventional":
            phi = self._imputed(x, coef)
        elif coef.dim() == 1:
            phi = (x - torch.as_tensor(self._mean()).to(coef)) * coef
        else:
            phi = (x - torch.as_tensor(self._mean()).to(coef)).unsqueeze(-1) * coef
        return _explanation(self, phi, base, args[0])

    def _imputed(self, x: Tensor, coef: Tensor) -> Tensor:
        stock = self.explainer
        if coef.dim() > 1:
            raise NotDifferentiableError(
                expected_found(
                    "LinearExplainer with an Impute masker",
                    "a model with one output",
                    f"{coef.shape[1]}",
                    "SHAP has no such values; explain one output at a time.",
                )
            )
        mean, projection, made, first, together = (
            torch.as_tensor(np.asarray(a, dtype=float)).to(coef)
            for a in (
                stock.mean,
                stock.avg_proj,
                stock.x_transform,
                stock.coef,
                stock.avg_proj > 0,
            )
        )
        kept = torch.as_tensor(stock.valid_inds, device=coef.device)
        if self._slopes is None:
            self._slopes = transform_slopes(stock.cov, int(stock.nsamples))
        change = together @ coef[kept] - first
        transform = made + torch.einsum("k,kij->ij", change, self._slopes.to(coef))
        phi = (x[:, kept] @ projection.T - mean) @ transform.T @ projection
        return torch.zeros_like(x).index_copy(1, kept, phi)


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


class AdditiveAdapter(ShapAdapter):
    """Evaluates each feature by itself."""

    options = ("silent",)
    draws = ()

    def _sample(self) -> tuple[Any, ...]:
        return (table(self.explainer.masker.data[:8]),)

    def _parts(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return f of each feature of the rows alone, each feature's mean beyond f(0), and f(0)."""
        background = torch.as_tensor(table(self.explainer.masker.data)).to(rows)
        n = background.shape[1]
        alone = torch.diag_embed(torch.cat([background, rows])).reshape(-1, n)
        outputs = self._torch(torch.cat([torch.zeros(1, n).to(rows), alone])).reshape(-1)
        each = outputs[1:].reshape(-1, n)
        n_background = len(background)
        return each[n_background:], each[:n_background].mean(0) - outputs[0], outputs[0]

    def _base(self) -> Tensor:
        _, offsets, zero = self._parts(self._torch.like().new_zeros(0, self.explainer.masker.shape[1]))
        return zero + offsets.sum()

    def _explain(self, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        rows = args[0] if isinstance(args[0], Tensor) else torch.as_tensor(table(args[0]))
        each, offsets, zero = self._parts(rows.to(self._torch.like().device).double())
        return _explanation(self, each - zero - offsets, zero + offsets.sum(), args[0])


def _explanation(adapter: ShapAdapter, phi: Tensor, base: Tensor, data: Any) -> Any:
    """Build what SHAP's own call returns, in which each feature's value is its main effect."""
    names, n = adapter.explainer.feature_names, len(phi)
    effects = phi.detach().cpu().numpy()
    if isinstance(adapter, LinearAdapter):
        effects = effects.reshape(*phi.shape[:2], -1)
    return explanation(phi, base.expand(n, *base.shape), data, names, main_effects=effects)
