"""What trains a model on several processes, and how an attribution can go wrong in it unnoticed.

``DistributedDataParallel`` averages gradients in the backward pass that follows its forward pass,
once. A backward pass that it does not take part in leaves every process with gradients of its own;
with ``static_graph=True`` so does a gradient that is taken through the wrapper in its first step.
``fully_shard`` collects a module's gradients when the backward pass leaves the module, and does not
see those that come later. Torch reports none of this.
"""

import gc
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from captum_priors._engine._graph import nodes
from captum_priors._errors import NotDifferentiableError, expected_found

_TRAIN = (
    "Explain the module and train through its wrapper, with one backward pass for everything: "
    "explainer = Explainer(ddp.module); (F.cross_entropy(ddp(x), y) + prior(x, target=y))"
    ".backward()"
)


def wrapper_classes() -> tuple[type[nn.Module], ...]:
    """Classes of which ``refuse_wrapper`` refuses the modules."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    found = getattr(fsdp, "FullyShardedDataParallel", None)
    return (DistributedDataParallel,) if found is None else (DistributedDataParallel, found)


def refuse_wrapper(module: nn.Module) -> None:
    """Refuse to run a model through its data-parallel wrapper while it is explained."""
    if isinstance(module, DistributedDataParallel):
        raise NotDifferentiableError(
            expected_found(
                "`forward_func`",
                "the model itself",
                "DistributedDataParallel around it, which exchanges buffers and prepares its "
                "averaging of gradients anew in each forward pass (with static_graph=True the "
                "averaging would stop in silence)",
                f"{_TRAIN}.",
            )
        )
    if isinstance(module, wrapper_classes()):
        raise NotDifferentiableError(
            expected_found(
                "`forward_func`",
                "a model that can be differentiated twice",
                "FullyShardedDataParallel, which cannot",
                "Shard it with torch.distributed.fsdp.fully_shard.",
            )
        )


# Steps of tensor parallelism whose backward pass returns its result without a graph.
_EXCHANGES = {"_FromTorchTensorBackward", "_ToTorchTensorBackward", "RedistributeBackward"}


def refuse_lost_gradients(outputs: Iterable[Tensor], *, twice: bool) -> None:
    """Refuse to differentiate outputs where torch would lose gradients without a word.

    A gradient through the static-graph wrapper uses up its one delayed reduction; differentiated
    twice, the exchange of tensor parallelism is a constant.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    for node in nodes(outputs):
        wrapper = getattr(node, "ddp_weakref", None)
        if wrapper is not None and getattr(wrapper(), "static_graph", False):
            raise NotDifferentiableError(
                expected_found(
                    "`forward_func`",
                    "the model itself",
                    "DistributedDataParallel(static_graph=True), which would stop averaging "
                    "gradients in silence",
                    f"{_TRAIN}.",
                )
            )
        if twice and node.name() in _EXCHANGES:
            raise NotDifferentiableError(
                expected_found(
                    "double backpropagation",
                    "a model that each process computes by itself",
                    "tensor-parallel parameters, whose exchange between processes torch does not "
                    "differentiate twice, and does not say so",
                    "Use differentiation='finite_difference'.",
                )
            )


def watched(
    value: Tensor, modules_behind: Callable[[], Sequence[nn.Module]], *, whole: bool
) -> Tensor:
    """See to it that the gradient of a value reaches all processes, or raise in its backward pass.

    Nothing is checked where no gradient is accumulated (``torch.autograd.grad``), nor under
    ``no_sync``. ``whole`` says that the pass runs through input gradients, whose graph refers to
    whole parameters.
    """
    if not (value.requires_grad and dist.is_available() and dist.is_initialized()):
        return value
    modules = modules_behind()
    wrappers = [w for w in wrappers_of(modules) if dist.get_world_size(w.process_group) > 1]
    wrappers = [w for w in wrappers if not _averages_elsewhere(w)]
    sharded = [module for module in modules if _sharded_groups(module)]
    _let_go(g for module in sharded for g in _sharded_groups(module))  # after one that raised
    if not wrappers and not sharded:
        return value
    before = [_delayed_reduction(w) for w in wrappers]

    def on_gradient(gradient: Tensor) -> None:
        if sharded:
            _attend(sharded, whole=whole)
        for wrapper, delayed in zip(wrappers, before, strict=True):
            if _accumulates(wrapper):
                _when_over(_check_of(wrapper, delayed))

    value.register_hook(on_gradient)
    return value


def _when_over(function: Callable[[], None]) -> None:
    """Call a function at the end of the backward pass under way."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def _check_of(wrapper: DistributedDataParallel, delayed: bool) -> Callable[[], None]:
    def check() -> None:
        """Run at the end of a backward pass, before the wrapper puts away its reduction."""
        in_first_step = _delayed_reduction(wrapper) and not delayed
        if in_first_step or _is_reducing(wrapper):
            return
        # Gradients kept back on purpose; a static graph then counts its passes wrongly.
        if not wrapper.require_backward_grad_sync and not wrapper.static_graph:
            return
        raise NotDifferentiableError(
            expected_found(
                "backward pass of a prior",
                "DistributedDataParallel to average the gradients in the same pass",
                "that it does not take part: the processes would drift apart",
                f"{_TRAIN}. A backward pass of the prior's own goes first, under ddp.no_sync() "
                "and without static_graph.",
            )
        )

    return check


def _is_reducing(wrapper: DistributedDataParallel) -> bool:
    try:
        wrapper._check_reducer_finalized()
    except RuntimeError:
        return True
    return False


def _delayed_reduction(wrapper: DistributedDataParallel) -> bool:
    """Whether a static graph has had its first backward pass, which reduces when it is over."""
    return bool(getattr(wrapper, "_static_graph_delay_allreduce_enqueued", False))


def _averages_elsewhere(wrapper: DistributedDataParallel) -> bool:
    return any(
        getattr(wrapper, name, False)
        for name in ("_use_python_reducer", "_delay_all_reduce_all_params")
    ) or not hasattr(wrapper, "_check_reducer_finalized")


def _accumulates(wrapper: DistributedDataParallel) -> bool:
    """Whether the backward pass under way accumulates into a parameter of the wrapper's."""
    for parameter in wrapper._module_parameters:
        with torch.enable_grad():
            view: Any = parameter.view_as(parameter).grad_fn
        try:
            if torch._C._will_engine_execute_node(view.next_functions[0][0]):
                return True
        except RuntimeError:  # torch.autograd.grad with respect to this parameter
            continue
    return False


class _Finder:
    """Find the wrappers around modules, which know nothing of them.

    The garbage collector knows the wrappers that there are, and takes a tenth of a second to say;
    it is asked once, and of later ones torch tells when they take up their module.
    """

    def __init__(self) -> None:
        self._known: WeakSet[DistributedDataParallel] | None = None

    def __call__(self, modules: Sequence[nn.Module]) -> list[DistributedDataParallel]:
        if self._known is None:
            # Without isinstance, which asks objects that answer with a warning for their class.
            every = (o for o in gc.get_objects() if DistributedDataParallel in type(o).__mro__)
            self._known = WeakSet(every)
            register_module_module_registration_hook(self._on_registration)
        ours = set(modules)
        return [w for w in self._known if any(module in ours for module in w.modules())]

    def _on_registration(self, parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if isinstance(parent, DistributedDataParallel) and self._known is not None:
            self._known.add(parent)


wrappers_of = _Finder()


def data_parallel_rank(modules_behind: Callable[[], Sequence[nn.Module]]) -> int:
    """Place of this process among those that train the modules on different examples."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0
    modules = modules_behind()
    for wrapper in wrappers_of(modules):
        return dist.get_rank(wrapper.process_group)
    shards = any(_sharded_groups(module) for module in modules)
    return dist.get_rank() if shards and not computed_together(modules) else 0


def ranks_that_train(modules: Sequence[nn.Module]) -> set[int]:
    """Return the processes whose gradients are averaged; none where nothing here averages them."""
    for wrapper in wrappers_of(modules):
        return set(dist.get_process_group_ranks(wrapper.process_group))
    for module in modules:
        for group in _sharded_groups(module):
            return set(group.mesh_info.mesh.mesh.flatten().tolist())
    return set()


def computed_together(modules: Sequence[nn.Module]) -> bool:
    """Whether processes share the computation of each example (tensor parallelism).

    Parameters that ``fully_shard`` alone has spread are whole when they compute.
    """
    groups = [group for module in modules for group in _sharded_groups(module)]
    parameters = [parameter for group in groups for parameter in group.fsdp_params]
    if any(parameter.is_dtensor for parameter in parameters):
        return True
    spread = {id(parameter.sharded_param) for parameter in parameters}
    return any(
        hasattr(p, "device_mesh") and id(p) not in spread
        for module in modules
        for p in module.parameters(recurse=False)
    )


# Groups that are kept whole until the backward pass under way is over, and what they do else.
_kept: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def _let_go(groups: Iterable[Any]) -> list[Any]:
    """End what keeps groups whole, if anything does; return those that then go apart."""
    ended = []
    for group in groups:
        before = _kept.pop(group, None)
        if before is not None:
            group.reshard_after_backward = before
            ended += [group] if before else []
    return ended


def _attend(sharded: Sequence[Any], *, whole: bool) -> None:
    """See what the rest of the backward pass leaves, with whole modules if need be.

    The graph of an input gradient refers to whole parameters, whose memory ``fully_shard`` frees
    after each pass and fills again when it makes the module whole.
    """
    groups = [group for module in sharded for group in _sharded_groups(module)]
    if whole:
        for group in groups:
            _kept.setdefault(group, group.reshard_after_backward)
            group.reshard_after_backward = False
        for module in sharded:
            module.unshard()

    def over() -> None:
        for group in _let_go(groups):
            group.reshard()
        if any(_leaves_gradients(group) for group in groups):
            raise NotDifferentiableError(
                expected_found(
                    "backward pass of a prior",
                    "its gradients before fully_shard collects those of the module",
                    "that some came later and were left behind",
                    "Evaluate the prior after the model's forward pass: loss = "
                    "F.cross_entropy(model(x), y); loss = loss + prior(x, target=y).",
                )
            )

    # At the end, and there once more at the end: behind what fully_shard does there.
    _when_over(lambda: _when_over(over))


def _leaves_gradients(group: Any) -> bool:
    """Whether a whole parameter has a gradient that was not handed to the shards, as it should."""
    whole = [getattr(p, "_unsharded_param", None) for p in group.fsdp_params]
    return group.reduce_grads and any(p is not None and p.grad is not None for p in whole)


def computes_in_half(modules: Iterable[nn.Module]) -> bool:
    """Whether sharded modules cast their inputs to half precision."""
    halves = (torch.float16, torch.bfloat16)
    groups = (group for module in modules for group in _sharded_groups(module))
    return any(group.mp_policy.param_dtype in halves for group in groups)


# Where torch has it, from 2.6 on and before; not imported, which would take long.
_FSDP = ("torch.distributed.fsdp", "torch.distributed._composable.fsdp")


def _sharded_groups(module: nn.Module) -> list[Any]:
    """Parameter groups of a module that ``fully_shard`` has made."""
    found: list[Any] = [sys.modules.get(name) for name in _FSDP]
    classes = tuple(fsdp.FSDPModule for fsdp in found if hasattr(fsdp, "FSDPModule"))
    if not isinstance(module, classes):
        return []
    state: Any = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    return list(groups) if groups is not None else [g for g in [state._fsdp_param_group] if g]
