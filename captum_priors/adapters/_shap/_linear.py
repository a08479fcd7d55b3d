r"""LinearExplainer: :math:`\phi = T(c)\,(x - \mu)` with the coefficients :math:`c` of the module.

For independent features :math:`T(c) = \operatorname{diag}(c)`. For imputed ones :math:`T` is an
average over random orders of the features: linear in :math:`c`, and estimated by SHAP once, when
its explainer is made. That estimate is kept as it is, and what later changes of the coefficients
add to it is estimated from as many orders of our own.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_priors._engine._inference import leaves_inference_mode
from captum_priors._errors import NotDifferentiableError, expected_found
from captum_priors.adapters._shap._adapter import ShapAdapter, _array, number_of, table_of
from captum_priors.adapters._shap._torch_model import TorchModel, as_array


class LinearFamily(ShapAdapter):
    """Reads the coefficients off the torch module at every call."""

    coef: Any
    mean: np.ndarray
    M: int
    feature_perturbation: str
    avg_proj: np.ndarray
    valid_inds: np.ndarray
    cov: np.ndarray
    x_transform: np.ndarray
    mean_transformed: np.ndarray
    _slopes: Tensor | None = None
    _now: tuple[Tensor, Tensor] | None = None
    _steps: tuple[Tensor, Tensor] | None = None

    def _held(self) -> Any:
        return self._predict

    def _predict(self, rows: np.ndarray) -> np.ndarray:
        """Evaluate the linear model that SHAP was given."""
        coef, intercept = self._stock._parse_model(self.model)
        outputs: np.ndarray = rows @ np.asarray(coef).T + np.asarray(intercept)
        return outputs

    def _sample(self) -> tuple[Any, ...]:
        """Points that tell any affine function from any other, and from what is not affine."""
        n = len(self._original_mean())
        more = np.random.RandomState(0).standard_normal((8, n))
        return (np.concatenate([np.zeros((1, n)), np.eye(n), more]),)

    def _torch_model(self) -> TorchModel | None:
        if not self._bound and self._given is None:
            return None
        return super()._torch_model()

    @leaves_inference_mode  # what it keeps is for calls outside, too
    def _coefficients(self) -> tuple[Tensor, Tensor]:
        """Coefficients ``(features[, outputs])`` of the module, and its base value."""
        if self._now is not None:
            return self._now
        if self._steps is None:
            self._steps = unit_steps(self._original_mean())
        points, reads = self._steps
        # A copy, should the model work in place.
        outputs = self._model()(points.clone()).double()
        found = reads.to(outputs) @ outputs
        return found[:-1], found[-1]

    def _original_mean(self) -> np.ndarray:
        """Mean of all features; SHAP's own attribute loses some of them."""
        mean = getattr(self.masker, "mean", None)
        if mean is None:
            data = self.masker.data
            if isinstance(data, dict):
                mean = data["mean"]
            elif isinstance(data, tuple):
                mean = data[0]
            else:
                mean = data.mean(0)
        return np.asarray(mean, dtype=float).reshape(-1)

    def _base(self) -> Tensor:
        return self._coefficients()[1]

    def _transform(self, coef: Tensor) -> Tensor:
        """SHAP's matrix for imputed features, at these coefficients."""
        valid = torch.as_tensor(self.valid_inds, device=coef.device)
        together = torch.as_tensor((self.avg_proj > 0).astype(float)).to(coef)
        projected = together @ coef[valid]
        if self._slopes is None:
            self._slopes = transform_slopes(self.cov, self._n_orders())
        change = projected - torch.as_tensor(np.asarray(self.coef, dtype=float)).to(coef)
        made = torch.as_tensor(self.x_transform).to(coef)
        return made + torch.einsum("k,kij->ij", change, self._slopes.to(coef))

    def _n_orders(self) -> int:
        return int(self.nsamples)

    nsamples: int

    def _phi(self, rows: Any, coef: Tensor) -> Tensor:
        """Attributions ``(batch, features[, outputs])``."""
        mean: Any = np.asarray(self.mean, dtype=float)
        if self.feature_perturbation == "interventional":
            centred = torch.as_tensor(np.asarray(rows, dtype=float) - mean).to(coef)
            return centred * coef if coef.dim() == 1 else centred.unsqueeze(-1) * coef
        if coef.dim() > 1:
            raise NotDifferentiableError(
                expected_found(
                    "LinearExplainer with an Impute masker",
                    "a model with one output",
                    f"{coef.shape[1]}",
                    "SHAP has no such values; explain one output at a time.",
                )
            )
        x, mean = (torch.as_tensor(np.asarray(a, dtype=float)).to(coef) for a in (rows, mean))
        projection = torch.as_tensor(self.avg_proj).to(coef)
        transform = self._transform(coef)
        reduced = (x[:, torch.as_tensor(self.valid_inds)] @ projection.T) @ transform.T
        reduced = (reduced - transform @ mean) @ projection
        places = torch.as_tensor(self.valid_inds, device=coef.device)
        return x.new_zeros(len(x), self.M).index_copy(1, places, reduced)

    def _worker(self, args: tuple[Any, ...]) -> Any:
        table = table_of(args)
        if table is None:
            worker = super()._worker(args)
            worker._now = worker._coefficients()
            worker._fresh = worker._refreshed()
            return worker
        # All rows in a few operations: by themselves they would be many.
        self._check_constants(args)
        coef, base = self._coefficients()
        twin = self._stock_with(coef, base)
        twin._whole = self._phi(table, coef), base
        return twin

    _fresh: Any = None

    def _refreshed(self) -> Any:
        """Return SHAP's own explainer, of the module as it is now."""
        if self._fresh is not None:
            return self._fresh
        return self._stock_with(*self._coefficients())

    def _stock_with(self, coef: Tensor, base: Tensor) -> Any:
        twin = self._as_stock()
        slopes = coef.detach()
        if self.feature_perturbation == "interventional":
            twin.coef = slopes.cpu().numpy().T
        else:
            twin.x_transform = self._transform(slopes).cpu().numpy()
            twin.mean_transformed = twin.x_transform @ self.mean
        twin.mean = np.asarray(self.mean, dtype=float)  # SHAP would subtract in single precision
        twin.expected_value = number_of(base)
        return twin

    @leaves_inference_mode
    def shap_values(self, X: Any) -> Any:  # noqa: N803  # SHAP's name
        """Return an array, as SHAP."""
        if self._torch_model() is None:
            return self._stock.shap_values(self, X)
        with self._still():
            return self._stock.shap_values(self._refreshed(), _array(X))

    def explain_row(self, *row_args: Any, **options: Any) -> dict[str, Any]:
        """Explain one row, as SHAP."""
        if self._torch_model() is None:
            found: dict[str, Any] = self._stock.explain_row(self, *row_args, **options)
            return found
        row = as_array(row_args[0]).astype(float)
        with self._still():
            result: dict[str, Any] = self._stock.explain_row(self._refreshed(), row, **options)
            coef, base = self._coefficients()
            values = self._phi(row.reshape(1, -1), coef)[0]
            self._remember(values, base, result["values"])
        return result


def unit_steps(mean: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return zero and the unit vectors, and what reads an affine function off its values there.

    The second are rows, one for each coefficient and a last one for the value at the mean.

    Example:
        >>> import numpy as np
        >>> from captum_priors.adapters._shap._linear import unit_steps
        >>> points, reads = unit_steps(np.array([1.0, 2.0]))
        >>> (reads @ (3 * points[:, 0] + 4 * points[:, 1] + 5)).tolist()
        [3.0, 4.0, 16.0]
    """
    n = len(mean)
    differences = torch.cat([-torch.ones(n, 1), torch.eye(n)], 1).double()
    at_mean = torch.as_tensor(mean) @ differences
    at_mean[0] += 1
    return torch.eye(n + 1, n).roll(1, 0).double(), torch.cat([differences, at_mean[None]])


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
