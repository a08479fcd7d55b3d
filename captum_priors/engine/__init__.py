"""What everything else is made of, for people who extend the package.

Whatever explains a model does so inside an :class:`AttributionPass`, and takes gradients of its
output by the input with :func:`input_gradients`, nowhere else. :func:`recompute` and
:func:`with_pullback` give values now and their gradient later.
"""

from captum_priors.engine.coupled import refuse_coupled_examples
from captum_priors.engine.gradients import (
    Field,
    check_rows,
    input_gradients,
    with_second_derivative,
)
from captum_priors.engine.model import (
    AttributionPass,
    attribution_call,
    current_pass,
)
from captum_priors.engine.modules import modules_of, run_modules, submodules_of
from captum_priors.engine.processes import any_process, current_processes
from captum_priors.engine.random import Stream, derive
from captum_priors.engine.replay import (
    Program,
    Visit,
    keep_graph,
    recompute,
    with_pullback,
)

__all__ = [
    "AttributionPass",
    "Field",
    "Program",
    "Stream",
    "Visit",
    "any_process",
    "attribution_call",
    "check_rows",
    "current_pass",
    "current_processes",
    "derive",
    "input_gradients",
    "keep_graph",
    "modules_of",
    "recompute",
    "refuse_coupled_examples",
    "run_modules",
    "submodules_of",
    "with_pullback",
    "with_second_derivative",
]
