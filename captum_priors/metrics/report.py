"""``stability_report``: how far attacks move the explanations of models."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from captum_priors._captum import as_tuple, forward_func_of, like_inputs
from captum_priors._checks import check_inputs, fraction
from captum_priors._errors import refusal
from captum_priors._extras import extra
from captum_priors._probe import Probe, default_target, outputs_of, predictions
from captum_priors.adapters import differentiable
from captum_priors.engine import derive
from captum_priors.engine._torch import out_of_inference
from captum_priors.engine.random import STREAMS, seed_global
from captum_priors.metrics.explainer import held_still
from captum_priors.metrics.maps import pearson, spearman, top_k_intersection
from captum_priors.penalties.maths import Axes

Metric = Callable[[Any, Any], Tensor]
Scores = dict[str, Tensor]
_METRICS: Mapping[str, Metric] = MappingProxyType({"spearman": spearman, "pearson": pearson})


@dataclass(frozen=True)
class ReportScore:
    """A mean over ``n`` examples with the ends of its confidence interval.

    Example:
        >>> from captum_priors.metrics import ReportScore
        >>> print(ReportScore(0.5, 0.25, 0.75, 8))
        0.500 [0.250, 0.750]
    """

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Tensor, confidence: float) -> "ReportScore":
        """Average what is not NaN.

        The interval is Wilson's for a share, whose values are boolean, and Student's for the mean
        of any other numbers; NaN for fewer than two.
        """
        known = values[~values.isnan()]
        n, mean, nan = len(known), float(known.double().mean()), float("nan")
        if n < 2:
            return cls(mean, nan, nan, n)
        stats = extra("scipy.stats", "metrics")
        if values.dtype == torch.bool:
            share = stats.binomtest(int(known.sum()), n).proportion_ci(confidence, method="wilson")
            return cls(mean, float(share.low), float(share.high), n)
        error = float(known.double().std()) / n**0.5
        half = error * float(stats.t.ppf((1 + confidence) / 2, n - 1))
        return cls(mean, mean - half, mean + half, n)

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class ReportRow:
    """One explainer under one attack.

    Example:
        >>> from captum_priors.metrics import ReportRow, ReportScore
        >>> row = ReportRow("plain", "top-k", {"pearson": ReportScore(0.9, 0.8, 1.0, 50)})
        >>> row.scores["pearson"].mean
        0.9
    """

    explainer: str
    attack: str
    scores: dict[str, ReportScore]


@dataclass(frozen=True)
class StabilityReport:
    """What :func:`stability_report` found: ``print`` it, or take its ``rows``.

    Example:
        >>> from captum_priors.metrics import ReportRow, ReportScore, StabilityReport
        >>> score = ReportScore(0.9, 0.8, 1.0, 50)
        >>> print(StabilityReport((ReportRow("plain", "top-k", {"pearson": score}),), 0.95))
        explainer  attack  n   pearson
        plain      top-k   50  0.900 [0.800, 1.000]
        mean over n examples with its 95% confidence interval
    """

    rows: tuple[ReportRow, ...]
    confidence: float

    def row(self, explainer: str = "", attack: str = "") -> ReportRow:
        """Return the one row of these names; an empty name fits any.

        Raises:
            KeyError: If no row fits, or several do.
        """
        rows = [r for r in self.rows if explainer in ("", r.explainer)]
        found = [r for r in rows if attack in ("", r.attack)]
        if len(found) != 1:
            raise refusal(
                KeyError,
                "`row`",
                f"one row for explainer={explainer!r}, attack={attack!r}",
                str(len(found)),
                f"There are {[(r.explainer, r.attack) for r in self.rows]}.",
            )
        return found[0]

    def to_frame(self) -> Any:
        """Return a ``pandas.DataFrame`` (extra ``metrics``): a line for each score of each row."""
        lines = [
            {"explainer": r.explainer, "attack": r.attack, "score": name, **vars(score)}
            for r in self.rows
            for name, score in r.scores.items()
        ]
        return extra("pandas", "metrics").DataFrame(lines)

    def __str__(self) -> str:
        names = list(dict.fromkeys(name for row in self.rows for name in row.scores))
        lines = [["explainer", "attack", "n", *names]]
        for row in self.rows:
            n = max((score.n for score in row.scores.values()), default=0)
            cells = [str(row.scores[name]) if name in row.scores else "" for name in names]
            lines.append([row.explainer, row.attack, str(n), *cells])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        text.append(f"mean over n examples with its {self.confidence:.0%} confidence interval")
        return "\n".join(text)


def stability_report(
    explainers: Mapping[str, Any],
    attacks: Mapping[str, Mapping[str, Any]],
    loader: Iterable[Any],
    *,
    k: int = 50,
    dim: Axes = None,
    metrics: Mapping[str, Metric] = _METRICS,
    control: str | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> StabilityReport:
    r"""Attack explanations of the predicted classes, and compare the maps before and after.

    The columns are accuracy on clean and attacked inputs (where the loader has labels), how many
    attacks keep the prediction, the top-k intersection and the other ``metrics`` of clean and
    attacked maps. With a ``control``, such as a :class:`captum_priors.attacks.RandomAttack`,
    ``<metric> - control`` is the paired difference to it. Both maps of a pair use the same draws
    of the explainer.

    Args:
        explainers: The explainers by name; instead of one, a pair of it and the keywords of its
            ``attribute``. The model is the explainer's: outputs ``(batch, classes)``, or
            ``(batch,)`` for one logit.
        attacks: For the name of each explainer, its attacks by name: objects with ``perturb``.
        loader: Batches ``inputs``, ``(inputs, labels)`` or, for several inputs, ``((a, b),
            labels)``; moved to each model's device.
        k: Features of the top-k intersection.
        dim: The axes of the attributions that are places, as in :func:`top_k_intersection`.
        metrics: Functions ``(attributions, other)`` of shape ``(batch,)`` by name.
        control: Name of the attack that the others are compared with.
        confidence: Level of the intervals, which :class:`ReportScore` describes.
        seed: Seed of all draws; every explainer sees the same.

    Raises:
        ImportError: Without the extra ``metrics`` (SciPy).
        ValueError: If there is nothing to report on.

    Example:
        >>> import torch
        >>> from captum.attr import Saliency
        >>> from captum_priors.attacks import RandomAttack
        >>> from captum_priors.metrics import stability_report
        >>> explainer = Saliency(torch.nn.Linear(5, 3))
        >>> noise = RandomAttack(explainer, radius=0.1)
        >>> batches = [(torch.rand(8, 5), torch.randint(3, (8,)))]
        >>> report = stability_report(
        ...     {"plain": explainer}, {"plain": {"noise": noise}}, batches, k=2)
        >>> report.row().scores["top-2"].mean  # a linear model has the same map everywhere
        1.0
    """
    fraction("confidence", confidence)
    scores: dict[str, Metric] = {
        f"top-{k}": lambda a, b: top_k_intersection(a, b, k, dim=dim),
        **_built("metrics", metrics, callable, "{'spearman': spearman}"),
    }
    subjects = _subjects(explainers, attacks)
    found: dict[tuple[str, str], dict[str, list[Tensor]]] = {}
    for number, batch in enumerate(_batches(loader)):
        for explained, subject in subjects.items():
            columns = _attacked(*subject, batch, scores, derive(seed, number))
            for attack, each in columns.items():
                if control is not None and attack != control:
                    pairs = {m: (each[m].double(), columns[control][m].double()) for m in scores}
                    each |= {f"{m} - control": a - b for m, (a, b) in pairs.items()}
                row = found.setdefault((explained, attack), {})
                for name, values in each.items():
                    row.setdefault(name, []).append(values)
    if not found:
        raise refusal(
            ValueError, "`loader`", "at least one example", "none", "Pass a non-empty loader."
        )
    rows = (
        ReportRow(*names, {n: ReportScore.of(torch.cat(v), confidence) for n, v in row.items()})
        for names, row in found.items()
    )
    return StabilityReport(tuple(rows), confidence)


def _attacked(
    explainer: Any,
    options: Mapping[str, Any],
    attacks: Mapping[str, Any],
    batch: tuple[Any, Tensor | None],
    scores: Mapping[str, Metric],
    seed: int,
) -> dict[str, Scores]:
    """Score each attack on one batch."""
    model = forward_func_of(explainer)
    inputs, labels = _moved(model, *batch)
    draws = derive(seed, 1)  # others than those that an attack of ours ranks its points by
    found: dict[str, Scores] = {}
    with held_still(model, explainer, seed=seed, given={"inputs": inputs}):
        inputs, labels, options = out_of_inference((inputs, labels, dict(options)))
        clean = as_tuple(inputs)
        outputs = outputs_of(model, clean)
        target = default_target(outputs)
        given = {} if target is None else {"target": target}
        probe = Probe(explainer, inputs, options, **given)
        here, before = probe(clean, draws), predictions(outputs)
        for name, attack in attacks.items():
            seed_global(seed, STREAMS)  # whichever attack comes first
            moved = as_tuple(attack.perturb(inputs, **given))
            there, now = probe(moved, draws), predictions(outputs_of(model, moved))
            columns: Scores = {}
            if labels is not None:
                columns = {"accuracy": before == labels, "accuracy, attacked": now == labels}
            columns["prediction kept"] = before == now
            for metric, score in scores.items():
                columns[metric] = score(*(m if len(m) > 1 else m[0] for m in (here, there)))
            found[name] = {column: values.detach().cpu() for column, values in columns.items()}
    return found


def _moved(model: Any, inputs: Any, labels: Tensor | None) -> tuple[Any, Tensor | None]:
    """Put a batch on the device of the model."""
    tensors = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    device = (tensors or as_tuple(inputs))[0].device
    inputs = like_inputs(inputs, tuple(t.to(device) for t in as_tuple(inputs)))
    return inputs, None if labels is None else labels.to(device)


def _built(what: str, given: Any, is_built: Callable[[Any], bool], example: str) -> Any:
    """Require a dictionary of built things by name."""
    if not isinstance(given, Mapping) or not all(map(is_built, given.values())):
        expected = "a dictionary of built objects or functions by name"
        raise refusal(TypeError, f"`{what}`", expected, repr(given), f"Pass {example}.")
    return given


def _subjects(explainers: Any, attacks: Any) -> dict[str, tuple[Any, Any, Any]]:
    """Return by name each explainer, the options of its attribute, and its attacks."""
    names = [set(given) if isinstance(given, Mapping) else given for given in (explainers, attacks)]
    if not explainers or names[0] != names[1]:
        raise refusal(
            ValueError,
            "`explainers` and `attacks`",
            "two dictionaries with the same names, at least one",
            f"{names[0]} and {names[1]}",
            "Pass {'plain': Saliency(model)} and {'plain': {'noise': RandomAttack(...)}}.",
        )
    found = {}
    for name, explainer in explainers.items():
        explainer, options = explainer if isinstance(explainer, tuple) else (explainer, {})
        named = _built(f"attacks[{name!r}]", attacks[name], _perturbs, "{'a': RandomAttack(...)}")
        found[name] = (differentiable(explainer), options, named)
    return found


def _perturbs(attack: Any) -> bool:
    return not isinstance(attack, type) and callable(getattr(attack, "perturb", None))


def _batches(loader: Any) -> Iterator[tuple[Any, Tensor | None]]:
    for batch in loader:
        inputs, labels = batch if isinstance(batch, (tuple, list)) else (batch, None)
        inputs = tuple(inputs) if isinstance(inputs, list) else inputs
        n = check_inputs(inputs)
        if isinstance(loader, Tensor) or (labels is not None and labels.shape != (n,)):
            raise refusal(
                ValueError,
                "`loader`",
                "batches of inputs, or of inputs and class indices of shape (batch,)",
                "a tensor" if labels is None else f"labels of shape {tuple(labels.shape)}",
                "Put a single batch into a list: [(inputs, labels)].",
            )
        yield inputs, labels
