"""What GradientExplainer and DeepExplainer share: they hold the torch module themselves."""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from torch import Tensor, nn

from captum_priors._engine._inference import leaves_inference_mode
from captum_priors._errors import NotDifferentiableError, expected_found
from captum_priors.adapters._shap._adapter import ShapAdapter
from captum_priors.adapters._shap._explanation import with_tensors
from captum_priors.adapters._shap._shap_check import check_against_shap
from captum_priors.adapters._shap._torch_model import TorchModel

# SHAP's explainers, and not adapters: copies of an adapter share it.
_checked: "WeakSet[Any]" = WeakSet()


class TorchFamily(ShapAdapter):
    """Explains a module, or the input of one of its layers, from ``explainer.explainer``."""

    explainer: Any
    features: Any = None

    @classmethod
    def of(cls, explainer: Any, differentiation: Any, model: Any) -> Any:
        """Make the differentiable twin of a SHAP explainer."""
        module = getattr(explainer.explainer, "model", None)
        if not isinstance(module, nn.Module):
            raise NotDifferentiableError(
                expected_found(
                    f"`model` of {cls._stock.__name__}",
                    "a torch module",
                    type(module).__name__,
                    "Explain the torch model; TensorFlow's has no graph in torch.",
                )
            )
        if model is not None and model is not module:
            raise ValueError(
                expected_found(
                    "`model`",
                    f"none, because {cls._stock.__name__} holds its torch module",
                    type(model).__name__,
                    "Leave it out.",
                )
            )
        return super().of(explainer, differentiation, None)

    def _held(self) -> Any:
        return getattr(self.explainer, "model", None)

    def _torch_model(self) -> TorchModel | None:
        module = self._held()
        return TorchModel(module, converts=False) if isinstance(module, nn.Module) else None

    def _modules(self) -> Iterator[nn.Module]:
        return self._module.modules()

    @property
    def _module(self) -> nn.Module:
        module: nn.Module = self.explainer.model
        return module

    def _backgrounds(self) -> list[Tensor]:
        """Reference rows, one tensor for each input of the model."""
        held = getattr(self.explainer, "model_inputs", self.explainer.data)
        return [b.detach() for b in held]

    def _base(self) -> Tensor:
        outputs: Tensor = self._module(*self._backgrounds())
        return outputs.double().mean(0)

    def _layer(self) -> nn.Module | None:
        layer: nn.Module | None = self.explainer.layer
        return layer

    def _as_inputs(self, X: Any) -> list[Tensor]:  # noqa: N803  # SHAP's name
        multi = self.explainer.multi_input
        if multi != isinstance(X, (list, tuple)):
            raise TypeError(
                expected_found(
                    "`X`",
                    "a list of tensors" if multi else "a tensor",
                    type(X).__name__,
                    "Pass what the background has: one tensor for each input of the model.",
                )
            )
        given = list(X) if multi else [X]
        like = self._backgrounds()
        if len(given) != len(like):
            raise ValueError(
                expected_found(
                    "`X`", f"{len(like)} inputs as in the background", str(len(given)), "Match."
                )
            )
        return [torch.as_tensor(x).to(b) for x, b in zip(given, like, strict=True)]

    def _ranked(
        self, inputs: Sequence[Tensor], ranked_outputs: Any, order: str
    ) -> tuple[list[Any], Tensor]:
        """Say which outputs are explained, each an index or one for each example, as SHAP does."""
        n_outputs = self._n_outputs()
        n = inputs[0].shape[0]
        if ranked_outputs is None or not self.explainer.multi_output:
            ranks = torch.ones((n, n_outputs)).int() * torch.arange(0, n_outputs).int()
            return list(range(n_outputs)), ranks
        with torch.no_grad():
            outputs = self._module(*inputs)
        if order not in ("max", "min", "max_abs"):
            raise ValueError("output_rank_order must be max, min, or max_abs!")
        score = {"max": outputs, "min": -outputs, "max_abs": outputs.abs()}[order]
        ranks = torch.sort(score, descending=True)[1][:, :ranked_outputs]
        return list(ranks.unbind(1)), ranks

    def _n_outputs(self) -> int:
        if hasattr(self.explainer, "num_outputs"):
            return int(self.explainer.num_outputs)
        return len(self.explainer.gradients)

    def _phi(
        self, inputs: list[Tensor], outputs: list[Any], options: dict[str, Any]
    ) -> list[Tensor]:
        """Attributions of the explained tensors, each ``(batch, ..., outputs)``."""
        raise NotImplementedError

    # Numbers are SHAP's: seen on one row, once for each of SHAP's explainers.

    _check_options: ClassVar[dict[str, Any]] = {}

    def _check_once(self, inputs: Sequence[Tensor]) -> None:
        if self.explainer in _checked or not len(inputs[0]):
            return
        check_against_shap(
            self._stock.__name__,
            self.explainer,
            inputs,
            self._prepare_check,
            self._ours,
            self._check_options,
        )
        _checked.add(self.explainer)

    def _prepare_check(self, twin: Any, inputs: list[Tensor]) -> list[Tensor] | None:
        """Ready a private copy of SHAP's explainer, or say that its numbers are not kept."""
        raise NotImplementedError

    def _ours(self, twin: Any, inputs: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        own = copy.copy(self)
        own.explainer, own.differentiation = twin, "double_backprop"
        outputs: list[Any] = list(range(own._n_outputs()))
        return own._phi(inputs, outputs, self._check_options), own._module(*own._backgrounds())

    def _values(
        self, tensors: tuple[Tensor, ...], target: Any, options: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        from captum_priors.adapters._shap._adapter import output_index

        if self._layer() is not None:
            raise NotDifferentiableError(
                expected_found(
                    f"`attribute` of {self._stock.__name__}",
                    "an explainer of the model's inputs",
                    "one of a layer, whose attributions are not like the inputs",
                    "Use adapter(X).tensor, or LayerExpectedGradients.",
                )
            )
        inputs = [t.to(b) for t, b in zip(tensors, self._backgrounds(), strict=True)]
        chosen = output_index(target, inputs[0].shape[0], self._n_outputs())
        with self._still():
            self._check_once(inputs)
            phi = self._phi(inputs, [chosen], options)
        return tuple(p[..., 0] for p in phi)

    @leaves_inference_mode
    def _explain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._torch_model() is None:
            return self._stock.__call__(self, *args, **kwargs)
        given = inspect.signature(self._stock.__call__).bind(self, *args, **kwargs).arguments
        X = given.pop("X")  # noqa: N806  # SHAP's name
        del given["self"]
        inputs = self._as_inputs(X)
        with self._still():
            self._check_once(inputs)
            phi = self._phi(inputs, list(range(self._n_outputs())), given)
            base = self._base().expand(inputs[0].shape[0], -1)
        if self._n_outputs() == 1:  # SHAP's plots take no axis of one output
            phi, base = [p.squeeze(-1) for p in phi], base.squeeze(-1)
        return self._explanations(phi, base, inputs)

    def _explanations(self, phi: list[Tensor], base: Tensor, inputs: list[Tensor]) -> Any:
        make = self._explanation_class()
        explanations = []
        for i, values in enumerate(phi):
            data = inputs[i].detach().cpu().numpy() if self._layer() is None else None
            names = self.features
            if names is None and values.dim() - (base.dim() - 1) == 2:  # rows of features
                names = [f"Feature {j}" for j in range(values.shape[1])]
            explanation = make(
                values.detach().cpu().numpy(),
                base_values=base.detach().cpu().numpy(),
                data=data,
                feature_names=None if names is None else list(names),
            )
            explanations.append(with_tensors(explanation, values, base))
        return explanations if len(explanations) > 1 else explanations[0]

    @staticmethod
    def _explanation_class() -> Any:
        from captum_priors.adapters._shap._door import shap

        return shap().Explanation


def keeps_training_flags(init: Callable[..., None]) -> Callable[..., None]:
    """Put back the evaluation mode that a SHAP constructor leaves its module in."""

    @functools.wraps(init)
    def wrapper(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        root = model[0] if isinstance(model, tuple) else model
        modules = list(root.modules()) if isinstance(root, nn.Module) else []
        flags = [module.training for module in modules]
        try:
            init(self, model, *args, **kwargs)
        finally:
            for module, flag in zip(modules, flags, strict=True):
                module.training = flag

    del wrapper.__wrapped__  # what SHAP's loading reads
    wrapper.__signature__ = inspect.signature(init)  # type: ignore[attr-defined]  # for inspect
    return wrapper
