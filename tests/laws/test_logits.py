"""Modules that return an object with logits, as classifiers of Hugging Face's do."""

import copy
from types import SimpleNamespace
from typing import Any

import captum.attr as ca
import pytest
import shap
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from captum_priors import AttributionPrior, LayerExpectedGradients, differentiable, shared
from captum_priors.outputs import weighted
from captum_priors.penalties import l1
from tests.adapters.captum_table import ROWS, Mlp, flat, seeded, set_up
from tests.asserts import assert_same_numbers, assert_slope, parameter_gradients
from tests.laws.leaves import Leaf, leaves_but

pytestmark = pytest.mark.filterwarnings(
    "ignore:You are providing multiple inputs for Lime / Kernel SHAP",  # advice about speed
)
ROUNDING = 1e-12


def answering(kind: Any) -> Any:
    """Models of a class, that return an object with their logits."""

    class Answering(kind):  # type: ignore[misc]  # a class that is not known before
        def forward(self, *inputs: Any) -> Any:
            return SimpleNamespace(logits=super().forward(*inputs))

    return Answering


# Functions of the model, and language models, which Captum asks for logits itself.
FUNCTIONS = ("LayerFeaturePermutation", "DataLoaderAttribution", "LLM")
# The model is asked alike whatever LIME fits to its answers: one row, and the cheapest.
SLOW = ("Lime", "Lime-regression", "NoiseTunnel-KernelShap")
TAKEN = [name for name in ROWS if not name.startswith(FUNCTIONS) and name not in SLOW]


@pytest.mark.parametrize("name", TAKEN)
def test_in_adapters(name: str) -> None:
    row, model, x = set_up(name, ROWS[name].models[0])
    twin = answering(type(model))(copy.deepcopy(model.act))
    twin.load_state_dict(model.state_dict())
    call = row.call(model)
    if row.target:
        call["target"] = weighted(shared(torch.tensor([0.0, 2.0, 1.0])))
    for target in ({}, {"target": 1}) if row.target else ({},):
        (expected, gradients), (maps, own) = (
            (maps, tuple(parameter_gradients(maps, [*each.parameters()])))
            for each in (model, twin)
            for maps in [flat(seeded(differentiable(row.make(each)), x, {**call, **target}, row))]
        )
        assert_same_numbers(maps, expected, ROUNDING)
        assert_same_numbers(own, gradients, ROUNDING)
        assert any(bool(gradient.any()) for gradient in own)
    assert not twin._forward_hooks


def test_differences_of_the_outputs() -> None:
    torch.manual_seed(2)
    model, x = answering(Mlp)(nn.Tanh()), torch.randn(3, 4)
    explainer = differentiable(ca.IntegratedGradients(model))
    _, delta = explainer.attribute(x, target=1, return_convergence_delta=True)
    assert delta.abs().max() < 1e-8  # 50 points of a Gauss-Legendre rule


# Which calculate with what the model returns: a model around it, and Captum's own attack.
@leaves_but("LayerEG-two-runs", "Stability-FGSM")
def test_in_priors(leaf: Leaf) -> None:
    model, x = leaf.model(), leaf.batch()
    values = []
    for each in (model, answering(nn.Sequential)(*model)):
        torch.manual_seed(2)
        values.append(leaf.make(each)(x, **leaf.call(x)))
    assert_same_numbers(values[1], values[0], ROUNDING)


def test_behind_explainers_of_shap() -> None:
    model, x = answering(nn.Sequential)(nn.Linear(4, 2)), torch.randn(5, 4)

    def numbers(rows: Any) -> Any:
        return model(torch.as_tensor(rows)).logits.detach().numpy()

    explainer = differentiable(shap.KernelExplainer(numbers, x.numpy()), model=model)
    found = explainer.attribute(x, target=1)
    assert_same_numbers(found.detach(), (x - x.mean(0)) * model[0].weight[1].detach(), 1e-9)


# --- BERT, as it is ---------------------------------------------------------------------------


def bert() -> Any:
    torch.manual_seed(3)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "max_position_embeddings": 6}
    config = BertConfig(
        vocab_size=20, num_hidden_layers=1, num_attention_heads=2, num_labels=3, **sizes
    )
    return BertForSequenceClassification(config)


def batch() -> tuple[Tensor, dict[str, Any]]:
    """Pairs of sentences in one sequence, with padding."""
    ids, mask, types = torch.randint(1, 20, (3, 6)), torch.ones(3, 6).long(), torch.zeros(3, 6)
    ids[0, 4:], mask[0, 4:], types[:, 3:] = 0, 0, 1
    return ids, {"target": 1, "additional_forward_args": (mask, types.long())}


def ids_taken(name: str) -> bool:
    between_inputs = ("Conductance", "Influence", "GradientShap", "DeepLiftShap", "LRP")
    return name.startswith(("Layer", "Internal")) and not any(n in name for n in between_inputs)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", [n for n in TAKEN if ids_taken(n) and "DeepLift" not in n])
def test_layers_of_bert_are_those_of_captum(name: str, whole: bool) -> None:
    model, (ids, call) = bert().eval(), batch()
    layer = model.bert.embeddings if whole else model.bert.embeddings.word_embeddings
    options = {**ROWS[name].options, **call}
    if name == "LayerActivation":
        del options["target"]

    def logits(ids: Tensor, mask: Tensor, types: Tensor) -> Tensor:
        return model(ids, attention_mask=mask, token_type_ids=types).logits

    cls = getattr(ca, name)
    found = differentiable(cls(model, layer)).attribute(ids, **options)
    expected = cls(logits, layer).attribute(ids, **options)
    # Grad-CAM before a LayerNorm is nothing but rounding.
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name", ["InternalInfluence", "LayerConductance", "LayerGradientShap"])
def test_paths_between_token_ids_are_refused(name: str) -> None:
    model, (ids, call) = bert(), batch()
    explainer = differentiable(getattr(ca, name)(model, model.bert.embeddings))
    more = {"baselines": ids} if name.endswith("Shap") else {}
    with pytest.raises(TypeError, match="LayerExpectedGradients"):
        explainer.attribute(ids, **call, **more)


@pytest.mark.parametrize("cls", [ca.LayerIntegratedGradients, LayerExpectedGradients])
def test_a_prior_on_pairs_of_sentences(cls: Any) -> None:
    model, (ids, call) = bert().train(), batch()
    explainer = cls(model, model.bert.embeddings.word_embeddings)
    few = {"n_steps": 3} if cls is ca.LayerIntegratedGradients else {"n_samples": 3}
    prior = AttributionPrior(explainer, l1, baselines=torch.ones_like(ids), **few).eval()
    # References are no padding, to whose row torch gives no gradient.
    weights = [p for p in model.bert.parameters() if p.requires_grad]
    assert_slope(lambda: prior(ids, **call), weights)
    plain = dict(call, additional_forward_args=call["additional_forward_args"][:1])
    assert prior(ids, **call) != prior(ids, **plain)  # the token types are seen


def test_functions_that_return_no_tensor_say_so() -> None:
    model, (ids, call) = bert(), batch()
    explainer = ca.LayerGradientXActivation(lambda *given: model(*given), model.bert.embeddings)
    with pytest.raises(TypeError, match="output has logits, found SequenceClassifierOutput"):
        differentiable(explainer).attribute(ids, **call)
