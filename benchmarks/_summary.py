"""One Markdown table of what the benchmarks found, made from their JSON files.

``python benchmarks/_summary.py [FOLDER]`` writes ``FOLDER/summary.md``, which begins with the table
of the papers' claims.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Row = tuple[str, str, str]
"""What was measured, the figure, and what it was meant to be (empty: nothing was)."""


def _training_step(results: Any) -> Iterator[Row]:
    for name, by_setting in results.items():
        for setting, found in by_setting.items():
            k, n = setting.split(", ")
            aim = 1.3 if (name, k) == ("MLP", "8") else 1.0
            yield (
                f"step with a prior, {name}, k = {k}, background of {int(n):,}: times faster than "
                "the published loop",
                f"{found['published over prior']:.2f}",
                f"≥ {aim}" if k == "1" or name == "MLP" else "",
            )
    for name, by_setting in results.items():
        lazy = by_setting["1, 1000"]["over plain"]
        yield (
            f"the same, {name}, k = 1: times the plain step at every step, and under `Lazy(4)`",
            f"{lazy['prior']:.2f}, {lazy['prior, Lazy(4)']:.2f}",
            "second ≤ 1.6",
        )


def _value_only(results: Any) -> Iterator[Row]:
    aims = {"MLP": {"GradientShap": 1, "GradientExplainer": 5}}
    for name, by_peer in results.items():
        for peer, by_count in by_peer.items():
            ratios = [found["ratio"] for found in by_count.values()]
            counts = list(by_count)
            aim = aims.get(name, {}).get(peer.partition(",")[0], 1)
            yield (
                f"values, {name}, {counts[0]} to {counts[-1]} samples: times faster than {peer}",
                f"{min(ratios):.2f} to {max(ratios):.2f}",
                f"≥ {aim}",
            )


def _estimator_efficiency(results: Any) -> Iterator[Row]:
    for name, found in results.items():
        for peer, median in found["median_ratio"].items():
            by_count = found["ratios"][peer]
            counts = [n for n in by_count if n in ("8", "32", "128")]
            yield (
                f"gradient evaluations of {peer} over ours at equal error, {name}: "
                f"median; for its {', '.join(counts)} samples",
                f"{median:.1f}; " + ", ".join(f"{by_count[n]['ratio']:.1f}" for n in counts),
                "≥ 4",
            )


def _recompute_memory(results: Any) -> Iterator[Row]:
    for name, found in results.items():
        growth = found["growth_recompute"]
        yield (
            f"`recompute`, {name}: peak memory at 512 samples over that at 16",
            f"{max(growth.values()):.2f}",
            "≤ 1.3",
        )
        times = {n: ratios["recompute"] for n, ratios in found["relative_time"].items()}
        yield (
            f"`recompute`, {name}: time over double backpropagation, {', '.join(times)} samples",
            ", ".join(f"{t:.2f}" for t in times.values()),
            "≤ 1.6",
        )


def _cost_scaling(results: Any) -> Iterator[Row]:
    exponents = {axis: found["exponents"]["double_backprop"] for axis, found in results.items()}
    yield (
        "exponent of the cost of a prior's gradient in " + ", ".join(exponents),
        ", ".join(f"{e:.2f}" for e in exponents.values()),
        "",
    )


def _adapter_overhead(results: Any) -> Iterator[Row]:
    values = sorted(row["values"] for row in results.values())
    backward = sorted(row["with backward"] for row in results.values())
    yield (
        f"Captum's {len(values)} classes through adapters, values: times the stock class, at most",
        f"{values[-1]:.2f}",
        "≤ 1.2",
    )
    yield (
        "the same with graph and backward pass: median, at most",
        f"{backward[len(backward) // 2]:.2f}, {backward[-1]:.2f}",
        "",
    )


def _adapter_shap(results: Any) -> Iterator[Row]:
    missed = {
        name: row["with backward"]
        for name, row in results.items()
        if row["with backward"] > (4 if name == "ExactExplainer" else 2)
    }
    yield (
        "SHAP's classes through adapters, values and backward: within 2 (Exact: 4) times stock",
        f"{len(results) - len(missed)} of {len(results)}"
        + "".join(f"; not `{name}` ({ratio:.1f})" for name, ratio in missed.items()),
        "all",
    )


def _adapter_support(results: Any) -> Iterator[Row]:
    yield (
        "adapters' certificates of the parameter gradient: largest error",
        f"{max(max(row['certificate'].values()) for row in results.values()):.0e}",
        "≤ 1e-06",
    )


def _fused_attention(results: Any) -> Iterator[Row]:
    by_penalty = results["errors"]["gelu"]
    errors = [e for by_length in by_penalty.values() for each in by_length.values() for e in each]
    yield (
        "`finite_difference` on a fused-attention transformer with GELU: largest gradient error",
        f"{max(errors):.1e}",
        "≤ 1e-02",
    )


def _decoy_mnist(results: Any) -> Iterator[Row]:
    for name, published in results["published"].items():
        test = results["found"][name]["test"]
        yield (
            f"right for the right reasons on decoy MNIST, {name}: test accuracy",
            f"{test['mean']:.3f} ± {test['spread']:.3f}",
            f"published {published}",
        )


def _published_code(results: Any) -> Iterator[Row]:
    for name, row in results["found"].items():
        shown = f"{row['test']['mean']:.3f} ± {row['test']['spread']:.3f}"
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
            each = (f"{row[key]['mean']:.3f} ± {row[key]['spread']:.3f}" for key in keys)
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
        each = (f"{row[key]['mean']:.3f} ± {row[key]['spread']:.3f}" for key in keys)
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
        each = (f"{row[key]['mean']:.3f} ± {row[key]['spread']:.3f}" for key in keys)
        yield f"digits, {name}: accuracy; top-8 intersection under attack", "; ".join(each), ""


def _pixel_prior(results: Any) -> Iterator[Row]:
    for name, row in results.get("found", {}).items():
        shown = [
            f"{row[key]['mean']:.3f} ± {row[key]['spread']:.3f}"
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


def _nhanes_sparsity(results: Any) -> Iterator[Row]:
    noise = results.get("columns of noise", 0)
    data = f"100 rows, {noise} columns of noise" if noise else "100 rows"
    for name, row in results["chosen"].items():
        auc, gini = row["ROC-AUC"], row["Gini"]
        yield (
            f"sparsity on NHANES I, {data}, {name}: ROC-AUC; Gini of attributions",
            f"{auc['mean']:.3f} ± {auc['spread']:.3f}; {gini['mean']:.2f} ± {gini['spread']:.2f}",
            "published {}; {}".format(*results["published"][name]),
        )


def _nhanes_references(results: Any) -> Iterator[Row]:
    published = results["published"]
    theirs = {**published["expected gradients"], "X-Gradient": published["X-Gradient"]}
    for name, row in results["found"].items():
        auc, known = row["ROC-AUC"], theirs.get(name.rpartition(" = ")[2], published.get(name, ""))
        yield (
            f"the sparsity prior by references, {name}: ROC-AUC, {len(auc['values'])} splits",
            f"{auc['mean']:.4f} ± {auc['spread']:.4f}",
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
    "training_step": _training_step,
    "value_only": _value_only,
    "estimator_efficiency": _estimator_efficiency,
    "recompute_memory": _recompute_memory,
    "cost_scaling": _cost_scaling,
    "adapter_overhead": _adapter_overhead,
    "adapter_shap": _adapter_shap,
    "adapter_support": _adapter_support,
    "fused_attention": _fused_attention,
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
