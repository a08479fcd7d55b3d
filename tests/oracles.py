"""Slow references in NumPy and plain loops, written from the formulas; nothing here is shared."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def total_variation(attributions: Array, *, spatial_dims: int, standardize: bool = True) -> Array:
    """Neighbours one by one, in each of the last dimensions, of the sum over channels."""
    totals = []
    for example in attributions:
        size = example.shape[-spatial_dims:]
        image = example.reshape(-1, *size).sum(0)
        if standardize:
            image = image / image.std()
        total = 0.0
        for at in np.ndindex(*size):
            for axis in range(spatial_dims):
                if at[axis] + 1 < size[axis]:
                    after = (*at[:axis], at[axis] + 1, *at[axis + 1 :])
                    total += abs(image[after] - image[at])
        totals.append(total)
    return np.array(totals)


def mean_importance(attributions: Array) -> Array:
    return np.abs(attributions.reshape(len(attributions), -1)).mean(0)


def gini(attributions: Array) -> Array:
    """Half the mean absolute difference of all pairs over the mean."""
    importance = mean_importance(attributions)
    pairs = [abs(a - b) for a, b in itertools.product(importance, repeat=2)]
    return np.array(-0.5 * np.mean(pairs) / importance.mean())


def graph_laplacian(attributions: Array, adjacency: Array) -> Array:
    importance = mean_importance(attributions)
    total = 0.0
    for i in range(len(importance)):
        for j in range(i):
            total += adjacency[i, j] * (importance[i] - importance[j]) ** 2
    return np.array(total)


def l1(attributions: Array) -> Array:
    return np.array([sum(abs(v) for v in example.flat) for example in attributions])


def l2(attributions: Array) -> Array:
    return np.array([sum(v * v for v in example.flat) for example in attributions])


def group_sparsity(attributions: Array, groups: Sequence[Sequence[int]]) -> Array:
    rows = attributions.reshape(len(attributions), -1)
    return np.array(
        [sum(math.sqrt(len(g)) * math.hypot(*(row[i] for i in g)) for g in groups) for row in rows]
    )


def entropy(attributions: Array) -> Array:
    totals = []
    for example in attributions:
        sizes = [abs(v) for v in example.flat]
        shares = [size / sum(sizes) for size in sizes]
        totals.append(-sum(q * math.log(q) for q in shares if q > 0))
    return np.array(totals)


def outside(attributions: Array, mask: Array) -> Array:
    forbidden = (1 - np.broadcast_to(mask, attributions.shape)) * attributions
    return np.array([sum(v * v for v in example.flat) for example in forbidden])


def energy_outside(attributions: Array, mask: Array) -> Array:
    """The mask has the channels of the attributions; sum those first where it should have one."""
    totals = []
    for example, allowed in zip(
        attributions, np.broadcast_to(mask, attributions.shape), strict=True
    ):
        positive = [max(v, 0.0) for v in example.flat]
        inside = sum(m * v for m, v in zip(allowed.flat, positive, strict=True))
        totals.append(1 - inside / sum(positive))
    return np.array(totals)


def background(attributions: Array, mask: Array) -> Array:
    totals = []
    for example, allowed in zip(
        attributions, np.broadcast_to(mask, attributions.shape), strict=True
    ):
        inside = sum(m * abs(v) for m, v in zip(allowed.flat, example.flat, strict=True))
        totals.append(np.log(sum(abs(v) for v in example.flat) / inside))
    return np.array(totals)


def rationale(attributions: Array, mask: Array, kind: str) -> Array:
    """One place after another; the mask has the channels of the attributions."""
    totals = []
    for example, m in zip(attributions, np.broadcast_to(mask, attributions.shape), strict=True):
        sizes, marks = [abs(float(v)) for v in example.flat], [float(v) for v in m.flat]
        pairs = [(a / sum(sizes), w / sum(marks)) for a, w in zip(sizes, marks, strict=True)]
        if kind == "order":
            most = max((1 - w) * a for a, w in zip(sizes, marks, strict=True))
            short = [w * (1 - a / most) ** 2 for a, w in zip(sizes, marks, strict=True) if a < most]
            totals.append(sum(short) / sum(marks))
        elif kind in ("kl", "bce"):
            found = sum(m * math.log(m / q) for q, m in pairs if m > 0)
            if kind == "bce":
                found += sum((1 - m) * math.log((1 - m) / (1 - q)) for q, m in pairs if m < 1)
            totals.append(found)
        else:
            apart = [abs(q - m) * sum(marks) for q, m in pairs]
            if kind == "huber":
                apart = [d**2 / 2 if d < 1 else d - 0.5 for d in apart]
            totals.append(sum(apart) / sum(marks))
    return np.array(totals)


def alignment(attributions: Array, given: Array, *, measure: str = "cosine") -> Array:
    given = np.broadcast_to(given, attributions.shape)
    return cosine(attributions, given) if measure == "cosine" else mse(attributions, given)


def mse(a: Array, b: Array) -> Array:
    return np.array([((x - y) ** 2).mean() for x, y in zip(a, b, strict=True)])


def cosine(a: Array, b: Array) -> Array:
    return np.array(
        [
            1 - (x * y).sum() / (np.linalg.norm(x.ravel()) * np.linalg.norm(y.ravel()))
            for x, y in zip(a, b, strict=True)
        ]
    )


def pearson(a: Array, b: Array) -> Array:
    return np.array(
        [1 - np.corrcoef(x.ravel(), y.ravel())[0, 1] for x, y in zip(a, b, strict=True)]
    )


def soft_spearman(a: Array, b: Array, strength: float) -> Array:
    """One minus the correlation of soft ranks, which are counted pair by pair."""

    def ranks(x: Array) -> Array:
        flat, found = x.ravel(), []
        for entry in flat:
            apart = [strength * (entry - other) / flat.std() for other in flat]
            found.append(0.5 + sum(1 / (1 + math.exp(-z)) for z in apart))
        return np.array(found)

    return pearson(np.array([ranks(x) for x in a]), np.array([ranks(x) for x in b]))


def ssim(a: Array, b: Array) -> Array:
    """Wang et al. 2004 window by window, on maps ``(batch, height, width)``."""
    totals = []
    for x, y in zip(a, b, strict=True):
        both = np.concatenate([x.ravel(), y.ravel()])
        span = both.max() - both.min()
        c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
        # The largest odd window that fits, up to 7.
        height, width = (min(7, n if n % 2 else n - 1) for n in x.shape)
        weights = np.outer(_gaussian(height), _gaussian(width))
        similarities = []
        for i in range(x.shape[0] - height + 1):
            for j in range(x.shape[1] - width + 1):
                u, v = x[i : i + height, j : j + width], y[i : i + height, j : j + width]
                mean_u, mean_v = (weights * u).sum(), (weights * v).sum()
                var_u = (weights * (u - mean_u) ** 2).sum()
                var_v = (weights * (v - mean_v) ** 2).sum()
                covariance = (weights * (u - mean_u) * (v - mean_v)).sum()
                luminance = (2 * mean_u * mean_v + c1) / (mean_u**2 + mean_v**2 + c1)
                structure = (2 * covariance + c2) / (var_u + var_v + c2)
                similarities.append(luminance * structure)
        totals.append(1 - np.mean(similarities))
    return np.array(totals)


def _gaussian(size: int) -> Array:
    weights = np.array([math.exp(-((i - size // 2) ** 2) / (2 * 1.5**2)) for i in range(size)])
    return weights / weights.sum()


def top_k_distance(a: Array, b: Array, k: int) -> Array:
    """One minus the share of the k largest absolute entries that two examples have in common."""
    totals = []
    for x, y in zip(a, b, strict=True):
        top_x, top_y = (set(np.argsort(-np.abs(v.ravel()))[:k]) for v in (x, y))
        totals.append(1 - len(top_x & top_y) / k)
    return np.array(totals)


def soft_top_k_distance(a: Array, b: Array, k: int, temperature: float) -> Array:
    def membership(values: Array) -> Array:
        sizes = np.abs(values.ravel())
        ordered = sorted(sizes, reverse=True)
        threshold = (ordered[k - 1] + ordered[k]) / 2
        softness = temperature * sizes.mean()
        return np.array([1 / (1 + math.exp(-(v - threshold) / softness)) for v in sizes])

    return cosine(np.array([membership(x) for x in a]), np.array([membership(y) for y in b]))


class TanhNet:
    """``W2 tanh(W1 x + b1) + b2``, with its derivatives written out."""

    def __init__(self, w1: Array, b1: Array, w2: Array, b2: Array) -> None:
        self.w1, self.b1, self.w2, self.b2 = w1, b1, w2, b2

    @classmethod
    def of(cls, model: Any) -> "TanhNet":
        return cls(*(p.detach().numpy() for p in model.parameters()))

    def hidden(self, x: Array) -> Array:
        return np.tanh(self.w1 @ x + self.b1)

    def logits(self, x: Array) -> Array:
        return self.w2 @ self.hidden(x) + self.b2

    def probabilities(self, x: Array) -> Array:
        sizes = np.exp(self.logits(x) - self.logits(x).max())
        return sizes / sizes.sum()

    def cross_entropy(self, x: Array, label: int) -> float:
        return -math.log(self.probabilities(x)[label])

    def hidden_jacobian(self, x: Array) -> Array:
        return (1 - self.hidden(x) ** 2)[:, None] * self.w1

    def jacobian(self, x: Array) -> Array:
        return self.w2 @ self.hidden_jacobian(x)

    def hessian(self, x: Array, output: int) -> Array:
        a = self.hidden(x)
        return self.w1.T @ np.diag(-2 * a * (1 - a**2) * self.w2[output]) @ self.w1

    def loss_gradient(self, x: Array, label: int) -> Array:
        error = self.probabilities(x)
        error[label] -= 1
        return error @ self.jacobian(x)


def softmax_hessian_eigenvalue(net: TanhNet, x: Array) -> float:
    """Largest eigenvalue of the Gauss-Newton Hessian, features by features."""
    p, w = net.probabilities(x), net.jacobian(x)
    return float(np.linalg.eigvalsh(w.T @ (np.diag(p) - np.outer(p, p)) @ w)[-1])


def cure(net: TanhNet, x: Array, label: int, h: float) -> float:
    z = np.sign(net.loss_gradient(x, label))
    z = z / np.linalg.norm(z)
    change = net.loss_gradient(x + h * z, label) - net.loss_gradient(x, label)
    return float((change**2).sum())


def r2et(
    net: TanhNet, x: Array, output: int, k: int, c: float, h: float, near: int | None = None
) -> float:
    g = net.jacobian(x)[output]
    size = {i: abs(float(v)) for i, v in enumerate(g)}
    order = sorted(size, key=lambda i: -size[i])
    top, rest = order[:k], order[k:]
    if near is not None:
        top, rest = top[-near:], rest[:near]
    pairs = [math.exp(size[j] - size[i]) for i in top for j in rest]
    z = np.sign(g) / math.sqrt(len(g))
    turned = net.jacobian(x + h * z)[output] - g
    return sum(pairs) / len(pairs) + c * math.sqrt(float((turned**2).sum())) / h


def integrated_loss_gradients(net: TanhNet, x: Array, end: Array, label: int, n: int) -> Array:
    total = np.zeros_like(x)
    for k in range(n):
        total += net.loss_gradient(x + (k + 0.5) / n * (end - x), label)
    return (end - x) * total / n


def alignment_triplet(net: TanhNet, x: Array, moved: Array, label: int) -> float:
    """ART's loss of one example and its perturbed twin."""

    def distance(a: Array, b: Array) -> float:
        return 1 - float(a @ b) / float(np.linalg.norm(a) * np.linalg.norm(b))

    total = 0.0
    for anchor in (x, moved):
        true, other = [], []
        for at in (x, moved):
            logits = net.logits(at)
            logits[label] = -np.inf
            true.append(distance(net.jacobian(at)[label], anchor))
            other.append(distance(net.jacobian(at)[int(logits.argmax())], anchor))
        total += math.log(1 + math.exp(max(true) - min(other)))
    return total / 2


def kl(p: Array, q: Array) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def softened(logits: Array, temperature: float) -> Array:
    sizes = np.exp((logits - logits.max()) / temperature)
    return sizes / sizes.sum()


def matrix_of(function: Any, shape: Sequence[int]) -> Array:
    """Matrix of a linear function, one unit vector after the other."""
    columns = []
    for at in np.ndindex(*shape):
        unit = np.zeros(shape)
        unit[at] = 1
        columns.append(np.asarray(function(unit)).ravel())
    return np.array(columns).T
