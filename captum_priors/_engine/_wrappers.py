"""What trains a model on several processes, and how an attribution can go wrong in it unnoticed.

``DistributedDataParallel`` averages gradients in the backward pass that follows its forward pass,
once. A backward pass that it does not take part in leaves every process with gradients of its own;
with ``static_graph=True`` so does a gradient that is taken through the wrapper in its first step.
``fully_shard`` collects a module's gradients when the backward pass leaves the module, and does not
see those that come later. Torch reports none of this.
"""

import gc
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from captum_priors._engine._graph import nodes
from captum_priors._errors import NotDifferentiableError, expected_found

_TRAIN = (
    "Explain the module and train through its wrapper, with one backward pass for everything: "
    "explainer = Explainer(ddp.module); (F.cross_entropy(ddp(x), y) + prior(x, target=y))"
    ".backward()"
)


def refuse_wrapper(module: nn.Module) -> None:
    """Refuse to run a model through its data-parallel wrapper while it is explained."""
    if isinstance(module, DistributedDataParallel):
        raise NotDifferentiableError(
            expected_found(
                "`forward_func`",
                "the model itself",
                "DistributedDataParallel around it, whose gradient averaging does not expect the "
                "additional passes of an attribution (with static_graph=True it stops in silence, "
                "and its buffers are exchanged each time)",
                f"{_TRAIN}.",
            )
        )
    if _is_fsdp1(module):
        raise NotDifferentiableError(
            expected_found(
                "`forward_func`",
                "a model that can be differentiated twice",
                "FullyShardedDataParallel, which cannot",
                "Shard it with torch.distributed.fsdp.fully_shard.",
            )
        )


def refuse_spent_reduction(outputs: Iterable[Tensor]) -> None:
    """Refuse a gradient that would use up the static-graph wrapper's one delayed reduction."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    for node in nodes(outputs):
        wrapper = getattr(node, "ddp_weakref", None)
        if wrapper is not None and wrapper().static_graph:
            raise NotDifferentiableError(
                expected_found(
                    "`forward_func`",
                    "the model itself",
                    "DistributedDataParallel(static_graph=True), which would stop averaging "
                    "gradients in silence",
                    f"{_TRAIN}.",
                )
            )


def watched(value: Tensor, modules_behind: Callable[[], Sequence[nn.Module]]) -> Tensor:
    """See to it that the gradient of a value reaches all processes, or raise in its backward pass.

    Nothing is checked where no gradient is accumulated (``torch.autograd.grad``), nor under
    ``no_sync``.
    """
    if not (value.requires_grad and dist.is_available() and dist.is_initialized()):
        return value
    modules = modules_behind()
    wrappers = [w for w in wrappers_of(modules) if dist.get_world_size(w.process_group) > 1]
    wrappers = [w for w in wrappers if not _averages_elsewhere(w)]
    groups = [group for module in modules for group in _sharded_groups(module)]
    if not wrappers and not groups:
        return value
    before = [_delayed_reduction(w) for w in wrappers]

    def on_gradient(gradient: Tensor) -> None:
        _refuse_late_gradient(groups)
        for wrapper, delayed in zip(wrappers, before, strict=True):
            if _accumulates(wrapper):
                check = _check_of(wrapper, delayed)
                torch.autograd.Variable._execution_engine.queue_callback(check)

    value.register_hook(on_gradient)
    return value


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

    Only the garbage collector knows every wrapper, and asking it takes a tenth of a second: it is
    asked at the first call for a module, and as long as it finds nothing at every doubling.
    """

    def __init__(self) -> None:
        self._found: WeakKeyDictionary[nn.Module, list[ref[DistributedDataParallel]]] = (
            WeakKeyDictionary()
        )
        self._asked: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()

    def __call__(self, modules: Sequence[nn.Module]) -> list[DistributedDataParallel]:
        if not modules:
            return []
        key = modules[0]
        alive = [w for w in (known() for known in self._found.get(key, ())) if w is not None]
        if alive:
            return alive
        self._asked[key] = asked = self._asked.get(key, 0) + 1
        if asked & (asked - 1):
            return []
        ours = {id(module) for module in modules}
        # Without isinstance, which asks objects that answer with a warning for their class.
        known = [o for o in gc.get_objects() if DistributedDataParallel in type(o).__mro__]
        alive = [w for w in known if any(id(module) in ours for module in w.modules())]
        self._found[key] = [ref(wrapper) for wrapper in alive]
        return alive


wrappers_of = _Finder()


def data_parallel_rank(modules_behind: Callable[[], Sequence[nn.Module]]) -> int:
    """Place of this process among those that train the modules on different examples."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0
    modules = modules_behind()
    for wrapper in wrappers_of(modules):
        return dist.get_rank(wrapper.process_group)
    for module in modules:
        if _sharded_groups(module):
            meshes = [p.device_mesh for p in module.parameters() if hasattr(p, "device_mesh")]
            if meshes and meshes[0].ndim == 1:
                return int(meshes[0].get_local_rank())
    return 0


def splits_examples(modules: Sequence[nn.Module]) -> bool:
    """Whether processes only divide the examples: no part of the modules' computation."""
    sharded = {id(m) for module in modules if _sharded_groups(module) for m in module.modules()}
    return all(
        p.device_mesh.ndim == 1 and id(module) in sharded
        for module in modules
        for p in module.parameters(recurse=False)
        if hasattr(p, "device_mesh")
    )


@contextmanager
def kept_whole(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Keep sharded modules whole after the gradients that are taken in this block.

    The graph of such a gradient refers to whole parameters; ``fully_shard`` frees them after each
    backward pass. They stay until the training step's own backward pass has used them.
    """
    groups = [group for module in modules for group in _sharded_groups(module)]
    before = [group.reshard_after_backward for group in groups]
    try:
        for group in groups:
            group.reshard_after_backward = False
        yield
    finally:
        for group, value in zip(groups, before, strict=True):
            group.reshard_after_backward = value


def refuse_sharded(modules: Iterable[nn.Module], way: str) -> None:
    """Refuse a way that runs sharded modules again where their parameters are gone."""
    if any(_sharded_groups(module) for module in modules):
        raise NotDifferentiableError(
            expected_found(
                way,
                "a model whose parameters stay in place",
                "one that fully_shard takes apart between passes",
                "Use differentiation='double_backprop', which keeps it whole until the backward "
                "pass, or 'finite_difference'.",
            )
        )


def _refuse_late_gradient(groups: Sequence[Any]) -> None:
    if any(group._training_state.name == "POST_BACKWARD" for group in groups):
        raise NotDifferentiableError(
            expected_found(
                "backward pass of a prior",
                "the gradients of a sharded model to arrive before fully_shard has collected them",
                "that it has: the prior's would be lost",
                "Evaluate the prior after the model's forward pass: loss = "
                "F.cross_entropy(model(x), y); loss = loss + prior(x, target=y).",
            )
        )


def _sharded_groups(module: nn.Module) -> list[Any]:
    """Parameter groups of a module that ``fully_shard`` has made."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not isinstance(module, getattr(fsdp, "FSDPModule", ())):
        return []
    state: Any = module._get_fsdp_state()  # type: ignore[operator]
    groups = getattr(state, "_fsdp_param_groups", None)
    return list(groups) if groups is not None else [g for g in [state._fsdp_param_group] if g]


def _is_fsdp1(module: nn.Module) -> bool:
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel)
