"""Predictions without an annotated rationale, and from it alone."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from captum_priors._checks import check_forward_func, nonnegative
from captum_priors._errors import one_of
from captum_priors.attacks.ball import Tensors, broadcast, for_each
from captum_priors.penalties.annotation import fitted
from captum_priors.priors.annotated import OF_EACH
from captum_priors.priors.base import Call, Term
from captum_priors.priors.classes import logits_and_labels
from captum_priors.priors.terms import AnnotatedOptions

Form = Literal["probability", "log"]


class _Erasure(Term):
    """Compare the prediction at an example with that where part of it is its baseline."""

    labels: ClassVar[bool] = True
    _needed: Mapping[str, tuple[str, str]] = {
        "annotation": ("where the rationale is (1) and where not (0)", OF_EACH)
    }
    _removes_rationale: ClassVar[bool]

    def __init__(
        self,
        forward_func: Any,
        *,
        form: Form = "probability",
        margin: float | None = None,
        **options: Unpack[AnnotatedOptions],
    ) -> None:
        check_forward_func(forward_func)
        super().__init__(forward_func, **options)
        one_of("form", form, get_args(Form))
        self.form, self.margin = form, None if margin is None else nonnegative("margin", margin)

    def takes(self, name: str) -> bool:
        """Whether a call may pass this keyword."""
        return name == "baselines" or super().takes(name)

    def _scores(self, call: Call) -> Tensor:
        pairs = zip(call.inputs, self._erased(call), strict=True)
        both = tuple(torch.cat([whole, erased]) for whole, erased in pairs)
        logits, labels = logits_and_labels(call, both)
        found = F.log_softmax(logits, 1).gather(1, labels.unsqueeze(1)).squeeze(1)
        whole, erased = (found if self.form == "log" else found.exp()).chunk(2)
        change = erased - whole if self._removes_rationale else whole - erased
        return change if self.margin is None else (change + self.margin).relu()

    def _erased(self, call: Call) -> Tensors:
        """The inputs without the rationale, or it alone; what nothing is said about stays."""
        n = len(call.inputs)
        masks = for_each("annotation", call.keywords()["annotation"], n)
        baselines = for_each("baselines", call.baselines, n)
        erased = []
        for x, mask, baseline in zip(call.inputs, masks, baselines, strict=True):
            if mask is None:
                erased.append(x)
                continue
            # Token ids are kept or replaced; numbers may also be mixed, and the mask learnt.
            soft = x.is_floating_point()
            given = fitted(x, mask, "mask" if soft else "binary")
            kept = 1 - given if self._removes_rationale else given
            away = broadcast("`baselines`", 0 if baseline is None else baseline, x)
            erased.append(away + kept * (x - away) if soft else torch.where(kept == 1, x, away))
        return tuple(erased)


class Comprehensiveness(_Erasure):
    r"""Without the rationale, the prediction is to fall.

    .. math:: p_y(x \setminus r) - p_y(x), \qquad
        x \setminus r = b + (1 - M) \odot (x - b)

    with the probability :math:`p_y` of the label, the mask :math:`M` of the rationale and baselines
    :math:`b`: minus the comprehensiveness of ERASER (DeYoung et al. 2020). UNIREX (Chan et al.
    2022) trains on ``form="log"`` with a margin, :math:`\max(m + \log p_y(x \setminus r) - \log
    p_y(x),\, 0)`; without one, that form falls without bound.

    Predictions only: no input is differentiated by, and a call costs two forward passes of the
    batch. A mask may be soft and have a graph, through which a selector is trained. Token ids
    are inputs, too: ``baselines`` is then the id of a mask or of padding, and the mask is zeros
    and ones; for a soft mask pass embeddings as ``inputs``.

    Args:
        forward_func: The model, which returns logits; a single one is a binary classifier's.
        form: ``"probability"``, or its ``"log"``.
        margin: :math:`m`, the change beyond which no more is asked for; None for no end.
        options: ``reduction``, ``smooth``, ``batch_norm``, ``missing``, ``name`` of :class:`Term`.

    In a call, ``target`` is the labels ``(batch,)``, ``annotation`` the mask, 1 where the rationale
    is, as in :func:`captum_priors.penalties.rationale`, and ``baselines`` as Captum's: a number, a
    tensor like the inputs or one row of them, or a tuple; by default zero.

    Raises:
        TypeError: If there is no annotation.
        ValueError: If an option is not one of those above, the annotation or baselines do not fit,
            or a label is none of the classes.

    Example:
        >>> import torch
        >>> from captum_priors.priors import Comprehensiveness, Sufficiency
        >>> model, x = torch.nn.Linear(3, 2), torch.randn(1, 3)
        >>> first, label = torch.tensor([[1, 0, 0]]), torch.tensor([1])
        >>> without = torch.cat([torch.zeros(1, 1), x[:, 1:]], 1)
        >>> expected = model(without).softmax(1)[0, 1] - model(x).softmax(1)[0, 1]
        >>> value = Comprehensiveness(model)(x, target=label, annotation=first)
        >>> torch.allclose(value, expected, atol=1e-6)
        True
        >>> opposite = Sufficiency(model)(x, target=label, annotation=1 - first)
        >>> torch.allclose(value, -opposite, atol=1e-6)
        True
    """

    _removes_rationale: ClassVar[bool] = True


class Sufficiency(_Erasure):
    r"""The rationale alone is to have the prediction.

    .. math:: p_y(x) - p_y(r), \qquad r = b + M \odot (x - b)

    (ERASER, DeYoung et al. 2020), or with logarithms and a margin as UNIREX trains; arguments,
    calls and errors are those of :class:`Comprehensiveness`. It also falls as :math:`p_y(x)` does,
    which the training loss holds up.

    Example:
        >>> import torch
        >>> from captum_priors.priors import Sufficiency
        >>> model, ids = torch.nn.Embedding(10, 2), torch.tensor([[7, 3]])
        >>> def classify(ids):
        ...     return model(ids).sum(1)
        >>> words = torch.tensor([[0, 1]])
        >>> found = Sufficiency(classify)(ids, 0, torch.tensor([1]), annotation=words)
        >>> both, alone = classify(torch.tensor([[7, 3], [0, 3]])).softmax(1)[:, 1]
        >>> torch.allclose(found, both - alone)
        True
    """

    _removes_rationale: ClassVar[bool] = False
