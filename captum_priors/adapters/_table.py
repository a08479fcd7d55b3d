"""The closed table of Captum's classes: what may be trained on, and why the rest may not."""

import captum.attr
from captum.attr import InputXGradient, IntegratedGradients, Saliency

from captum_priors.adapters._captum_adapter import CaptumAdapter
from captum_priors.adapters._mode_adapters import MODE_ADAPTERS
from captum_priors.adapters._noise_tunnel import NOISE_TUNNEL_ADAPTERS
from captum_priors.adapters._permutation import PERMUTATION_ADAPTERS
from captum_priors.adapters._relevance import RELEVANCE_ADAPTERS
from captum_priors.adapters._seam_adapters import (
    DifferentiableInputXGradient,
    DifferentiableIntegratedGradients,
    DifferentiableSaliency,
)
from captum_priors.adapters._surrogates import SURROGATE_ADAPTERS
from captum_priors.adapters._wrappers import WRAPPER_ADAPTERS

# Exact types, because a subclass may override the very step that keeps the graph.
ADAPTERS: dict[type, type[CaptumAdapter]] = {
    Saliency: DifferentiableSaliency,
    InputXGradient: DifferentiableInputXGradient,
    IntegratedGradients: DifferentiableIntegratedGradients,
    **MODE_ADAPTERS,
    **NOISE_TUNNEL_ADAPTERS,
    **PERMUTATION_ADAPTERS,
    **RELEVANCE_ADAPTERS,
    **SURROGATE_ADAPTERS,
    **WRAPPER_ADAPTERS,
}

_ABSTRACT = "an abstract base class that explains nothing by itself. Pass one of its subclasses"
REFUSED: dict[str, str] = {
    "Attribution": _ABSTRACT,
    "GradientAttribution": _ABSTRACT,
    "LayerAttribution": _ABSTRACT,
    "NeuronAttribution": _ABSTRACT,
    "PerturbationAttribution": _ABSTRACT,
    "RemoteLLMAttribution": (
        "which is given plain numbers by a remote server, behind which no gradient can be "
        "followed. Run the language model here and use LLMAttribution"
    ),
}
"""Why a class cannot be trained on, and what to use instead."""

HELD_FIXED: dict[str, str] = {
    "DataLoaderAttribution": "the batches",
    "DeepLift": "which quotients are too small to take, and max-pooling's winners",
    "FeaturePermutation": "the permutation",
    "GradientShap": "the draws",
    "KernelShap": "the sampled coalitions and their weights",
    "LLMAttribution": "the tokens of prompt and response",
    "LRP": "the signs of the stabiliser",
    "Lime": "the samples, their weights, and the active set and signs of the lasso",
    "LimeBase": "the samples and their weights",
    "NoiseTunnel": "the draws",
    "ShapleyValueSampling": "the permutations",
}
"""What a derivative leaves out on purpose, for classes and for what is named after them."""


def held_fixed(name: str) -> str:
    """What is held fixed in the derivative of a class's attributions, empty if nothing is."""
    plain = name.removeprefix("Layer").removeprefix("Neuron")
    same = {"DeepLiftShap": "DeepLift", "LLMGradientAttribution": "LLMAttribution"}
    return HELD_FIXED.get(same.get(plain, plain), "")


def refusal(cls: type) -> str:
    """Word the error for a class that has no certified conversion."""
    reason = REFUSED.get(cls.__name__) if cls.__module__.startswith("captum.") else None
    if reason is not None:
        return f"`explainer`: expected one that can be trained on, found {cls.__name__}, {reason}."
    names = ", ".join(sorted(known.__name__ for known in ADAPTERS))
    return (
        f"`explainer`: expected one with a certified conversion ({names}), found {cls.__name__}, "
        "whose attributions carry no correct gradient to the model's parameters. Use one of these, "
        "or register a conversion of your own with differentiable.register and certify it with "
        "captum_priors.testing.check_differentiable."
    )


def exported() -> dict[str, type]:
    """Every explainer that the installed Captum exports, by name."""
    names = ((name, getattr(captum.attr, name)) for name in captum.attr.__all__)
    return {
        name: cls
        for name, cls in names
        if isinstance(cls, type) and issubclass(cls, captum.attr.Attribution)
    }
