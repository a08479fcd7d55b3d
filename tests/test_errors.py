"""The wrong thing, passed everywhere: what was expected, what was found, what to do.

Each error is raised before any training state changes, or leaves it as it was.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import (
    Attribution,
    DeepLift,
    FeatureAblation,
    InputXGradient,
    IntegratedGradients,
    LayerConductance,
    LayerGradCam,
    Saliency,
)
from captum.robust import FGSM
from torch import Tensor, nn

from captum_priors import (
    AttnLRP,
    AttributionPrior,
    ExpectedGradients,
    LayerExpectedGradients,
    Lazy,
    StabilityPrior,
    Subsample,
    differentiable,
)
from captum_priors.attacks import (
    DistanceAttack,
    ManipulationAttack,
    MassCenterAttack,
    RandomAttack,
    TopKAttack,
)
from captum_priors.concepts import fit
from captum_priors.distances import SoftTopK, mse
from captum_priors.metrics import (
    local_lipschitz,
    spearman,
    stability_report,
    top_k_intersection,
    wrong_reason_rate,
)
from captum_priors.outputs import each, total, weighted
from captum_priors.penalties import (
    GraphLaplacian,
    alignment,
    background,
    energy_outside,
    entropy,
    gini,
    group_sparsity,
    l1,
    l2,
    outside,
    rationale,
    total_variation,
)
from captum_priors.priors import (
    HINT,
    AgreementPrior,
    Comprehensiveness,
    ConceptPrior,
    EnergyPrior,
    GraphPrior,
    PixelPrior,
    RightForTheRightReasons,
    RobustRightReasons,
    RRRGradCAM,
    SparsityPrior,
    Sufficiency,
)
from captum_priors.stability import (
    ATEX,
    R2ET,
    ActivationSensitivity,
    AttributionAlignment,
    CurvatureRegularization,
    HessianPenalty,
    InputGradientRegularization,
    JacobianRegularization,
    RobustAttribution,
    SaliencyGuided,
    SmoothSurface,
    manipulability_bound,
    smooth_activations,
    weight_decay_groups,
)
from captum_priors.testing import check_differentiable, check_gradient
from captum_priors.tuning import PriorLog, choose_weight
from tests.asserts import leaves_no_trace

N = 5


class Net(nn.Module):
    """A small convolutional network that may return its outputs in some other form."""

    def __init__(self, form: Callable[[Tensor], Any] = lambda outputs: outputs) -> None:
        super().__init__()
        self.conv, self.relu, self.head = nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Linear(32, 3)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.head(self.relu(self.conv(x)).flatten(1)))


def images() -> Tensor:
    return torch.randn(N, 1, 6, 6, generator=torch.Generator().manual_seed(0))


def labels() -> Tensor:
    return torch.arange(N) % 3


def everywhere() -> Tensor:
    return torch.ones(N, 1, 6, 6)


Call = Callable[[Any, Any, Any], Any]  # of the model, the inputs and the target


def prior(explainer: Callable[[Any], Any], **options: Any) -> Call:
    return lambda model, x, y: AttributionPrior(explainer(model), l1, **options)(x, target=y)


def regularizer(make: Callable[..., Any]) -> Call:
    return lambda model, x, y: make(model)(x, target=y)


def attack(make: Callable[..., Any], *args: Any, **options: Any) -> Call:
    options = {"radius": 0.1, "step_num": 2, **options}
    return lambda model, x, y: make(Saliency(model), *args, **options).perturb(x, target=y)


def annotated(make: Callable[..., Any]) -> Call:
    return lambda model, x, y: make(model)(x, target=y, annotation=everywhere())


def averaged(make: Callable[..., Any]) -> Call:
    return lambda model, x, y: make(model)(x, baselines=images(), target=y)


EXPLAINED: dict[str, Call] = {
    "AttributionPrior of ExpectedGradients": averaged(
        lambda model: AttributionPrior(ExpectedGradients(model), l1)
    ),
    "AttributionPrior of IntegratedGradients": prior(IntegratedGradients, n_steps=2),
    "AttributionPrior of DeepLift": prior(DeepLift),
    "AttributionPrior of FeatureAblation": prior(FeatureAblation),
    "AttributionPrior of LayerGradCam": prior(lambda model: LayerGradCam(model, model.conv)),
    "StabilityPrior": lambda model, x, y: StabilityPrior(
        InputXGradient(model), mse, lambda z: z + 0.1
    )(x, target=y),
    "Lazy": averaged(lambda model: Lazy(AttributionPrior(ExpectedGradients(model), l1), every=2)),
    "Subsample": averaged(
        lambda model: Subsample(AttributionPrior(ExpectedGradients(model), l1), fraction=0.5)
    ),
    "sum": averaged(
        lambda model: PixelPrior(model) + 0.1 * AttributionPrior(InputXGradient(model), l2)
    ),
    "ExpectedGradients": lambda model, x, y: ExpectedGradients(model).attribute(
        x, images(), target=y
    ),
    "LayerExpectedGradients": lambda model, x, y: LayerExpectedGradients(
        model, model.conv
    ).attribute(x, images(), target=y),
    "differentiable(IntegratedGradients)": lambda model, x, y: differentiable(
        IntegratedGradients(model)
    ).attribute(x, target=y, n_steps=2),
    "differentiable(DeepLift)": lambda model, x, y: differentiable(DeepLift(model)).attribute(
        x, target=y
    ),
    "PixelPrior": averaged(PixelPrior),
    "SparsityPrior": averaged(SparsityPrior),
    "GraphPrior": averaged(lambda model: GraphPrior(model, torch.ones(36, 36))),
    "EnergyPrior": annotated(EnergyPrior),
    "HINT": annotated(lambda model: HINT(model, model.conv)),
    "RobustRightReasons": annotated(lambda model: RobustRightReasons(model, radius=0.1)),
    "Comprehensiveness": annotated(Comprehensiveness),
    "Sufficiency": annotated(Sufficiency),
    "RRRGradCAM": annotated(lambda model: RRRGradCAM(model, model.conv)),
    "ConceptPrior": regularizer(lambda model: ConceptPrior(model, model.conv, torch.ones(2))),
    "AgreementPrior": regularizer(lambda model: AgreementPrior(Saliency(model), DeepLift(model))),
    "ATEX": regularizer(lambda model: ATEX(model, radius=0.1)),
    "HessianPenalty": regularizer(lambda model: HessianPenalty(model, smooth=30)),
    "CurvatureRegularization": regularizer(CurvatureRegularization),
    "InputGradientRegularization": regularizer(InputGradientRegularization),
    "RobustAttribution": regularizer(RobustAttribution),
    "R2ET": regularizer(lambda model: R2ET(model, top_k=2)),
    "SaliencyGuided": regularizer(SaliencyGuided),
    "TopKAttack": attack(TopKAttack, 2),
    "MassCenterAttack": attack(MassCenterAttack),
    "DistanceAttack": attack(DistanceAttack, mse),
    "ManipulationAttack": attack(ManipulationAttack),
    "local_lipschitz": lambda model, x, y: local_lipschitz(
        Saliency(model), x, radius=0.1, n_samples=1, target=y
    ),
}
# These look at all outputs or at none: a target that does not fit is not looked at.
WITHOUT_TARGET: dict[str, Call] = {
    "RightForTheRightReasons": annotated(RightForTheRightReasons),
    "ActivationSensitivity": regularizer(ActivationSensitivity),
    "AttributionAlignment": regularizer(AttributionAlignment),
    "JacobianRegularization": regularizer(JacobianRegularization),
    "SmoothSurface": regularizer(SmoothSurface),
    "RandomAttack": lambda model, x, y: RandomAttack(model, radius=0.1).perturb(x, target=y),
}
CALLS = {**EXPLAINED, **WITHOUT_TARGET}

WRONG_INPUTS: dict[str, Callable[[], Any]] = {
    "NumPy array": lambda: images().numpy(),
    "list": lambda: [images()],
    "no examples": lambda: images()[:0],
    "scalar": lambda: torch.tensor(1.0),
    "empty tuple": lambda: (),
    "another device": lambda: images().to("meta"),
}
WRONG_TARGETS: dict[str, Any] = {
    "out of range": 7,
    "out of range for most": [0, 9, 9, 9, 9],
    "tensor out of range": torch.full((N,), 7),
    "one-hot": torch.eye(3)[labels()],
    "probabilities": torch.rand(N),
    "truth values": torch.ones(N, dtype=torch.bool),
    "NumPy array": labels().numpy(),
    "word": "1",
    "list of floats": [0.0, 1.0, 2.0, 0.0, 1.0],
    "of another batch": labels()[:3],
    "too many indices": (0, 1),
}
WRONG_MODELS: dict[str, Callable[[], Any]] = {
    "on another device": lambda: Net().to("meta"),
    "of another dtype": lambda: Net().to(torch.float32),
    "that returns a dictionary": lambda: Net(lambda outputs: {"logits": outputs}),
    "that returns a tuple": lambda: Net(lambda outputs: (outputs, 0)),
    "that returns one row": lambda: Net(lambda outputs: outputs[:1]),
}
# Captum's perturbation methods take a model with one output for the batch as a whole.
ONE_ROW_IS_FINE = {"AttributionPrior of FeatureAblation"}
# A bare explainer draws from the global generators before it runs the model, as Captum's do.
DRAW_AS_CAPTUM_DOES = {"ExpectedGradients", "LayerExpectedGradients"}


def fails(call: Callable[[], Any]) -> str:
    with pytest.raises((TypeError, ValueError, RuntimeError, FloatingPointError)) as caught:
        call()
    text = str(caught.value)
    what, _, rest = text.partition(": expected ")
    expected, _, found = rest.partition(", found ")
    assert what, text
    assert expected, text
    assert "\n" not in text
    assert len(found.split(". ", 1)) == 2, f"no remedy: {text}"  # ends in what to do
    return text


@pytest.mark.parametrize("wrong", WRONG_INPUTS)
@pytest.mark.parametrize("name", CALLS)
def test_inputs(name: str, wrong: str) -> None:
    model, x = Net(), WRONG_INPUTS[wrong]()
    with leaves_no_trace(model):
        fails(lambda: CALLS[name](model, x, 1))


@pytest.mark.parametrize("wrong", WRONG_TARGETS)
@pytest.mark.parametrize("name", EXPLAINED)
def test_targets(name: str, wrong: str) -> None:
    model, x = Net(), images()
    with nullcontext() if name in DRAW_AS_CAPTUM_DOES else leaves_no_trace(model):
        assert "target" in fails(lambda: EXPLAINED[name](model, x, WRONG_TARGETS[wrong]))


@pytest.mark.parametrize("wrong", WRONG_MODELS)
@pytest.mark.parametrize("name", CALLS)
def test_models(name: str, wrong: str) -> None:
    if wrong == "that returns one row" and name in ONE_ROW_IS_FINE:
        pytest.skip("one output for the batch as a whole is Captum's convention here")
    model = WRONG_MODELS[wrong]()
    fails(lambda: CALLS[name](model, images(), labels()))


@pytest.mark.parametrize("name", CALLS)
def test_the_right_thing_is_taken(name: str) -> None:
    """Otherwise the tests above would prove nothing."""
    CALLS[name](Net(), images(), labels())


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def x() -> Tensor:
    return torch.linspace(-1, 1, 15).reshape(5, 3)


def averaging(penalty: Any = l1, **options: Any) -> AttributionPrior:
    return AttributionPrior(ExpectedGradients(net()), penalty, baselines=x(), **options)


def concept(direction: Any, **options: Any) -> ConceptPrior:
    model = Net()
    return ConceptPrior(model, model.conv, direction, **options)


def agreement(**options: Any) -> AgreementPrior:
    model = net()
    return AgreementPrior(Saliency(model), IntegratedGradients(model), **options)


def gradient_maps(perturbation: Any, distance: Any = mse) -> StabilityPrior:
    return StabilityPrior(Saliency(net()), distance, perturbation)


def report(**wrong: Any) -> Any:
    explainer = Saliency(net())
    given = {
        "explainers": {"gradient": explainer},
        "attacks": {"gradient": {"noise": RandomAttack(explainer, radius=0.1)}},
        "loader": [(x(), torch.ones(5).long())],
        "k": 2,
    }
    return stability_report(**{**given, **wrong})


def weighed(
    prior: Any = JacobianRegularization, loss: Any = None, model: Any = None, **wrong: Any
) -> Any:
    """Weigh a prior against a loss, both made of the model."""
    model = model or net()

    def mean(batch: Any) -> Tensor:
        return (loss or (lambda outputs: outputs.square().mean()))(
            model(batch[0].nan_to_num(0, 1, 1))
        )

    given = {"loss": mean, "batches": [(x(), torch.ones(5).long())], **wrong}
    return choose_weight(model, prior=prior(model), **given)


def packed() -> Any:
    return nn.utils.rnn.pack_padded_sequence(torch.randn(3, 4, 2), [3, 2, 1, 1])


OTHERS: dict[str, tuple[Callable[[], Any], str]] = {
    # Choosing a weight
    "loss of each example": (lambda: weighed(loss=lambda out: out.sum(1)), "shape (5,)"),
    "loss without a graph": (
        lambda: weighed(loss=lambda out: out.sum().detach()),
        "loss in batch 0: expected a gradient",
    ),
    "loss that is not finite": (
        lambda: weighed(loss=lambda out: torch.inf * out.sum()),
        "loss in batch 0: expected a finite gradient",
    ),
    "prior that is not finite": (
        lambda: weighed(InputGradientRegularization, batches=[(x() / 0, torch.ones(5).long())]),
        "prior InputGradientRegularization",
    ),
    "prior of another model": (lambda: weighed(lambda _: JacobianRegularization(net())), "of this"),
    "prior of weight zero": (lambda: weighed(lambda m: 0 * JacobianRegularization(m)), "1 of 1"),
    "function as prior": (lambda: weighed(lambda model: l1), "`prior`: expected a prior"),
    "frozen model": (
        lambda: weighed(model=net().requires_grad_(False)),
        "Is it fitted already, fr",
    ),
    "no batches": (lambda: weighed(batches=[]), "used up"),
    "batches that are no pairs": (
        lambda: weighed(batches=[(x(), 1, 2)]),
        "a pair (inputs, target)",
    ),
    "target ratio of zero": (lambda: weighed(target_ratio=0), "target_ratio"),
    "no steps between": (lambda: PriorLog(net(), every=0), "every"),
    # What names the way out
    "packed sequence": (lambda: AttributionPrior(Saliency(net()), l1)(packed()), "lengths in"),
    "several classes for each example": (
        lambda: AttributionPrior(Saliency(net()), l1)(x(), target=torch.ones(5, 3).long()),
        "captum_priors.outputs.weighted(labels)",
    ),
    "class index of a dense model": (
        lambda: AttributionPrior(Saliency(nn.Conv2d(1, 3, 1)), l1)(images(), target=1),
        "target=(class, row, column), or a sum of them, captum_priors.outputs.total(mask)",
    ),
    # Sums of outputs, and several
    "mask of numbers": (lambda: total(torch.ones(5, 2)), "mask.bool()"),
    "weights in a list": (lambda: weighted([0.5, 0.5]), "a tensor, or shared(...) of one"),
    "weights for all that do not say so": (
        lambda: averaging()(x(), target=weighted(torch.ones(2))),
        "captum_priors.shared",
    ),
    "mask without classes": (
        lambda: AttributionPrior(Saliency(nn.Conv2d(1, 3, 1)), l1)(
            images(), target=total(torch.ones(N, 6, 6).bool())
        ),
        "mask.unsqueeze(1)",
    ),
    "weights of other labels, in Captum's own code": (
        lambda: AttributionPrior(DeepLift(net()), l1)(x(), target=weighted(torch.ones(5, 3))),
        "goes with outputs of shape (5, 2)",
    ),
    "a sum where labels are": (
        lambda: CurvatureRegularization(net())(x(), target=each()),
        "the class labels, found each()",
    ),
    "several where a map is one": (
        lambda: TopKAttack(Saliency(net()), 2, radius=0.1).perturb(x(), target=each([0, 1])),
        "found each([0, 1])",
    ),
    "several of several": (lambda: each([each()]), "one output or a sum"),
    "no outputs": (lambda: each([]), "at least one"),
    "a number of outputs": (lambda: each(3), "each([0, 2])"),
    "an index too many": (lambda: averaging()(x(), target=each([0, 2])), "from 0 to outputs - 1"),
    "sums in a perturbation that knows indices": (
        lambda: StabilityPrior(
            Saliency(net()), mse, lambda z, target: FGSM(net()).perturb(z, 0.1, target)
        )(x(), target=total()),
        "total()",
    ),
    "stock explainer in the certificate": (
        lambda: check_differentiable(IntegratedGradients(net().double()), x().double(), target=1),
        "differentiable(explainer)",
    ),
    # Priors
    "class as explainer": (lambda: AttributionPrior(Saliency, l1), "class Saliency"),
    "model as explainer": (lambda: AttributionPrior(net(), l1), "Sequential"),
    "class as penalty": (lambda: averaging(GraphLaplacian), "class GraphLaplacian"),
    "word as penalty": (lambda: averaging("l1"), "a function of attributions"),
    "misspelled option": (lambda: averaging(n_sample=3), "n_samples"),
    "unknown reduction": (lambda: averaging(reduction="none"), "'mean', 'sum'"),
    "negative smooth": (lambda: averaging(smooth=-1), "smooth"),
    "no baselines": (
        lambda: AttributionPrior(ExpectedGradients(net()), l1)(x(), target=1),
        "reference rows",
    ),
    "baselines of another shape": (
        lambda: AttributionPrior(ExpectedGradients(net()), l1)(x(), torch.ones(7, 4), 1),
        "(3,)",
    ),
    "NumPy baselines": (
        lambda: AttributionPrior(ExpectedGradients(net()), l1)(x(), x().numpy(), 1),
        "ndarray",
    ),
    "baselines of a single-baseline method": (
        lambda: AttributionPrior(IntegratedGradients(net()), l1)(x(), torch.ones(7, 3), 1),
        "(7, 3)",
    ),
    "function of baselines that returns nothing": (
        lambda: AttributionPrior(ExpectedGradients(net()), l1)(x(), lambda: None, 1),
        "NoneType",
    ),
    "no annotation": (lambda: averaging(outside)(x(), target=1), "annotation=..."),
    "annotation of another shape": (
        lambda: averaging(outside)(x(), target=1, annotation=torch.ones(5, 4)),
        "(5, 4)",
    ),
    "annotation from 0 to 255": (
        lambda: averaging(outside)(x(), target=1, annotation=255 * torch.ones(5, 3)),
        "255",
    ),
    "annotation on another device": (
        lambda: averaging(outside)(x(), target=1, annotation=torch.ones(5, 3, device="meta")),
        "meta",
    ),
    "annotated by name": (
        lambda: averaging(outside)(x(), target=1, annotation=x(), annotated=["first"]),
        "True or False for each of the 5 examples",
    ),
    "annotated of fewer": (
        lambda: averaging(outside)(x(), target=1, annotation=x(), annotated=torch.ones(4)),
        "an entry for each of the 5 examples",
    ),
    "annotated by index": (
        lambda: averaging(outside)(x(), target=1, annotation=x(), annotated=torch.arange(5)),
        "found other numbers. It says which",
    ),
    "annotated where nothing is said": (
        lambda: averaging(l1)(x(), target=1, annotated=torch.ones(5)),
        "keywords that a term of it takes",
    ),
    "annotated of a statement about the batch": (
        lambda: averaging(lambda a, *, annotation: (a * annotation).sum())(
            x(), target=1, annotation=torch.ones(5, 3), annotated=torch.arange(5) > 2
        ),
        "one number for each example, so that the others",
    ),
    "a word for missing": (
        lambda: RobustRightReasons(net(), radius=0.1, missing="none"),
        "'refuse', 'nan'",
    ),
    "a word for an attack": (
        lambda: RobustRightReasons(net(), radius=0.1, attack="ibp"),
        "'random', 'pgd'",
    ),
    "no annotation of R4": (
        lambda: RobustRightReasons(net(), radius=0.1)(x(), target=1),
        "where evidence may lie",
    ),
    "no rationale": (lambda: Sufficiency(net())(x(), target=1), "where the rationale is"),
    "a word for a form": (lambda: Comprehensiveness(net(), form="logit"), "'probability', 'log'"),
    "a negative margin": (lambda: Sufficiency(net(), margin=-1), "at least 0"),
    "baselines of other features": (
        lambda: Sufficiency(net())(x(), torch.ones(5, 4), 1, annotation=torch.ones(5, 3)),
        "`baselines`",
    ),
    "a tuple of annotations of one input": (
        lambda: RobustRightReasons(net(), radius=0.1)(x(), target=1, annotation=(x(), x())),
        "one for each input",
    ),
    "annotation that nobody takes": (
        lambda: averaging(l1)(x(), target=1, annotation=torch.ones(5, 3)),
        "annotation",
    ),
    "NumPy annotation of HINT": (
        lambda: (lambda model: HINT(model, model.conv))(Net())(
            images(), target=1, annotation=np.ones((N, 6, 6))
        ),
        "ndarray",
    ),
    "penalty that returns features": (lambda: averaging(torch.abs)(x(), target=1), "(5, 3)"),
    "penalty that returns a number": (lambda: averaging(lambda a: 0.0)(x(), target=1), "float"),
    "penalty that detaches": (
        lambda: averaging(lambda a: a.detach().abs().sum(1))(x(), target=1),
        "detach()",
    ),
    "prior added to a loss": (lambda: torch.ones(()) + averaging(), "Call the prior"),
    "loss added to a prior": (lambda: averaging() + torch.ones(()), "Call the prior"),
    "prior times a tensor": (lambda: averaging() * torch.ones(()), "0.1 * prior"),
    "Lazy of an explainer": (lambda: Lazy(Saliency(net()), every=2), "Saliency"),
    "Subsample beyond all": (lambda: Subsample(averaging(), fraction=2), "(0, 1]"),
    "model that is a class": (lambda: PixelPrior(nn.Linear), "class Linear"),
    "explainer as model": (lambda: PixelPrior(Saliency(net())), "Saliency"),
    "no model": (lambda: EnergyPrior(x()), "Tensor"),
    "one logit": (
        lambda: RightForTheRightReasons(nn.Linear(3, 1))(x(), annotation=torch.ones(5, 3)),
        "two classes",
    ),
    "NumPy adjacency": (lambda: GraphPrior(net(), np.eye(3)), "ndarray"),
    "layer by name": (lambda: HINT(Net(), "conv"), "torch.nn.Module"),
    "concept of another layer": (lambda: concept(torch.ones(3))(images(), target=1), "(2, 4, 4)"),
    "concept of zeros": (lambda: concept(torch.zeros(2)), "not all zero"),
    "concept of NaN": (lambda: concept(torch.full((2,), torch.nan)), "finite"),
    "NumPy concept": (lambda: concept(np.ones(2)), "ndarray"),
    "concept of integers": (lambda: concept(torch.ones(2).long()), "int64"),
    "concept of a layer by name": (
        lambda: ConceptPrior(Net(), "conv", torch.ones(2)),
        "found str. Pass model.some_layer",
    ),
    "target by word": (lambda: concept(torch.ones(2), target="true"), "'random'"),
    "unknown form": (lambda: concept(torch.ones(2), form="l1"), "'cosine'"),
    "axis that is none": (
        lambda: concept(torch.ones(2), channel_dim=4)(images(), target=1),
        "(2,)",
    ),
    "layer that feeds itself": (
        lambda: (lambda mix: LayerExpectedGradients(lambda z: mix(mix(z)), mix))(
            nn.Linear(3, 3)
        ).attribute(x(), x()),
        "found 2 runs, of which one feeds another",
    ),
    "layer of two texts in one batch": (
        lambda: (
            lambda mix: LayerExpectedGradients(
                lambda z: mix(torch.cat([z, -z])).view(len(z), -1), mix
            )
        )(nn.Linear(3, 3)).attribute(x(), x(), target=0),
        "run it once for each",
    ),
    "delta of each run": (
        lambda: (lambda mix: differentiable(LayerConductance(lambda z: mix(z) + mix(-z), mix)))(
            nn.Linear(3, 3)
        ).attribute(x(), target=0, return_convergence_delta=True),
        "True for 2 runs",
    ),
    "layer of an LSTM": (
        lambda: (lambda lstm: ConceptPrior(lambda z: lstm(z)[0], lstm, torch.ones(2)))(
            nn.LSTM(3, 2)
        )(x()),
        "tuple",
    ),
    "labels of one kind": (lambda: fit(x(), torch.ones(5)), "some of each"),
    "labels of three kinds": (lambda: fit(x(), torch.arange(5)), "[0, 1, 2, 3, 4]"),
    "labels of other examples": (lambda: fit(x(), torch.ones(4)), "of shape (4,)"),
    "NumPy activations": (lambda: fit(x().numpy(), torch.ones(5)), "ndarray"),
    "nothing to tell": (lambda: fit(torch.ones(5, 3), labels() > 0), "mean changes"),
    "unknown fit": (lambda: fit(x(), labels() > 0, "svm"), "'logistic'"),
    "no penalty of the norm": (lambda: fit(x(), labels() > 0, "ridge", alpha=0), "alpha"),
    "agreement with a model": (lambda: AgreementPrior(Saliency(net()), net()), "Sequential"),
    "agreement of more than all": (lambda: agreement(mix=2), "[0, 1]"),
    "option of the other explainer": (
        lambda: agreement(options_a={"n_steps": 3}),
        "an option of DifferentiableSaliency",
    ),
    "agreement of maps of two layers": (
        lambda: (
            lambda model: AgreementPrior(Saliency(model), LayerGradCam(model, model.conv))(
                images(), target=1
            )
        )(Net()),
        "(5, 1, 4, 4)",
    ),
    "abstract explainer": (lambda: AttributionPrior(Attribution(net()), l1), "an abstract"),
    "target at construction": (lambda: averaging(target=3), "at construction. Move it"),
    "annotation of a builtin penalty": (
        lambda: averaging(torch.sum)(x(), target=1, annotation=x()),
        "keywords that a term of it takes, found 'annotation'",
    ),
    "adjacency that is not square": (lambda: GraphPrior(net(), torch.ones(2, 3)), "(2, 3)"),
    "layer that does not run": (
        lambda: HINT(Net(), nn.ReLU())(images(), target=0, annotation=everywhere()),
        "found one that does not",
    ),
    "Grad-CAM of a flat layer": (
        lambda: (lambda m: HINT(m, m.head)(images(), target=0, annotation=everywhere()))(Net()),
        "maps of shape (5, 1). Pass a convolutional layer",
    ),
    "Grad-CAM by differences": (
        lambda: RRRGradCAM(Net(), nn.ReLU(), differentiation="finite_difference"),
        "recompute",
    ),
    # Stability
    "class as perturbation": (lambda: gradient_maps(RandomAttack), "class RandomAttack"),
    "number as perturbation": (lambda: gradient_maps(0.1), "float"),
    "perturbation of another shape": (lambda: gradient_maps(lambda z: z[:2])(x(), target=1), "2"),
    "perturbation of another dtype": (
        lambda: gradient_maps(lambda z: z.float())(x(), target=1),
        "float32",
    ),
    "penalty as distance": (lambda: gradient_maps(lambda z: z + 1, l1)(x(), target=1), "l1()"),
    "class as distance": (lambda: gradient_maps(lambda z: z + 1, SoftTopK), "class SoftTopK"),
    "R2ET of all features": (
        lambda: R2ET(net(), top_k=3)(x(), target=1),
        "fewer than the 3 features",
    ),
    "smooth a word": (lambda: smooth_activations("model", 10), "model"),
    "smooth by zero": (lambda: smooth_activations(net(), 0), "0"),
    "NumPy path": (lambda: manipulability_bound(net(), x().numpy(), x(), target=1), "ndarray"),
    "decay of parameters": (lambda: weight_decay_groups(net().parameters(), 0.1), "generator"),
    # Explainers
    "no such differentiation": (
        lambda: ExpectedGradients(net(), differentiation="exact"),
        "double_backprop",
    ),
    "differentiation that Occlusion lacks": (
        lambda: differentiable(FeatureAblation(net()), differentiation="finite_difference"),
        "recompute",
    ),
    "AttnLRP by differences": (
        lambda: AttnLRP(net(), differentiation="finite_difference"),
        "recompute",
    ),
    "differentiable(model)": (lambda: differentiable(net()), "ExpectedGradients(model)"),
    "differentiable of a subclass": (
        lambda: differentiable(type("Mine", (Saliency,), {})(net())),
        "Mine",
    ),
    "seed as generator": (
        lambda: ExpectedGradients(net()).attribute(x(), x(), target=1, generator=0),
        "manual_seed",
    ),
    "misspelled estimator": (
        lambda: ExpectedGradients(net()).attribute(x(), x(), target=1, estimator="mc"),
        "monte_carlo",
    ),
    "no samples": (lambda: ExpectedGradients(net()).attribute(x(), x(), 0, target=1), "0"),
    "certificate in float32": (
        lambda: check_differentiable(Saliency(net().float()), x().float(), target=1),
        "float64",
    ),
    "certificate of a model": (lambda: check_differentiable(net(), x(), target=1), "Sequential"),
    "certificate of NumPy": (
        lambda: check_differentiable(Saliency(net()), x().numpy(), target=1),
        "ndarray",
    ),
    "certificate of a loss that is there": (
        lambda: check_gradient(net()(x()).sum(), net()),
        "lambda",
    ),
    "certificate of several numbers": (
        lambda: check_gradient((n := net()), n, inputs=x()),
        "one number",
    ),
    "certificate of an optimizer's groups": (
        lambda: check_gradient(lambda: x().sum(), [{"params": []}]),
        "named_parameters()",
    ),
    "certificate in half precision": (
        lambda: check_gradient((n := net().half()), n, inputs=x().half()),
        "float64",
    ),
    "certificate of a frozen model": (
        lambda: check_gradient(lambda: x().sum(), net().requires_grad_(False)),
        "require gradients",
    ),
    # Attacks
    "attack on a class": (lambda: TopKAttack(Saliency, 2, radius=0.1), "class Saliency"),
    "attack with a misspelled option": (
        lambda: TopKAttack(Saliency(net()), 2, radius=0.1, steps=3),
        "steps",
    ),
    "attack without radius": (lambda: MassCenterAttack(Saliency(net()), radius=0), "0"),
    "attack on more than all": (
        lambda: TopKAttack(Saliency(net()), 20, radius=0.1).perturb(x(), target=1),
        "20",
    ),
    "attack outside the bounds": (
        lambda: MassCenterAttack(Saliency(net()), radius=0.1, lower_bound=0.0).perturb(x()),
        "lower_bound",
    ),
    # Metrics
    "maps of other inputs": (lambda: spearman(x(), x()[:2]), "(2, 3)"),
    "NumPy maps": (lambda: spearman(x().numpy(), x().numpy()), "ndarray"),
    "maps on two devices": (lambda: spearman(x(), x().to("meta")), "meta"),
    "top-k of more than all": (lambda: top_k_intersection(x(), x(), 9), "9"),
    "annotation that is no mask": (lambda: wrong_reason_rate(x(), 2 * x()), "zeros and ones"),
    "report on one batch": (lambda: report(loader=x()), "[(inputs, labels)]"),
    "report on nothing": (lambda: report(loader=[]), "loader"),
    "report on an attack class": (
        lambda: report(attacks={"gradient": {"noise": RandomAttack}}),
        "RandomAttack",
    ),
    "report of an unknown metric": (lambda: report(metrics={"rank": "rank"}), "spearman"),
    # Penalties
    "groups as one list": (lambda: group_sparsity(x(), groups=[0, 0, 1]), "torch.tensor(groups)"),
    "groups beyond the features": (lambda: group_sparsity(x(), groups=[[0, 9]]), "9"),
    "annotation by position": (lambda: outside(x(), x()), "outside()"),
    "unknown measure": (lambda: alignment(x(), annotation=x(), measure="l2"), "cosine"),
    "unknown kind": (lambda: rationale(x(), annotation=x(), kind="mse"), "'huber'"),
    "graph of other features": (lambda: GraphLaplacian(torch.ones(4, 4))(x()), "4 features"),
    "words as dim": (lambda: total_variation(x(), dim="2"), "'2'"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others(name: str) -> None:
    call, says = OTHERS[name]
    assert says in fails(call)


@pytest.mark.parametrize("penalty", [l1, l2, entropy, gini, total_variation])
def test_penalties(penalty: Any) -> None:
    for wrong in (x().numpy(), [x()], x()[0], x().long(), x()[:, :0], ()):
        fails(lambda wrong=wrong: penalty(wrong))
    fails(penalty)


@pytest.mark.parametrize("penalty", [outside, energy_outside, background, alignment, rationale])
def test_penalties_of_an_annotation(penalty: Any) -> None:
    for wrong in (x().numpy(), None, x()[:, :2], x()[:3], x().to("meta")):
        fails(lambda wrong=wrong: penalty(x(), annotation=wrong))


@pytest.mark.parametrize("penalty", [l1, l2, entropy, gini, total_variation])
def test_what_is_not_a_number_stays_one(penalty: Any) -> None:
    """A loss of NaN is seen; a penalty of zero would hide it."""
    bad = x()
    bad[2, 1] = torch.nan
    assert penalty(bad).isnan().any()
    assert penalty(torch.full((5, 3), torch.nan)).isnan().all()


@pytest.mark.parametrize("explainer", [ExpectedGradients, DeepLift, FeatureAblation, Saliency])
def test_what_the_model_raises_is_not_reworded(explainer: Any) -> None:
    """Only failures whose cause is known are; anything else passes as it is."""

    class Raises(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.elsewhere = nn.Parameter(torch.ones(1, dtype=torch.float32, device="meta"))

        def forward(self, inputs: Tensor) -> Tensor:
            model_out = outputs = inputs  # names that Captum uses, too
            raise AssertionError(f"no Target not provided, {model_out.dim() + outputs.dim()}")

    prior = AttributionPrior(explainer(Raises()), l1)
    baselines = {"baselines": x()} if prior.takes("baselines") else {}
    with pytest.raises(AssertionError, match=r"^no Target not provided, 4$"):
        prior(x(), target=1, **baselines)


def test_a_model_on_several_devices_is_not_refused() -> None:
    """It moves its inputs itself: what works is not looked at."""
    model = net()
    model.register_parameter("elsewhere", nn.Parameter(torch.ones(1, device="meta")))
    assert ExpectedGradients(model).attribute(x(), x(), target=1).shape == (5, 3)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        ExpectedGradients(model).attribute(torch.ones(5, 2), torch.ones(5, 2), target=1)


MISTAKES: list[tuple[str, Callable[[Any], Any], str]] = [
    ("one reference", lambda p: p(x(), x()[0], target=1), "Add the first dimension"),
    (
        "one example",
        lambda p: p(x()[0], x(), target=1),
        "add the batch dimension, inputs.unsqueeze",
    ),
    ("labels second", lambda p: p(x(), torch.zeros(5).long()), "pass them as target="),
    ("short target", lambda p: p(x(), x(), target=torch.zeros(4).long()), "to the rows of the inp"),
    (
        "one-hot",
        lambda p: p(x(), x(), target=torch.eye(5)),
        "One-hot rows are target.argmax(1). It",
    ),
    ("a column", lambda p: p(x(), x(), target=torch.zeros(5, 1).long()), "target.flatten()"),
    ("a list", lambda p: p([x()], x(), target=1), "Pass a tuple of tensors"),
    ("a dict", lambda p: p({"x": x()}, x(), target=1), "the tensor that the model is called with"),
    ("a string", lambda p: p(x(), x(), target="cat"), "class indices"),
    ("images", lambda p: p(x().to(torch.uint8), x(), target=1), "inputs.float()"),
]


@pytest.mark.parametrize(
    ("call", "remedy"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES]
)
def test_the_remedy_is_for_the_mistake(call: Callable[[Any], Any], remedy: str) -> None:
    prior = AttributionPrior(ExpectedGradients(net()), l1)
    with pytest.raises((TypeError, ValueError, IndexError)) as found:
        call(prior)
    assert remedy in str(found.value)


def test_a_model_without_values_is_named() -> None:
    model = nn.Linear(3, 2, device="meta")
    with pytest.raises(ValueError, match="The model has no values yet"):
        AttributionPrior(ExpectedGradients(model), l1)(x(), x(), target=1)
