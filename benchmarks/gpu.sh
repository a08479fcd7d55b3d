#!/usr/bin/env bash
# Everything that needs a GPU, in nine minutes at most and without a network: the tests of
# tests/gpu, then a training step with a prior at the size of ResNet-50 and of ViT-B.
#
#   benchmarks/gpu.sh [--device cpu] [--quick] [--output DIR] [--wheels DIR]
#
# --device cpu --quick runs the same in miniature on a machine without a GPU.
# DIR (bench-output/gpu) gets tests.txt, tests.json and gpu_training_step.json. The exit status is 1 where
# a test or the benchmark failed.
#
# Python is $PYTHON (python3). It has torch for CUDA, pytest, matplotlib, rich and scikit-learn, and
# Triton if compiled models are to be tested. Captum may come as a wheel, and SHAP, whose tests are
# skipped without. Where there is a network, for the Python that will run them:
#
#   python3 -m pip download --no-deps --dest wheels captum shap slicer
#
# and then --wheels wheels, which installs them into a temporary folder.
set -uo pipefail
cd "$(dirname "$0")/.."

LIMIT=530 TESTS=240  # seconds, of all and of the tests
PYTHON=${PYTHON:-python3} DEVICE=cuda QUICK= OUTPUT=bench-output/gpu WHEELS=
while (($#)); do
    case $1 in
        --device) DEVICE=$2; shift ;;
        --output) OUTPUT=$2; shift ;;
        --wheels) WHEELS=$2; shift ;;
        --quick) QUICK=--quick ;;
        *) echo "gpu.sh: expected an option named in its first lines, found $1" >&2; exit 2 ;;
    esac
    shift
done
mkdir -p "$OUTPUT" || exit 1
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export CAPTUM_PRIORS_DEVICE=$DEVICE MPLCONFIGDIR=${MPLCONFIGDIR:-$(mktemp -d)}
if [[ -n $WHEELS ]]; then
    site=$(mktemp -d)
    "$PYTHON" -m pip install --quiet --no-index --no-deps --target "$site" "$WHEELS"/*.whl || exit 1
    PYTHONPATH=$PWD:$site
fi
"$PYTHON" -c "import captum, torch; assert '$DEVICE' == 'cpu' or torch.cuda.is_available()" || {
    echo "gpu.sh: expected captum, and a torch that sees a GPU; see the first lines" >&2
    exit 1
}

SECONDS=0
# Warnings are shown, not raised: those of another torch than the suite's own would hide the rest.
timeout "$TESTS" "$PYTHON" -m pytest -q -p no:cacheprovider -W default --tb=short --durations=10 \
    --junitxml="$OUTPUT/tests.xml" tests/gpu tests/priors/test_mixed_precision.py \
    2>&1 | tee "$OUTPUT/tests.txt"
tested=$?
"$PYTHON" - "$OUTPUT" "$tested" "$SECONDS" <<'END'
import json, pathlib, sys
import torch
from xml.etree import ElementTree

output, status, seconds = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
report = output / "tests.xml"
cases = ElementTree.parse(report).iter("testcase") if report.exists() else ()
outcomes = {"passed": 0, "skipped": {}, "failed": {}}
for case in cases:
    name = f"{case.get('classname')}::{case.get('name')}"
    bad = [child for child in case if child.tag in ("failure", "error", "skipped")]
    for child in bad:
        kind = "skipped" if child.tag == "skipped" else "failed"
        outcomes[kind][name] = child.get("message", "")[:300]
    outcomes["passed"] += not bad
report.unlink(missing_ok=True)
device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
found = {"device": device, "torch": torch.__version__, "seconds": seconds, "status": status}
(output / "tests.json").write_text(json.dumps(found | outcomes, indent=1) + "\n")
END

left=$((LIMIT - SECONDS))
timeout "$left" "$PYTHON" benchmarks/gpu_training_step.py --device "$DEVICE" $QUICK \
    --seconds $((left - 60)) --output "$OUTPUT"
measured=$?
echo "gpu.sh: tests $tested, benchmark $measured (0 is well), $SECONDS s, results in $OUTPUT"
exit $((tested || measured))
