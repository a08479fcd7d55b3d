"""SHAP's own tests, run beside this package: the same ones pass as without it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("SHAP_TESTS", ""))
NAMES = "gradient deep kernel permutation partition sampling exact coalition linear explainer"
BESIDE = """
import captum_priors
import numpy, shap, torch
net, rows = torch.nn.Linear(3, 1), torch.eye(3)
predict = lambda x: net(torch.tensor(x).float()).detach().numpy()[:, 0]
for cls in (shap.GradientExplainer, shap.DeepExplainer):
    captum_priors.differentiable(cls(net, rows))(rows)
for cls in (shap.KernelExplainer, shap.PermutationExplainer, shap.ExactExplainer):
    captum_priors.differentiable(cls(predict, rows.numpy()), model=net)(rows.numpy())
"""
RUN = "import sys, pytest\nsys.exit(pytest.main(sys.argv[1:]))"


def passes(before: str) -> set[str]:
    """Names of the tests that pass in a process that runs some code first."""
    files = [f"explainers/test_{name}.py" for name in NAMES.split()]
    present = [name for name in files if (FOLDER / name).exists()]
    options = ["-rA", "-q", "-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={FOLDER}"]
    done = subprocess.run(
        [sys.executable, "-c", before + RUN, *options, *present],
        cwd=FOLDER,
        capture_output=True,
        check=False,
        text=True,
    )
    found = {line for line in done.stdout.splitlines() if line.startswith("PASSED ")}
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    return found


@pytest.mark.slow
@pytest.mark.skipif(
    "SHAP_TESTS" not in os.environ,
    reason="SHAP's wheel has no tests: set SHAP_TESTS to the folder `tests` of its source archive "
    "(pip download --no-deps --no-binary shap shap==VERSION)",
)
def test_the_same_of_shap_s_own_tests_pass() -> None:
    assert passes(BESIDE) == passes("")
