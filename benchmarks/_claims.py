"""One table of what papers claim, what they publish for it, and what was found here.

From the benchmarks' JSON files. A verdict says whether the 95 % interval of the difference, in
pairs over seeds or splits, lies on the published side of zero, on the other, or on both; where a
paper publishes an order, whether the order is the same. Where data are those of the paper, or a
part of them, it says whether the interval holds the published size, too.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Row = tuple[str, str, str, str]
"""Claim, published, ours, verdict."""
ERION = "Erion et al. 2021"


def half_width(gain: Any) -> float:
    """Of the interval; two standard errors in files that were written before it was kept."""
    return float(gain["half width"] if "half width" in gain else 2 * gain["error"])


def shown(gain: Any, digits: int = 3) -> str:
    """A difference with the half width of its interval, and of how many pairs."""
    number = f" (n = {len(gain['values'])})" if "values" in gain else ""
    return f"{gain['mean']:+.{digits}f} ± {half_width(gain):.{digits}f}{number}"


def verdict(gain: Any, published: float | None = None) -> str:
    """Judge a difference that is published as more; of the published size, where it is known."""
    half = half_width(gain)
    if abs(gain["mean"]) <= half:
        found = "open: the interval has both signs"
    else:
        found = "same direction" if gain["mean"] > 0 else "**other direction**"
    if published is not None and abs(gain["mean"] - published) > half:
        found += "; the published size is outside it"
    return found


def _pixel_prior(results: Any) -> Iterator[Row]:
    published = results["published"]
    for name, gain in results["gain over no prior"].items():
        if not name.startswith("pixel prior"):
            continue
        for key in ("s&p 0.1", "clean"):
            theirs = [published[n][key] for n in ("no prior", "pixel prior")]
            what = "10 % salt and pepper" if key != "clean" else "clean images, where it is free"
            yield (
                f"{ERION}: the pixel prior raises accuracy on MNIST under noise; {what} ({name})",
                "{:.3f} → {:.3f}".format(*theirs),
                shown(gain[key]),
                verdict(gain[key])
                if key != "clean"
                else "no loss seen"
                if gain[key]["mean"] + half_width(gain[key]) >= 0
                else "**costs accuracy**",
            )


def _graph_prior(results: Any) -> Iterator[Row]:
    for name, published in (
        ("true graph", "more, t = 3.6 over 10 retrainings"),
        ("random graph", "no gain, p = .23"),
    ):
        gain = results["gain over no graph"][name]["R2"]
        yield (
            f"{ERION}: a known graph helps and a random one does not; {name}, R²",
            published,
            shown(gain),
            verdict(gain)
            if name == "true graph"
            else "no gain seen"
            if gain["mean"] <= half_width(gain)
            else "**helps, too**",
        )


def _nhanes_sparsity(results: Any) -> Iterator[Row]:
    n = results.get("columns of noise", 0)
    data = "18 features" + (f" and {n} of noise" if n else "")
    before, after = (results["published"][name] for name in ("unregularised", "Gini-EG"))
    for i, key in enumerate(("ROC-AUC", "Gini")):
        gain = results["gain over unregularised"]["Gini-EG"][key]
        yield (
            f"{ERION}: the sparsity prior on 100 rows of NHANES I (theirs: 118 features; here "
            f"{data}); {key}",
            f"{before[i]} → {after[i]}",
            shown(gain),
            verdict(gain, after[i] - before[i]),
        )


def _correlated_groups(results: Any) -> Iterator[Row]:
    for kind, row in results["found"].items():
        better = row["metrics better than integrated gradients"]
        for name, estimator in (
            ("expected gradients", "`monte_carlo`, the paper's"),
            ("expected gradients, control variate", "`control_variate`, the default"),
        ):
            yield (
                f"{ERION}: EG above IG on keep/remove metrics, {kind}; {estimator}",
                "18 of 18" if kind == "correlated groups" else "18 of 18, some tied",
                f"{better[name]} of 18, means of seeds",
                "the same" if better[name] == 18 else f"not on {18 - better[name]}",
            )


def _convergence(results: Any) -> Iterator[Row]:
    found = results["found"]
    names = ("EG, k = 5", "EG, k = 1", "IG, 4 steps", "IG, 2 steps")
    rest = [found[name]["dependence at the end"]["mean"] for name in names]
    epochs = [found[name]["epochs until gone"]["mean"] for name in names]
    ordered = epochs == sorted(epochs) and rest[2] < rest[3]
    yield (
        f"{ERION}: two equal features; the order in which priors on {', '.join(names)} stop the "
        "use of one",
        "58, 68, 107 epochs, never",
        f"{epochs[0]:.0f}, {epochs[1]:.0f} epochs; of the other two {rest[2]:.2f} and "
        f"{rest[3]:.2f} left",
        "same order (epochs are not theirs)" if ordered else "**another order**",
    )


def _nhanes_references(results: Any) -> Iterator[Row]:
    paired, published = results["paired"], results["published"]
    pair = published["128 references less 1"]
    gain = paired["monte_carlo, k = 128 less monte_carlo, k = 1"]["ROC-AUC"]
    yield (
        f"Hesse et al. 2021, on {ERION}: more references train better; ROC-AUC, 128 less 1",
        f"{pair['mean']:+.4f} ± {pair['error']:.4f} (standard error)",
        shown(gain, 4),
        verdict(gain, pair["mean"]),
    )
    gain = paired["X-Gradient less monte_carlo, k = 1"]["ROC-AUC"]
    theirs = published["X-Gradient"] - published["expected gradients"]["1"]
    yield (
        "Hesse et al. 2021: the X-Gradient trains better than one reference; ROC-AUC",
        f"{theirs:+.4f}",
        shown(gain, 4),
        verdict(gain, theirs),
    )


def _stability_study(results: Any) -> Iterator[Row]:
    for row in results.get("claims", ()):
        gain = results["gains"][row["method"]]
        ours = [shown(gain[key]) for key in gain if key.startswith("attack")]
        yield (
            f"{row['claim']} ({row['method']})",
            "more",
            f"top 50 under attack, by radius: {', '.join(ours)}",
            row["under attack"],
        )
    fashion = results.get("fashion")
    if fashion:
        both = fashion["original"], fashion["ATEX"]
        kinds = [[each[f"attack {r}"] for r in fashion["radii"]] for each in both]
        more = all(after["low"] > before["high"] for before, after in zip(*kinds, strict=True))
        pairs = zip(*(fashion["published"][name] for name in ("original", "ATEX")), strict=True)
        yield (
            "Tang et al. 2022: their two saved networks on Fashion-MNIST; top 50 under attack, by "
            "radius",
            ", ".join(f"{a} → {b}" for a, b in pairs),
            ", ".join(f"{a['mean']:.3f} → {b['mean']:.3f}" for a, b in zip(*kinds, strict=True)),
            "same direction at each radius" if more else "open: intervals overlap",
        )


def _atex_explainers(results: Any) -> Iterator[Row]:
    for name, row in results["gain over the teacher"].items():
        if name == "distilled":
            continue
        gain = row[f"{name}, attack 0.05"]
        yield (
            f"Tang et al. 2022: distillation along a map makes it more stable, whatever the "
            f"explainer; {name}, top 16 of its own map under attack at .05",
            "more",
            shown(gain),
            verdict(gain),
        )


CLAIMS: dict[str, Callable[[Any], Iterator[Row]]] = {
    "pixel_prior": _pixel_prior,
    "graph_prior": _graph_prior,
    "nhanes_sparsity": _nhanes_sparsity,
    "nhanes_sparsity_noise": _nhanes_sparsity,
    "correlated_groups": _correlated_groups,
    "convergence": _convergence,
    "nhanes_references": _nhanes_references,
    "stability_study": _stability_study,
    "atex_explainers": _atex_explainers,
}


def table(folder: Path = RESULTS) -> str:
    """Return the table of the claims whose benchmarks are in the folder."""
    lines = ["| claim | published | ours | verdict |", "|---|---|---|---|"]
    for name, rows in CLAIMS.items():
        path = folder / f"{name}.json"
        if path.exists():
            document = json.loads(path.read_text(encoding="utf-8"))
            lines += ["| " + " | ".join(row) + " |" for row in rows(document["results"])]
    return "\n".join(lines) + "\n"
