"""Scores of attributions, for evaluation: one number for each example, without a graph.

Two maps of the same inputs: :func:`top_k_intersection`, :func:`spearman`, :func:`kendall`,
:func:`pearson`, :func:`ssim`, :func:`mse`. One map: :func:`gini`, :func:`wrong_reason_rate`. The
features of a tuple count together. An explainer on a model: :func:`local_lipschitz`.
:func:`stability_report` attacks explanations and tabulates what becomes of them; it needs ``pip
install 'captum_priors[metrics]'``.
"""

from captum_priors.metrics.explainer import local_lipschitz
from captum_priors.metrics.maps import (
    gini,
    kendall,
    mse,
    pearson,
    spearman,
    ssim,
    top_k_intersection,
    wrong_reason_rate,
)
from captum_priors.metrics.report import (
    ReportRow,
    ReportScore,
    StabilityReport,
    stability_report,
)

__all__ = [
    "ReportRow",
    "ReportScore",
    "StabilityReport",
    "gini",
    "kendall",
    "local_lipschitz",
    "mse",
    "pearson",
    "spearman",
    "ssim",
    "stability_report",
    "top_k_intersection",
    "wrong_reason_rate",
]
