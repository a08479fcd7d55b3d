"""Scores of attributions, for evaluation: one number for each example, without a graph.

Two maps of the same inputs: :func:`top_k_intersection`, :func:`spearman`, :func:`kendall`,
:func:`pearson`, :func:`ssim`, :func:`mse`. One map: :func:`gini`, :func:`wrong_reason_rate`. An
explainer on a model: :func:`local_lipschitz`, :func:`completeness_gap`. :func:`stability_report`
attacks models and tabulates what becomes of their maps. Rank correlations and the report need
``pip install 'captum_priors[metrics]'``.
"""

from captum_priors.metrics._explainer import completeness_gap, local_lipschitz
from captum_priors.metrics._maps import gini, wrong_reason_rate
from captum_priors.metrics._report import stability_report
from captum_priors.metrics._similarity import (
    kendall,
    mse,
    pearson,
    spearman,
    ssim,
    top_k_intersection,
)
from captum_priors.metrics._table import Row, Score, StabilityReport

__all__ = [
    "Row",
    "Score",
    "StabilityReport",
    "completeness_gap",
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
