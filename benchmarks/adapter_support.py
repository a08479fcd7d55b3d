"""Every Captum class through its adapter: error of values and of gradients, on each kind of model.

Values are compared with the stock class under one seed, gradients with central differences, both in
float64; the largest error of the exact differentiations is kept. Rows and models are those of the
tests. ``python -m tests.support_table`` puts the figures into the README.
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from _common import parser, save, show

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' table of classes

from captum_priors import differentiable
from captum_priors.testing import check_differentiable
from tests.adapters.captum_table import ROWS, Flat, flat, in_double, seeded, set_up, ways


def value_error(name: str, model_name: str) -> float:
    """Largest difference from the stock class, relative to its largest attribution."""
    row, model, x = set_up(name, model_name)
    stock, call = row.make(model), row.call(model)
    found = [
        flat(seeded(differentiable(stock, differentiation=way), x, call, row))
        for way in ways(row, model)
    ]
    expected = flat(seeded(stock, x.clone(), call, row))  # the last: stock LRP takes rules away
    return max(
        float((f - e).detach().abs().max() / e.detach().abs().max().clamp_min(1e-30))
        for each in found
        for f, e in zip(each, expected, strict=True)
    )


def certificate(name: str, model_name: str) -> float:
    """Error of the parameter gradient against central differences."""
    row, model, x = set_up(name, model_name)
    errors = []
    # What recompute replays in its backward pass is out of reach of the float64 that Captum's
    # float32 is put into here.
    for way in ways(row, model)[: 1 if row.single_precision else None]:
        explainer = Flat(differentiable(row.make(model), differentiation=way), row)
        with in_double(needed=row.single_precision):
            found = check_differentiable(
                explainer,
                x,
                parameters=model.named_parameters(),
                raise_exception=False,
                **row.call(model),
            )
        errors.append(found.error)
    return max(errors)


def main() -> None:
    """Measure and save."""
    options = parser(__doc__).parse_args()
    warnings.simplefilter("ignore")
    torch.set_default_dtype(torch.float64)
    results: dict[str, dict[str, Any]] = {}
    for name, row in ROWS.items():
        mine = results.setdefault(
            name.partition("-")[0], {"values": 0.0, "certificate": {}, "differentiations": []}
        )
        explainer = differentiable(row.make(set_up(name, row.model)[1]))
        mine["differentiations"] = list(explainer.differentiations)
        for model_name in row.models[:1] if options.quick else row.models:
            mine["values"] = max(mine["values"], value_error(name, model_name))
            error = certificate(name, model_name)
            mine["certificate"][model_name] = max(mine["certificate"].get(model_name, 0.0), error)
    show(
        "Against stock Captum, float64",
        ["class", "values", "certificate", "on"],
        [
            [name, r["values"], max(r["certificate"].values()), " ".join(r["certificate"])]
            for name, r in sorted(results.items())
        ],
    )
    save(options.output, "adapter_support", vars(options), results)


if __name__ == "__main__":
    main()
