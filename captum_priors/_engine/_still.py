"""Put modules into another state for a while, and back, also when several parties do so at once."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_forward_pre_hook

from captum_priors._engine._wrappers import refuse_wrapper, wrapper_classes


@dataclass(slots=True)
class ModuleState:
    """Attributes and buffers that decide how a module's forward pass behaves."""

    attributes: dict[str, Any]
    buffers: dict[str, Tensor]

    @classmethod
    def of(cls, module: nn.Module) -> "ModuleState":
        """Record the state, with copies of statistics that training updates in place.

        Torch's BatchNorm kernels do so without telling autograd: what was saved for a backward pass
        changes under its hands.
        """
        names = ("training", "dropout") if isinstance(module, nn.RNNBase) else ("training",)
        return cls({name: getattr(module, name) for name in names}, _copies(module))

    @classmethod
    def still(cls, module: nn.Module) -> "ModuleState":
        """Return the state in which a module is deterministic and keeps examples apart.

        cuDNN refuses the backward pass of a recurrent module in evaluation mode, so those keep
        their flag and lose their dropout instead.
        """
        if isinstance(module, nn.RNNBase):
            return cls({"dropout": 0.0}, {})
        return (
            cls({"training": False}, _copies(module))
            if isinstance(module, _NormBase)
            else _EVALUATED
        )

    def apply(self, module: nn.Module) -> "ModuleState":
        """Put the module into this state; return what it replaces."""
        before = ModuleState({}, {})
        own = module.__dict__
        # On each module by itself: users override train(), and ours is not to be seen.
        for name, value in self.attributes.items():
            if name in own:  # past nn.Module's search for parameters; scripted modules have none
                before.attributes[name], own[name] = own[name], value
            else:
                before.attributes[name] = getattr(module, name)
                setattr(module, name, value)
        for name, buffer in self.buffers.items():
            before.buffers[name] = cast("Tensor", module._buffers[name])
            module._buffers[name] = buffer
        return before


# Shared, and therefore never changed.
_EVALUATED, _TRAINED = ModuleState({"training": False}, {}), ModuleState({"training": True}, {})


# Modules that another state than evaluation mode alone keeps still.
_OTHERS = (nn.RNNBase, _NormBase)


def _copies(module: nn.Module) -> dict[str, Tensor]:
    if not isinstance(module, _NormBase):
        return {}
    statistics = {name: module._buffers.get(name) for name in ("running_mean", "running_var")}
    return {name: value.clone() for name, value in statistics.items() if value is not None}


@dataclass(slots=True)
class _Claims:
    """Who wants a module in which state; the latest claim rules, the original comes last."""

    original: ModuleState
    states: dict[object, ModuleState]


_lock = threading.RLock()  # a forgotten hold may be collected, and given up, inside another
_table: dict[nn.Module, _Claims] = {}
_thread = threading.local()


class _Claim:
    """One party's claims, given up together."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []

    def hold(self, modules: Iterable[nn.Module]) -> None:
        """Claim that modules be still; in one go, as there can be hundreds at every step."""
        with _lock:
            for module in modules:
                own = module.__dict__
                training = own.get("training")
                if type(training) is not bool or module in _table or isinstance(module, _OTHERS):
                    self._make(module, ModuleState.still(module))
                    continue
                _table[module] = _Claims(_TRAINED if training else _EVALUATED, {self: _EVALUATED})
                own["training"] = False
                self.modules.append(module)

    def make(self, module: nn.Module, state: ModuleState) -> None:
        """Claim that a module be in a state."""
        with _lock:
            self._make(module, state)

    def _make(self, module: nn.Module, state: ModuleState) -> None:
        replaced = state.apply(module)
        claims = _table.get(module)
        if claims is None:
            _table[module] = _Claims(replaced, {self: state})
        else:
            claims.original = ModuleState(
                {**replaced.attributes, **claims.original.attributes},
                {**replaced.buffers, **claims.original.buffers},
            )
            claims.states[self] = state
        self.modules.append(module)

    def give_up(self) -> None:
        with _lock:
            for module in self.modules:
                claims = _table[module]
                del claims.states[self]
                claims.original.apply(module)
                for state in claims.states.values():
                    state.apply(module)
                if not claims.states:
                    del _table[module]


@contextmanager
def claimed(states: Iterable[tuple[nn.Module, ModuleState]]) -> Iterator[None]:
    """Put modules into the given states for the duration."""
    claim = _Claim()
    try:
        for module, state in states:
            claim.make(module, state)
        yield
    finally:
        claim.give_up()


@contextmanager
def held(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Hold modules still, and any other module that runs in this thread in the meantime.

    A callable can hide a module where no search finds it; it shows when it runs.
    """
    claim, owner = _Claim(), threading.get_ident()
    outer: set[nn.Module] = getattr(_thread, "held", set())
    wrappers = wrapper_classes()

    def on_call(module: nn.Module, args: Any) -> None:
        if isinstance(module, wrappers):
            refuse_wrapper(module)
        if module not in known and threading.get_ident() == owner:
            known.add(module)
            claim.hold([module])

    new = [module for module in dict.fromkeys(modules) if module not in outer]
    known = outer.union(new)
    try:
        _thread.held = known
        claim.hold(new)
        if any(map(_is_compiled, known)):
            for module in known:
                refuse_wrapper(module)
            yield  # a hook on all modules would have them compiled anew
        else:
            handle = register_module_forward_pre_hook(on_call)
            try:
                yield
            finally:
                handle.remove()
    finally:
        _thread.held = outer
        claim.give_up()


def held_modules() -> tuple[nn.Module, ...]:
    """Return the modules that this thread holds still now."""
    return tuple(getattr(_thread, "held", ()))


def _is_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None
