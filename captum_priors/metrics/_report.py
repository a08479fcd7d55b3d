"""``stability_report``: how far attacks move the explanations of models."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from captum_priors._captum import as_tuple, like_inputs, progress
from captum_priors._checks import check_count, check_inputs
from captum_priors._engine._first_order import check_points
from captum_priors._engine._inference import leaves_inference_mode
from captum_priors._engine._random import mixed
from captum_priors._errors import expected_found, one_of
from captum_priors._probe import (
    Probe,
    check_explainer,
    check_outputs,
    default_target,
    outputs_of,
    predictions,
    undisturbed,
)
from captum_priors._rows import take, take_each
from captum_priors.adapters import differentiable
from captum_priors.metrics._similarity import (
    kendall,
    mse,
    pearson,
    spearman,
    ssim,
    top_k_intersection,
)
from captum_priors.metrics._table import Example, Row, Score, StabilityReport

Metric = Callable[[Any, Any], Tensor]
_NAMED: dict[str, Metric] = {
    "kendall": kendall,
    "mse": mse,
    "pearson": pearson,
    "spearman": spearman,
    "ssim": ssim,
}
_Values = dict[tuple[str, str, str], dict[str, list[float]]]


@leaves_inference_mode
def stability_report(
    models: Any,
    explainers: Any,
    attacks: Any,
    loader: Iterable[Any],
    *,
    k: int = 50,
    metrics: Iterable[str] | Mapping[str, Metric] = ("spearman", "pearson"),
    target: Literal["predicted", "label"] = "predicted",
    additional_forward_args: Any = None,
    max_examples: int | None = None,
    confidence: float = 0.95,
    n_shown: int = 2,
    seed: int = 0,
    show_progress: bool = True,
    show_table: bool = True,
    figure_path: str | Path | None = None,
) -> StabilityReport:
    r"""Attack every explanation of every model, and compare the maps before and after.

    Each of ``models``, ``explainers`` and ``attacks`` is one thing or a dictionary of named ones.
    Explainers are made for each model, ``make(model)``, and attacks for each explainer,
    ``make(explainer)``, so pass classes, lambdas or partials; with a single model an explainer
    itself will do, and with a single explainer of it an attack.

    The columns are accuracy on clean and attacked inputs (where the loader has labels), how many
    attacks keep the prediction, the top-k intersection and the other ``metrics`` of clean and
    attacked maps. Where one attack is a
    :class:`captum_priors.attacks.RandomAttack`, ``<metric> - control`` is the paired difference
    to it. Both maps of a pair use the same draws of the explainer.

    Args:
        models: Models from inputs to outputs ``(batch, classes)``, or ``(batch,)`` for one logit.
        explainers: ``make(model)``, or a pair ``(make, options)`` with keywords of ``attribute``.
            The attack gets the explainer with these options bound.
        attacks: ``make(explainer)``, such as ``lambda e: TopKAttack(e, 50, radius=0.1)``.
        loader: Batches ``inputs``, ``(inputs, labels)`` or, for several inputs, ``((a, b),
            labels)``; moved to each model's device.
        k: Features of the top-k intersection.
        metrics: Names among kendall, mse, pearson, spearman and ssim; or a dictionary of functions
            ``(attributions, other)`` of shape ``(batch,)``.
        target: Explain the ``"predicted"`` class of the clean input, or the ``"label"``.
        additional_forward_args: Further arguments of all models, the same for all batches.
        max_examples: Stop after this many.
        confidence: Level of the intervals of the means over examples: Student's, and Wilson's for
            shares.
        n_shown: Examples of each row to keep for :meth:`StabilityReport.figure`.
        seed: Seed of all draws; every model sees the same.
        show_progress: Show a progress bar.
        show_table: Print the table.
        figure_path: Where to save :meth:`StabilityReport.figure`, or None.

    Returns:
        The table, with examples to draw.

    Raises:
        ImportError: Without the extra ``metrics`` (scipy).
        TypeError: If an argument has another type.
        ValueError: If there is nothing to report on, or a value is out of range.

    Example:
        >>> import torch
        >>> from captum.attr import Saliency
        >>> from captum_priors.attacks import RandomAttack
        >>> from captum_priors.metrics import stability_report
        >>> batches = [(torch.rand(8, 5), torch.randint(3, (8,)))]
        >>> report = stability_report(
        ...     torch.nn.Linear(5, 3), Saliency, lambda e: RandomAttack(e, radius=0.1), batches,
        ...     k=2, show_progress=False, show_table=False)
        >>> report.row().scores["top-2"].mean  # a linear model has the same map everywhere
        1.0
    """
    one_of("target", target, ("predicted", "label"))
    if not isinstance(loader, Iterable) or isinstance(loader, (Tensor, str)):
        raise TypeError(
            expected_found(
                "`loader`",
                "batches: a DataLoader, or a list of (inputs, labels)",
                type(loader).__name__,
                "Put a single batch into a list: [(inputs, labels)].",
            )
        )
    if figure_path is not None and not Path(figure_path).absolute().parent.is_dir():
        raise ValueError(
            expected_found(
                "`figure_path`",
                "a file in a folder that exists",
                str(figure_path),
                "Make the folder first.",
            )
        )
    check_count("k", k)
    check_count("max_examples", max_examples, optional=True)
    check_count("n_shown", n_shown, least=0)
    check_count("seed", seed, least=0)
    if not isinstance(confidence, float) or not 0 < confidence < 1:
        raise ValueError(
            expected_found("`confidence`", "a number in (0, 1)", repr(confidence), "Pass 0.95.")
        )
    scores: dict[str, Metric] = {
        f"top-{k}": lambda a, b: top_k_intersection(a, b, k),
        **_chosen(metrics),
    }
    cells = _cells(models, explainers, attacks)
    values: _Values = {cell.names: {} for cell in cells}
    examples: list[Example] = []
    n_done = 0
    with progress(desc="stability", disable=not show_progress) as bar:
        for number, (inputs, labels) in enumerate(_batches(loader, max_examples)):
            if labels is None and target == "label":
                raise ValueError(
                    expected_found(
                        "`target`",
                        "'predicted' for a loader without labels",
                        "'label'",
                        "Let the loader give (inputs, labels).",
                    )
                )
            n = as_tuple(inputs)[0].shape[0]
            for cell in cells:
                found, example = cell.evaluate(
                    inputs,
                    labels,
                    args=additional_forward_args,
                    explain_labels=target == "label",
                    scores=scores,
                    seed=mixed(seed, number),
                    n_shown=max(0, n_shown - n_done),
                )
                for name, each in found.items():
                    values[cell.names].setdefault(name, []).extend(each.tolist())
                examples += example
                bar.update(1)
            n_done += n
    if not n_done:
        raise ValueError(
            expected_found("`loader`", "at least one example", "none", "Pass a non-empty loader.")
        )
    _against_control(cells, values, list(scores))
    rows = tuple(
        Row(*names, {name: Score.of(each, confidence) for name, each in columns.items()})
        for names, columns in values.items()
    )
    order = list(values)
    examples.sort(key=lambda e: order.index((e.model, e.explainer, e.attack)))
    report = StabilityReport(rows, confidence, tuple(examples))
    if show_table:
        print(report)
    if figure_path is not None:
        report.figure().savefig(figure_path, bbox_inches="tight")
    return report


class _Bound:
    """An explainer with keywords of ``attribute`` bound to it."""

    def __init__(self, explainer: Any, options: Mapping[str, Any]) -> None:
        self._explainer, self._options = explainer, dict(options)

    def attribute(self, inputs: Any, **call: Any) -> Any:
        return self._explainer.attribute(inputs, **{**self._options, **call})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_explainer", "_options"):
            raise AttributeError(name)
        return getattr(self._explainer, name)


class _Cell:
    """One model, explainer and attack."""

    def __init__(
        self, names: tuple[str, str, str], model: Any, explainer: Any, attack: Any
    ) -> None:
        self.names, self.model, self.explainer, self.attack = names, model, explainer, attack

    def evaluate(
        self,
        inputs: Any,
        labels: Tensor | None,
        *,
        args: Any,
        explain_labels: bool,
        scores: Mapping[str, Metric],
        seed: int,
        n_shown: int,
    ) -> tuple[dict[str, Tensor], list[Example]]:
        device = _device_of(self.model)
        if device is not None:
            inputs = like_inputs(inputs, tuple(t.to(device) for t in as_tuple(inputs)))
        clean = as_tuple(inputs)
        if labels is not None:
            labels = labels.to(clean[0].device)
        with undisturbed(seed, self.model, self.explainer):
            outputs = check_outputs(outputs_of(self.model, clean, args), clean[0].shape[0])
            target = labels if explain_labels else default_target(outputs, None)
            moved = self.attack.perturb(
                inputs, **_known(self.attack, target=target, additional_forward_args=args)
            )
            after = outputs_of(self.model, as_tuple(moved), args)
            probe = Probe(
                self.explainer, inputs, {"target": target, "additional_forward_args": args}
            )
            # Other draws than those that an attack of ours ranks its points by.
            maps = [probe(points, mixed(seed, 1)) for points in (clean, as_tuple(moved))]
        found: dict[str, Tensor] = {}
        before, now = predictions(outputs), predictions(after)
        if labels is not None:
            found["accuracy"] = (before == labels).double()
            found["accuracy, attacked"] = (now == labels).double()
        found["prediction kept"] = (before == now).double()
        here, there = (m if len(m) > 1 else m[0] for m in maps)
        for name, score in scores.items():
            found[name] = _per_example(name, score(here, there), clean[0].shape[0])
        shown: list[Example] = []
        if len(clean) == 1 and len(maps[0]) == 1:
            tensors = (clean[0], as_tuple(moved)[0], maps[0][0], maps[1][0])
            shown = [
                Example(*self.names, *(t[i].detach().cpu() for t in tensors))
                for i in range(min(n_shown, clean[0].shape[0]))
            ]
        return found, shown


def _per_example(name: str, values: Any, n: int) -> Tensor:
    if not isinstance(values, Tensor) or values.shape != (n,):
        raise ValueError(
            expected_found(
                f"metric {name!r}",
                f"shape ({n},)",
                str(getattr(values, "shape", type(values).__name__)),
                "Return one number for each example.",
            )
        )
    return values.detach().double().cpu()


def _known(attack: Any, **given: Any) -> dict[str, Any]:
    """Leave out what is None, which not every perturbation takes."""
    return {name: value for name, value in given.items() if value is not None}


def _device_of(model: Any) -> torch.device | None:
    if not isinstance(model, nn.Module):
        return None
    tensors = [*model.parameters(), *model.buffers()]
    return tensors[0].device if tensors else None


def _chosen(metrics: Any) -> dict[str, Metric]:
    if isinstance(metrics, Mapping):
        return dict(metrics)
    names = [metrics] if isinstance(metrics, str) else list(metrics)
    for name in names:
        one_of("metrics", name, sorted(_NAMED))
    return {name: _NAMED[name] for name in names}


def _batches(
    loader: Iterable[Any], max_examples: int | None
) -> Iterator[tuple[Any, Tensor | None]]:
    left = max_examples
    for batch in loader:
        if left == 0:
            return
        inputs, labels = batch, None
        if isinstance(batch, (tuple, list)):
            if len(batch) != 2:
                raise ValueError(
                    expected_found(
                        "batch of `loader`",
                        "inputs or (inputs, labels)",
                        f"{len(batch)} entries",
                        "Put several inputs into a tuple of their own: ((a, b), labels).",
                    )
                )
            inputs, labels = batch
        inputs = tuple(inputs) if isinstance(inputs, list) else inputs
        check_inputs(inputs)
        check_points(as_tuple(inputs))
        n = as_tuple(inputs)[0].shape[0]
        if labels is not None and (not isinstance(labels, Tensor) or labels.shape != (n,)):
            raise ValueError(
                expected_found(
                    "labels of `loader`",
                    f"class indices of shape ({n},)",
                    str(getattr(labels, "shape", type(labels).__name__)),
                    "Leave the labels out, or pass class indices.",
                )
            )
        if left is not None:
            rows = slice(0, min(n, left))
            inputs, labels = take_each(inputs, rows, n), take(labels, rows, n)
            left -= as_tuple(inputs)[0].shape[0]
        yield inputs, labels


def _cells(models: Any, explainers: Any, attacks: Any) -> list[_Cell]:
    found = []
    for model_name, model in _named("models", models):
        if not callable(model):
            raise TypeError(
                expected_found(
                    "`models`", "models or functions", type(model).__name__, "Pass the model."
                )
            )
        for explainer_name, explainer in _named("explainers", explainers):
            made = _explainer(explainer, model, alone=not isinstance(models, Mapping))
            for attack_name, attack in _named("attacks", attacks):
                alone = not isinstance(models, Mapping) and not isinstance(explainers, Mapping)
                names = (model_name, explainer_name, attack_name)
                found.append(_Cell(names, model, made, _attack(attack, made, alone=alone)))
    return [
        _Cell(
            (c.names[0], c.names[1] or _name(c.explainer), c.names[2] or _name(c.attack)),
            c.model,
            c.explainer,
            c.attack,
        )
        for c in found
    ]


def _named(what: str, things: Any) -> list[tuple[str, Any]]:
    if isinstance(things, Mapping):
        if not things:
            raise ValueError(
                expected_found(f"`{what}`", "at least one", "none", "Pass one, or a dictionary.")
            )
        return [(str(name), thing) for name, thing in things.items()]
    return [("model" if what == "models" else "", things)]


def _explainer(explainer: Any, model: Any, *, alone: bool) -> Any:
    make, options = explainer if isinstance(explainer, tuple) else (explainer, {})
    if not isinstance(make, type) and callable(getattr(make, "attribute", None)):
        if not alone:
            raise _to_be_made("explainers", "model", make)
        made = make
    else:
        made = _made("explainers", make, model)
    check_explainer(made)
    made = differentiable(made)
    return _Bound(made, options) if options else made


def _attack(attack: Any, explainer: Any, *, alone: bool) -> Any:
    if not isinstance(attack, type) and callable(getattr(attack, "perturb", None)):
        if not alone:
            raise _to_be_made("attacks", "explainer", attack)
        return attack
    made = _made("attacks", attack, explainer)
    if not callable(getattr(made, "perturb", None)):
        raise TypeError(
            expected_found(
                "`attacks`",
                "functions that return a captum.robust.Perturbation",
                type(made).__name__,
                "Pass for example lambda e: TopKAttack(e, 50, radius=0.1).",
            )
        )
    return made


def _made(what: str, make: Any, argument: Any) -> Any:
    if not callable(make):
        raise TypeError(
            expected_found(
                f"`{what}`",
                "functions that make them",
                type(make).__name__,
                "Pass a class or a lambda.",
            )
        )
    if isinstance(make, type):
        try:
            inspect.signature(make).bind(argument)
        except TypeError as error:
            example = "radius=0.1" if what == "attacks" else "..."
            raise TypeError(
                expected_found(
                    f"`{what}`",
                    "what can be made of one argument",
                    f"the class {make.__name__} ({error})",
                    f"Pass lambda it: {make.__name__}(it, {example}).",
                )
            ) from None
    return make(argument)


def _to_be_made(what: str, argument: str, thing: Any) -> TypeError:
    return TypeError(
        expected_found(
            f"`{what}`",
            f"functions of the {argument}, because there may be several",
            f"a {type(thing).__name__}",
            f"Pass lambda {argument}: ..., which is called for each.",
        )
    )


def _name(thing: Any) -> str:
    inner = thing._explainer if isinstance(thing, _Bound) else thing
    return type(inner).__name__.removeprefix("Differentiable")


def _against_control(cells: list[_Cell], values: _Values, names: list[str]) -> None:
    """Add the paired differences to the control, where there is exactly one."""
    for cell in cells:
        controls = [
            other
            for other in cells
            if other.names[:2] == cell.names[:2] and getattr(other.attack, "is_control", False)
        ]
        if len(controls) != 1 or controls[0] is cell:
            continue
        ours, control = values[cell.names], values[controls[0].names]
        for name in names:
            ours[f"{name} - control"] = [
                a - b for a, b in zip(ours[name], control[name], strict=True)
            ]
