"""One Markdown table of what the benchmarks found, made from their JSON files.

``python benchmarks/_summary.py [FOLDER]`` writes ``FOLDER/summary.md``, which begins with the table
of the papers' claims.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # for who imports it as a part of a package

from _speed import ROWS as SPEED_ROWS
from _speed import Row, again

RESULTS = Path(__file__).parent / "results"


def _decoy_mnist(results: Any) -> Iterator[Row]:
    for name, published in results["published"].items():
        test = results["found"][name]["test"]
        yield (
            f"right for the right reasons on decoy MNIST, {name}: test accuracy",
            f"{test['mean']:.3f} ± {test['stdev']:.3f}",
            f"published {published}",
        )


def _published_code(results: Any) -> Iterator[Row]:
    for name, row in results["found"].items():
        shown = f"{row['test']['mean']:.3f} ± {row['test']['stdev']:.3f}"
        gain = results["what is meant less what is written"].get(name)
        if gain is not None:
            shown += f"; {gain['mean']:+.3f} ± {gain['error']:.3f} (standard error)"
        yield (
            f"decoy MNIST, {name}: test accuracy"
            + ("; what is meant less that, paired" if gain is not None else ""),
            shown,
            "",
        )


def _concepts_and_agreement(results: Any) -> Iterator[Row]:
    parts = {
        "concepts": ("a tag on MNIST's 8", ("clean", "all tagged")),
        "agreement": (
            "agreement on NHANES I",
            ("ROC-AUC", "gradient, average gradient", "input x gradient, IG"),
        ),
    }
    for part, (title, keys) in parts.items():
        for name, row in results[part].items():
            each = (f"{row[key]['mean']:.3f} ± {row[key]['stdev']:.3f}" for key in keys)
            yield f"{title}, {name}: {'; '.join(keys)}", "; ".join(each), ""


def _batch_norm(results: Any) -> Iterator[Row]:
    for part in ("core", "beyond the core"):
        for name, row in results[part].items():
            within, beside = row["runs within"], row["test, batch less loop"]
            yield (
                f"BatchNorm in training mode, {part}, {name}: of {row['runs']} runs, those whose "
                "accuracy in evaluation mode is within a point of that with recomputed statistics "
                "(running statistics; published loop); test accuracy less that of the loop",
                f"{within['batch']} ({within['running']}; {within['loop']}); "
                f"{beside['mean']:+.3f} ± {beside['error']:.3f} (standard error)",
                "all; ≥ 0",
            )


def _right_reasons(results: Any) -> Iterator[Row]:
    published = results["published"]["average of labels, worst label"]
    for task, rows in results["found"].items():
        for name, row in rows.items():
            known = published.get(name.split(",")[0]) or published.get(f"{name.split(',')[0]}*")
            shown = [row["worst"]["mean"]]
            if "worst label" in row:
                shown += [row["average of labels"]["mean"], row["worst label"]["mean"]]
            yield (
                f"{task}, {name}: worst-group accuracy"
                + ("; average of labels, worst label" if len(shown) > 1 else ""),
                "; ".join(f"{value:.3f}" for value in shown),
                "published {}; {}".format(*known) if known and len(shown) > 1 else "",
            )


def _rationales(results: Any) -> Iterator[Row]:
    gains = results["gain over no prior, paired"]
    for name, row in results["found"].items():
        keys = ("originals", "counterfactuals", "AUC, trained on", "AUC, left out")
        each = (f"{row[key]['mean']:.3f} ± {row[key]['stdev']:.3f}" for key in keys)
        gain = gains[name]["counterfactuals"]
        yield (
            f"rationales of reviews, {name}: accuracy on originals; on counterfactuals; agreement "
            "(ROC-AUC) of the explainer trained on; of leaving words out",
            "; ".join(each),
            ""
            if name == "no prior"
            else f"counterfactuals {gain['mean']:+.3f} ± {gain['error']:.3f} (standard error)",
        )


def _ranked_gradients(results: Any) -> Iterator[Row]:
    for name, row in results["found"].items():
        keys = ("accuracy", "top-8, attack")
        each = (f"{row[key]['mean']:.3f} ± {row[key]['stdev']:.3f}" for key in keys)
        yield f"digits, {name}: accuracy; top-8 intersection under attack", "; ".join(each), ""


def _pixel_prior(results: Any) -> Iterator[Row]:
    for name, row in results.get("found", {}).items():
        shown = [
            f"{row[key]['mean']:.3f} ± {row[key]['stdev']:.3f}"
            for key in ("clean", "gauss 1", "s&p 0.1")
        ]
        published = results["published"].get(name.partition(",")[0], {})
        yield (
            f"MNIST, {name}: accuracy clean, Gaussian noise of 1, 10 % salt and pepper",
            "; ".join(shown),
            f"published clean {published['clean']}, 10 % {published['s&p 0.1']}"
            if published
            else "",
        )

    times = {k: v for k, v in results["relative_time"].items() if k not in ("plain", "A/A")}
    yield (
        f"MNIST, time of a step over the plain one: {', '.join(times)}",
        ", ".join(f"{t:.1f}" for t in times.values()) + again(results["relative_time"]),
        "",
    )


def _nhanes_sparsity(results: Any) -> Iterator[Row]:
    noise = results.get("columns of noise", 0)
    data = f"100 rows, {noise} columns of noise" if noise else "100 rows"
    published = {} if noise else results["published"]
    for name, row in results["chosen"].items():
        auc, gini = row["ROC-AUC"], row["Gini"]
        yield (
            f"sparsity on NHANES I, {data}, {name}: ROC-AUC; Gini of attributions",
            f"{auc['mean']:.3f} ± {auc['stdev']:.3f}; {gini['mean']:.2f} ± {gini['stdev']:.2f}",
            "published {}; {}".format(*published[name]) if name in published else "",
        )


def _nhanes_references(results: Any) -> Iterator[Row]:
    published = results["published"]
    theirs = {**published["expected gradients"], **published}
    for name, row in results["found"].items():
        auc, known = row["ROC-AUC"], theirs.get(name.removeprefix("monte_carlo, k = "), "")
        yield (
            f"the sparsity prior by references, {name}: ROC-AUC, {len(auc['values'])} splits",
            f"{auc['mean']:.4f} ± {auc['stdev']:.4f}",
            f"published {known}" if known else "",
        )
    for name, row in results["paired"].items():
        gain = row["ROC-AUC"]
        yield (
            f"the same, {name}: ROC-AUC, in pairs, with its 95 % interval",
            f"{gain['mean']:+.4f} ± {gain['half width']:.4f}",
            "",
        )


def _graph_prior(results: Any) -> Iterator[Row]:
    for name, row in results["gain over no graph"].items():
        if name.endswith("graph") and name != "no graph":
            yield (
                f"graph prior, {name}: gain in R²",
                f"{row['R2']['mean']:+.3f} ± {row['R2']['error']:.3f} (standard error)",
                "> 0" if name == "true graph" else "≤ 0",
            )


def _correlated_groups(results: Any) -> Iterator[Row]:
    for kind, row in results["found"].items():
        better = row["metrics better than integrated gradients"]
        yield (
            f"keep/remove metrics, {kind}: EG better than IG on; with `monte_carlo`, and with "
            "`control_variate`",
            "; ".join(f"{n} of 18" for n in better.values()),
            "18" if kind == "correlated groups" else "",
        )


def _convergence(results: Any) -> Iterator[Row]:
    for name in ("EG, k = 1", "EG, k = 5", "IG, 2 steps", "gradients"):
        row = results["found"][name]
        yield (
            f"order of estimators on two equal features, {name}: epochs (not theirs) until one is "
            "unused; its share at the end",
            f"{row['epochs until gone']['mean']:.0f}; {row['dependence at the end']['mean']:.2f}",
            "",
        )


def _relu_differentiation(results: Any) -> Iterator[Row]:
    for data, row in results["at equal penalty"].items():
        ways = [name for name in row if name != "TV"]
        yield (
            f"ReLU networks on {data}, accuracy at equal penalty (middle of three): "
            + ", ".join(f"`{way}`" for way in ways),
            ", ".join(f"{row[way][1]:.3f}" for way in ways),
            "",
        )


def _choose_weight(results: Any) -> Iterator[Row]:
    for name, row in results.items():
        proposed, good = row["proposed"], row["as good as the best"]
        yield (
            f"`choose_weight`, {name}: proposal over the best of the decades; proposal (before "
            "training); best (as good: within a standard error)",
            f"{row['proposed over best']:.2g}; {proposed['early']:.2g} ({proposed['start']:.2g}); "
            f"{row['best weight']:g} ({min(good):g} to {max(good):g})",
            "0.1 to 10",
        )


def _stability_study(results: Any) -> Iterator[Row]:
    for name, row in results["found"].items():
        radii = [column.split()[1] for column in row if column.startswith("attack")]
        shown = [row[f"attack {r}"] for r in radii]
        yield (
            f"top 50 that stay under attack, MNIST, {name}: radii {', '.join(radii)}",
            "; ".join(f"{each['mean']:.3f} ± {each['stdev']:.3f}" for each in shown),
            "",
        )
    fashion = results.get("fashion")
    for name in ("original", "ATEX") if fashion else ():
        found = [fashion[name][f"attack {r}"]["mean"] for r in fashion["radii"]]
        yield (
            f"Fashion-MNIST, {name} network of ATEX's authors: top 50 that stay under attack at "
            + ", ".join(map(str, fashion["radii"])),
            "; ".join(f"{each:.3f}" for each in found),
            "published " + "; ".join(map(str, fashion["published"][name])),
        )


def _atex_explainers(results: Any) -> Iterator[Row]:
    for direction, row in results["gain over the teacher"].items():
        keys = [key for key in row if key.endswith("attack 0.05")]
        yield (
            f"ATEX along {direction}: change of the top 16 under attack at .05 of "
            + ", ".join(key.partition(",")[0] for key in keys),
            "; ".join(f"{row[key]['mean']:+.3f} ± {row[key]['half width']:.3f}" for key in keys),
            "",
        )


ROWS: dict[str, Callable[[Any], Iterator[Row]]] = {
    **SPEED_ROWS,
    "pixel_prior": _pixel_prior,
    "decoy_mnist": _decoy_mnist,
    "published_code": _published_code,
    "concepts_and_agreement": _concepts_and_agreement,
    "batch_norm": _batch_norm,
    "right_reasons": _right_reasons,
    "rationales": _rationales,
    "stability_study": _stability_study,
    "choose_weight": _choose_weight,
    "ranked_gradients": _ranked_gradients,
    "atex_explainers": _atex_explainers,
    "relu_differentiation": _relu_differentiation,
    "nhanes_sparsity": _nhanes_sparsity,
    "nhanes_sparsity_noise": _nhanes_sparsity,
    "nhanes_references": _nhanes_references,
    "graph_prior": _graph_prior,
    "correlated_groups": _correlated_groups,
    "convergence": _convergence,
}
"""The rows of each benchmark; one that is not here is named, with a link to its figures."""


def table(folder: Path = RESULTS) -> str:
    """Return the table of what is in the folder."""
    found = {path.stem: path for path in folder.glob("*.json")}
    order = [*(n for n in ROWS if n in found), *sorted(found.keys() - ROWS.keys())]
    lines = ["| benchmark | what | measured | aim |", "|---|---|---|---|"]
    for name in order:
        document = json.loads(found[name].read_text(encoding="utf-8"))
        shown = f"`{name}`" + (" (quick)" if document["settings"].get("quick") else "")
        rows = ROWS.get(name, lambda _: iter([("see the README of the benchmarks", "", "")]))
        for what, measured, aim in rows(document["results"]):
            lines.append(f"| {shown} | {what} | {measured} | {aim} |")
    return "\n".join(lines) + "\n"


def write(folder: Path = RESULTS, claims: str = "") -> Path:
    """Write the table beside the figures, that of the papers' claims before it."""
    path = folder / "summary.md"
    path.write_text(f"{claims}\n{table(folder)}".lstrip(), encoding="utf-8")
    return path


if __name__ == "__main__":
    from _claims import table as claims_table

    chosen = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    print(write(chosen, claims_table(chosen)))
