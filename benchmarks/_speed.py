"""Rows of the summary that are of time, memory and exactness."""

import statistics
from collections.abc import Callable, Iterator
from typing import Any

Row = tuple[str, str, str]
"""What was measured, the figure, and what it was meant to be (empty: nothing was)."""
_WAYS = ("double_backprop", "recompute", "finite_difference")


def again(found: Any, *references: str) -> str:
    """What references, or these, took over themselves (A/A), wherever below it was measured."""
    each = [item for again in _below(found, "A/A") for item in again.items()]
    ratios = [ratio for name, ratio in each if name in references or not references]
    if not ratios:
        return ""
    medians, ends = [r["median"] for r in ratios], [q for r in ratios for q in r["quartiles"]]
    median = " to ".join(dict.fromkeys(f"{m:.2f}" for m in (min(medians), max(medians))))
    return f"; A/A {median} (quartiles {min(ends):.2f} to {max(ends):.2f})"


def _below(found: Any, key: str) -> Iterator[Any]:
    for name, value in found.items() if isinstance(found, dict) else ():
        yield from [value] if name == key else _below(value, key)


def _training_step(results: Any) -> Iterator[Row]:
    for name, by_setting in results.items():
        for setting, found in by_setting.items():
            k, n = setting.split(", ")
            aim = 1.3 if (name, k) == ("MLP", "8") else 1.0
            yield (
                f"step with a prior, {name}, k = {k}, background of {int(n):,}: times faster than "
                "the published loop",
                f"{found['published over prior']:.2f}{again(found, 'published loop')}",
                f"≥ {aim}" if k == "1" or name == "MLP" else "",
            )
    for name, by_setting in results.items():
        found = by_setting["1, 1000"]
        lazy = found["over plain"]
        yield (
            f"the same, {name}, k = 1: times the plain step at every step, and under `Lazy(4)`",
            f"{lazy['prior']:.2f}, {lazy['prior, Lazy(4)']:.2f}{again(found, 'plain')}",
            "second ≤ 1.6",
        )


def _gpu_training_step(results: Any) -> Iterator[Row]:
    for name, found in results.items():
        if name in ("device", "batch"):
            continue
        steps = {n: s for n, s in found["steps"].items() if "loop_over_this" in s}
        yield (
            f"step on {results['device']}, batch of {results['batch']}, {name}: times faster than "
            f"the loop by hand, {', '.join(steps)}",
            ", ".join(f"{s['loop_over_this']:.2f}" for s in steps.values()) + again(found),
            "",
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
                f"{min(ratios):.2f} to {max(ratios):.2f}{again(by_count)}",
                f"≥ {aim}",
            )


def _estimator_efficiency(results: Any) -> Iterator[Row]:
    for name, found in results.items():
        for peer, median in found["median_ratio"].items():
            by_count = found["ratios"][peer]
            counts = [n for n in by_count if n in ("8", "32", "128")]
            stdev = statistics.stdev(found["median_ratio of seeds"][peer])
            yield (
                f"gradient evaluations of {peer} over ours at equal error, {name}: "
                f"median ± stdev over seeds; for its {', '.join(counts)} samples",
                f"{median:.1f} ± {stdev:.1f}; "
                + ", ".join(f"{by_count[n]['ratio']:.1f}" for n in counts),
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
            ", ".join(f"{t:.2f}" for t in times.values()) + again(found["relative_time"]),
            "≤ 1.6",
        )


def _cost_scaling(results: Any) -> Iterator[Row]:
    exponents = {axis: found["exponents"]["double_backprop"] for axis, found in results.items()}
    yield (
        "exponent of the cost of a prior's gradient in " + ", ".join(exponents),
        ", ".join(f"{e:.2f}" for e in exponents.values()),
        "",
    )
    for axis, found in results.items():
        over = [each["over plain"] for each in found.get("measured", {}).values()]
        if over:
            yield (
                f"time over a plain step by {axis}, {found['sizes'][0]:,} to "
                f"{found['sizes'][-1]:,}: prior's gradient; published loop's",
                "; ".join(
                    ", ".join(f"{each[kind]:.1f}" for each in over)
                    for kind in ("double_backprop", "published loop")
                )
                + again(found),
                "",
            )


def _adapter_overhead(results: Any) -> Iterator[Row]:
    values = sorted(row["values"] for row in results.values())
    backward = sorted(row["with backward"] for row in results.values())
    yield (
        f"Captum's {len(values)} classes through adapters, values: times the stock class, at most",
        f"{values[-1]:.2f}{again(results)}",
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
        + "".join(f"; not `{name}` ({ratio:.1f})" for name, ratio in missed.items())
        + again(results),
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
    for name, found in results["step"].items():
        yield (
            f"step with a prior of one sample, {name}: times the plain step, by `double_backprop`, "
            "`recompute`, `finite_difference`",
            ", ".join(f"{found[way]:.1f}" for way in _WAYS) + again(found),
            "",
        )


def _hessian_penalty(results: Any) -> Iterator[Row]:
    for name, found in results.items():
        values, by_count = found["values"], found["times"]
        off = [(values[k]["mean"] - values["exact"]) for k in ("HessianPenalty", "curvlinops")]
        yield (
            f"Hessian penalty, {name}: mean of draws less the exact value, relative; of curvlinops",
            ", ".join(f"{each / values['exact']:+.1e}" for each in off),
            "",
        )
        over = [each["over curvlinops"] for each in by_count.values()]
        yield (
            f"the same, {name}, {', '.join(by_count)} vectors: times curvlinops' value: value; "
            "with the parameter gradient, which curvlinops does not have",
            "; ".join(
                ", ".join(f"{each[kind]:.2f}" for each in over)
                for kind in ("exact", "exact, with gradient")
            )
            + again(by_count),
            "",
        )


ROWS: dict[str, Callable[[Any], Iterator[Row]]] = {
    "training_step": _training_step,
    "gpu_training_step": _gpu_training_step,
    "value_only": _value_only,
    "estimator_efficiency": _estimator_efficiency,
    "recompute_memory": _recompute_memory,
    "cost_scaling": _cost_scaling,
    "hessian_penalty": _hessian_penalty,
    "adapter_overhead": _adapter_overhead,
    "adapter_shap": _adapter_shap,
    "adapter_support": _adapter_support,
    "fused_attention": _fused_attention,
}
