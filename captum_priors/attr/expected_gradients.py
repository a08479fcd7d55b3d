"""Expected gradients (Erion et al. 2021) as a Captum attribution method."""

from dataclasses import replace
from typing import Any, Literal

import torch
from captum.attr import GradientAttribution
from torch import Tensor

from captum_priors._captum import call_baselines, forward_args
from captum_priors._checks import (
    check_distribution,
    check_floating,
    check_forward_func,
    check_inputs,
    check_target,
    count,
)
from captum_priors._errors import one_of, refusal
from captum_priors._rows import Rows
from captum_priors._types import DIFFERENTIATIONS, Differentiation, TensorOrTuple
from captum_priors.attr.path_sum import Draws, PathSum
from captum_priors.engine import attribution_call
from captum_priors.engine.model import call_beside
from captum_priors.outputs import SeveralOutputs

Estimator = Literal["control_variate", "monte_carlo"]
ESTIMATORS = ("control_variate", "monte_carlo")


class ExpectedGradients(GradientAttribution):
    r"""Attributions averaged over reference inputs, which a loss can be built on.

    .. math:: \mathrm{EG}(x) = \mathbb{E}_{x' \sim D,\, \alpha \sim U(0, 1)}
        \left[(x - x') \odot \nabla f(x' + \alpha (x - x'))\right]

    (Erion, Janizek, Sturmfels, Lundberg, Lee 2021). The attributions of an example sum
    to :math:`f(x) - \mathbb{E}_{x'} f(x')` (completeness). Takes every call that
    :class:`captum.attr.GradientShap` takes. The result carries its graph to the model's parameters,
    and to inputs that require gradients; under ``torch.no_grad`` it is detached.

    Args:
        forward_func: A model, or any function of the inputs.
        multiply_by_inputs: Whether to multiply by :math:`x - x'`; without, the result is the
            expected gradient itself.
        differentiation: ``"double_backprop"`` (exact), ``"recompute"`` (exact, in memory that does
            not grow with the number of samples) or ``"finite_difference"`` (first derivatives
            only: for fused attention and compiled models).

    Example:
        For a linear model any number of samples gives :math:`w \odot (x - \mu)`.

        >>> import torch
        >>> from captum_priors import ExpectedGradients
        >>> model = torch.nn.Linear(3, 1)
        >>> x, background = torch.randn(4, 3), torch.randn(20, 3)
        >>> attributions = ExpectedGradients(model).attribute(x, background, n_samples=2)
        >>> torch.allclose(attributions, model.weight * (x - background.mean(0)), atol=1e-6)
        True
    """

    draws_baselines = True
    takes_several_outputs = True
    draws: tuple[str, ...] = ()  # from its generator alone, which a prior hands to it

    def __init__(
        self,
        forward_func: Any,
        multiply_by_inputs: bool = True,
        *,
        differentiation: Differentiation = "double_backprop",
    ) -> None:
        check_forward_func(forward_func)
        one_of("differentiation", differentiation, DIFFERENTIATIONS)
        super().__init__(forward_func)
        self._multiply_by_inputs = multiply_by_inputs
        self.differentiation: Differentiation = differentiation

    @attribution_call
    def attribute(
        self,
        inputs: TensorOrTuple,
        baselines: Any,
        n_samples: int = 5,
        stdevs: float | tuple[float, ...] = 0.0,
        target: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        *,
        estimator: Estimator = "control_variate",
        internal_batch_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Any:
        r"""Explain a batch.

        Args:
            inputs: Tensor ``(batch, ...)`` or a tuple of them.
            baselines: The reference distribution: rows ``(n_rows, ...)``, a tuple with one such
                tensor for each input, or a function of nothing or of the inputs that returns them.
                Tensors with equally many rows are drawn jointly, row by row.
            n_samples: Samples for each example; each draws its reference without replacement as
                long as the rows last.
            stdevs: Standard deviation of Gaussian noise added to the inputs, for each tensor.
            target: Which output to explain, in any form that Captum takes; or sums of outputs, or
                :func:`captum_priors.outputs.each` of them, which adds their dimension behind the
                first of attributions and deltas.
            additional_forward_args: Further arguments of ``forward_func``; tensors with one entry
                for each example are repeated along with it.
            return_convergence_delta: Also return, for each sample of each example, the sum of its
                attribution minus :math:`f(x) - f(x')`: shape ``(batch * n_samples,)``, detached.
            estimator: ``"monte_carlo"`` is the paper's. ``"control_variate"`` has the same
                expectation and mostly less variance, though more at two to four samples of a
                quadratic function: :math:`(x - \mu) \odot \bar g` plus the covariance
                of :math:`x - x'` and :math:`g` over samples spread evenly along the path. How much
                less depends on the network: most with ReLU, little with tanh or a transformer.
                With one sample there is no covariance and the two are the same.
            internal_batch_size: At most this many rows go through the model at once.
            generator: Source of the draws; by default torch's global generator.

        Returns:
            Attributions like ``inputs``, and the deltas if asked for.

        Raises:
            TypeError: If an argument has another type or dtype.
            ValueError: If shapes, devices or counts do not match.
            NotDifferentiableError: If no correct parameter gradient exists.
        """
        n = check_inputs(inputs)
        tensors: tuple[Tensor, ...] = inputs if isinstance(inputs, tuple) else (inputs,)
        check_floating(tensors)
        check_target(target, n)
        table = reference_rows(baselines, inputs)
        args = () if additional_forward_args is None else forward_args(additional_forward_args)
        if isinstance(target, SeveralOutputs):
            target = target.known(self.forward_func, tensors, args)
        rows = Rows(self.forward_func, target, args, n)
        options = (n_samples, stdevs, estimator, internal_batch_size, generator)
        path_sum = self._path_sum(rows, tensors, tensors, table, options)
        found = path_sum.attributions(tensors, table)
        if isinstance(target, SeveralOutputs):
            found = target.grouped(found)
        attributions = found if isinstance(inputs, tuple) else found[0]
        if not return_convergence_delta:
            return attributions
        return attributions, convergence_delta(path_sum, tensors, table)

    def _path_sum(
        self,
        rows: Rows,
        inputs: tuple[Tensor, ...],
        explained: tuple[Tensor, ...],
        table: tuple[Tensor, ...],
        options: tuple[Any, ...],
    ) -> PathSum:
        """Check what both explainers share, and draw."""
        n_samples, stdevs, estimator, internal_batch_size, generator = options
        noise = stdevs if isinstance(stdevs, tuple) else (stdevs,) * len(explained)
        good = [s for s in noise if isinstance(s, (int, float)) and 0 <= s < float("inf")]
        if not len(good) == len(noise) == len(explained):
            raise refusal(
                ValueError,
                "`stdevs`",
                f"a non-negative number, or a tuple of {len(explained)}",
                repr(stdevs),
                "Pass 0.0 for no noise.",
            )
        count("n_samples", n_samples)
        if internal_batch_size is not None:
            count("internal_batch_size", internal_batch_size)
        if estimator not in ESTIMATORS:
            one_of("estimator", estimator, ESTIMATORS)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise refusal(
                TypeError,
                "`generator`",
                "a torch.Generator",
                type(generator).__name__,
                "Pass torch.Generator().manual_seed(0).",
            )
        control_variate = estimator == "control_variate" and n_samples > 1
        draws = Draws.new(
            n_samples,
            rows.n,
            [*map(len, table)],
            stratified=control_variate,
            generator=generator,
            device=explained[0].device,
        )
        if internal_batch_size is None and self.differentiation == "recompute":
            internal_batch_size = rows.n  # the memory of one pass over the batch
        if internal_batch_size is not None and self.differentiation == "finite_difference":
            internal_batch_size = max(1, internal_batch_size // 2)  # rows go through in pairs
        if n_samples > 1 or (internal_batch_size or rows.n) < rows.n:  # others', or several of one
            target = None if isinstance(rows.target, SeveralOutputs) else rows.target
            whole = Rows(rows.forward_func, target, rows.args, rows.n)
            whole.refuse_coupled(inputs, always=self.differentiation == "recompute")
        return PathSum(
            rows,
            draws,
            noise,
            self._multiply_by_inputs,
            control_variate and self._multiply_by_inputs,
            self.differentiation,
            internal_batch_size,
        )

    def has_convergence_delta(self) -> bool:
        """Whether ``attribute`` takes ``return_convergence_delta`` (Captum's protocol)."""
        return True

    @property
    def multiplies_by_inputs(self) -> bool:
        """Whether attributions are multiplied by the displacement (Captum's protocol)."""
        return self._multiply_by_inputs


def convergence_delta(
    path_sum: PathSum, explained: tuple[Tensor, ...], table: tuple[Tensor, ...]
) -> Tensor:
    """What the attributions of each sample miss, of several outputs side by side."""
    target = path_sum.rows.target
    if not isinstance(target, SeveralOutputs):
        return path_sum.convergence_delta(explained, table)
    single = (replace(path_sum.rows, target=one) for one in target.targets or ())
    each = [replace(path_sum, rows=rows).convergence_delta(explained, table) for rows in single]
    return torch.stack(each, 1)


def reference_rows(baselines: Any, inputs: TensorOrTuple) -> tuple[Tensor, ...]:
    """Evaluate and check the reference distribution: one table of rows for each input."""
    found = call_beside(call_baselines, baselines, inputs) if callable(baselines) else baselines
    each = found if isinstance(found, tuple) else (found,)
    return check_distribution(each, inputs if isinstance(inputs, tuple) else (inputs,))
