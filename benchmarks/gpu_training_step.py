"""A training step with a prior at the size of ResNet-50 and of ViT-B, on a GPU.

Both are built here from ``torch.nn``, with random weights, and trained in bfloat16 autocast.
Measured against the plain step, against the same step once more (what noise does), and against the
loops that people write by hand: expected gradients as published with the papers (Erion et al.
2021; ``--authors-code``: its authors' own), right for the right reasons (Ross et al. 2017), a
Hessian penalty by Hutchinson's estimator (Dombrowski et al. 2022). Steps take turns; medians; peak
memory of the device; the operators that take most of the time.

Without a GPU it says so and ends; ``--device cpu --quick`` runs everything in miniature there.
``benchmarks/gpu.sh`` runs it after the tests that need a GPU.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _common import in_turns, parser, ratio, save, show
from _published import MakeLoop, add_option, loop_from
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from captum_priors import AttributionPrior, ExpectedGradients, Lazy
from captum_priors.penalties import total_variation
from captum_priors.priors import RightForTheRightReasons
from captum_priors.stability import HessianPenalty

WEIGHT, BACKGROUND, EVERY = 1e-3, 256, 4
WAYS = ("double_backprop", "recompute", "finite_difference")
PLAIN = "plain"
Step = Callable[[], None]


# ---- Networks ------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """Three convolutions with BatchNorm around a shortcut."""

    def __init__(self, width: int, out: int, stride: int, last: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(last, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or last != out:
            conv = nn.Conv2d(last, out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        return F.relu(self.body(x) + self.shortcut(x))


def resnet(width: int, depths: tuple[int, ...], classes: int) -> nn.Module:
    """He et al. 2016; 25.6 million parameters at width 64 and depths 3, 4, 6, 3."""
    layers: list[nn.Module] = [
        *(nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
        nn.MaxPool2d(3, 2, 1),
    ]
    last = width
    for stage, depth in enumerate(depths):
        inner = width * 2**stage
        for i in range(depth):
            layers.append(Bottleneck(inner, 4 * inner, 2 if stage and not i else 1, last))
            last = 4 * inner
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, classes))


class ViT(nn.Module):
    """Dosovitskiy et al. 2021; 86 million parameters at width 768 and depth 12."""

    def __init__(
        self, size: int, patch: int, width: int, depth: int, heads: int, classes: int
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2 + 1, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True,
            norm_first=True,
        )  # fmt: skip
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        patches = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.position
        logits: Tensor = self.head(self.norm(self.encoder(tokens)[:, 0]))
        return logits


@dataclass(frozen=True)
class Size:
    """How large networks and images are."""

    image: int
    classes: int
    resnet: tuple[int, tuple[int, ...]]
    vit: tuple[int, int, int, int]  # patch, width, depth, heads

    def networks(self) -> dict[str, Callable[[], nn.Module]]:
        """Constructors by name."""
        return {
            "ResNet-50": lambda: resnet(*self.resnet, self.classes),
            "ViT-B/16": lambda: ViT(self.image, *self.vit, self.classes),
        }


WHOLE = Size(224, 1000, (64, (3, 4, 6, 3)), (16, 768, 12, 12))
MINIATURE = Size(32, 10, (4, (1, 1, 1, 1)), (8, 16, 2, 2))


# ---- Priors, and the loops that stand for them ---------------------------------------------


@dataclass(frozen=True)
class Batch:
    """A batch, reference rows on the CPU, where loaders have them, and what may be relevant."""

    x: Tensor
    y: Tensor
    background: Tensor
    allowed: Tensor

    @classmethod
    def of(cls, n: int, size: Size, device: torch.device) -> "Batch":
        """Draw one."""
        x = torch.randn(n, 3, size.image, size.image)
        allowed = torch.ones_like(x)
        allowed[:, :, : size.image // 4] = 0
        y = torch.randint(size.classes, (n,))
        background = torch.randn(max(BACKGROUND, n), 3, size.image, size.image)
        return cls(x.to(device), y.to(device), background, allowed.to(device))


def input_gradient(outputs: Tensor, x: Tensor) -> Tensor:
    """Gradient of the summed outputs, with its graph."""
    (gradient,) = torch.autograd.grad(outputs.float().sum(), x, create_graph=True)
    return gradient


def loop_eg(model: nn.Module, batch: Batch, *, make_loop: MakeLoop) -> Tensor:
    """The published loop, whose references come from a shuffled loader at every step."""
    loop = make_loop(batch.background, len(batch.x), 1)
    return total_variation(loop.attribute(model, batch.x, batch.y)).mean()


def loop_rrr(model: nn.Module, batch: Batch) -> Tensor:
    """Squares of the gradient of all log-probabilities where nothing is allowed."""
    x = batch.x.clone().requires_grad_()
    gradient = input_gradient(F.log_softmax(model(x).float(), 1), x)
    return ((1 - batch.allowed) * gradient).square().flatten(1).sum(1).mean()


def loop_hessian(model: nn.Module, batch: Batch) -> Tensor:
    """One random direction, and the difference of two gradients along it."""
    v = torch.randint_like(batch.x, 2) * 2 - 1
    step = 0.1 * batch.x.flatten(1).square().mean(1).sqrt().reshape(-1, 1, 1, 1)
    sides = []
    for sign in (1, -1):
        points = (batch.x + sign * step * v).requires_grad_()
        sides.append(input_gradient(model(points).gather(1, batch.y.unsqueeze(1)), points))
    return ((sides[0] - sides[1]) / (2 * step)).square().flatten(1).sum(1).mean()


def in_plain_products(loop: Callable[..., Tensor], model: nn.Module, batch: Batch) -> Tensor:
    """Without fused attention, which loops cannot differentiate twice; priors see to it."""
    with sdpa_kernel(SDPBackend.MATH):
        return loop(model, batch)


def penalties(
    model: nn.Module, batch: Batch, make_loop: MakeLoop
) -> dict[str, Callable[[], Tensor | float]]:
    """What is added to the loss, by name: loops written by hand next to priors."""
    references = batch.background.to(batch.x.device)

    def eg(way: Any = "double_backprop", k: int = 1, every: int = 1) -> Callable[[], Tensor]:
        prior: Any = AttributionPrior(
            ExpectedGradients(model, differentiation=way),
            total_variation,
            n_samples=k,
            baselines=references,
        )
        prior = prior if every == 1 else Lazy(prior, every)
        return lambda: prior(batch.x, target=batch.y)

    def rrr(way: Any) -> Callable[[], Tensor]:
        prior = RightForTheRightReasons(model, differentiation=way)
        return lambda: prior(batch.x, target=batch.y, annotation=batch.allowed)

    def hessian(**options: Any) -> Callable[[], Tensor]:
        prior = HessianPenalty(model, **options)
        return lambda: prior(batch.x, target=batch.y)

    found: dict[str, Callable[[], Tensor | float]] = {
        PLAIN: lambda: 0.0,
        "EG: loop": partial(in_plain_products, partial(loop_eg, make_loop=make_loop), model, batch),
        **{f"EG: {way}": eg(way) for way in WAYS},
        "EG: recompute, 4 samples": eg("recompute", 4),
        f"EG: Lazy({EVERY})": eg(every=EVERY),
        "RRR: loop": partial(in_plain_products, loop_rrr, model, batch),
        **{f"RRR: {way}": rrr(way) for way in WAYS},
        "Hessian: loop, difference": partial(in_plain_products, loop_hessian, model, batch),
        "Hessian: difference": hessian(curvature="difference"),
        "Hessian: difference_twice": hessian(curvature="difference_twice"),
    }
    if not isinstance(model, ViT):  # torch's third derivative of LayerNorm is wrong
        found["Hessian: exact, smooth"] = hessian(smooth=30)
    return found


def step_of(model: nn.Module, batch: Batch, penalty: Callable[[], Tensor | float]) -> Step:
    """One training step in bfloat16 autocast."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-5)

    def run() -> None:
        with torch.autocast(batch.x.device.type, torch.bfloat16):
            loss = F.cross_entropy(model(batch.x), batch.y) + WEIGHT * penalty()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return run


# ---- What is measured ----------------------------------------------------------------------


@dataclass(frozen=True)
class Meter:
    """Time and memory of a device."""

    device: torch.device

    @property
    def on_cuda(self) -> bool:
        """Whether memory is counted."""
        return self.device.type == "cuda"

    def now(self) -> float:
        """Seconds, after what was asked of the device is done."""
        if self.on_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, run: Step) -> float:
        """Seconds of one run."""
        start = self.now()
        run()
        return self.now() - start

    def peak_gb(self, run: Step) -> float | None:
        """Gigabytes that are allocated at most, the model and its batch among them."""
        if self.on_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() / 2**30 if self.on_cuda else None

    def where_time_goes(self, run: Step, n: int = 15) -> dict[str, Any]:
        """Operators by the device's own time in one step, and how long the device was busy."""
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * self.on_cuda]
        with profile(activities=activities) as found:
            seconds = self.seconds(run)

        def own(event: Any) -> float:
            time_of = event.self_device_time_total if self.on_cuda else event.self_cpu_time_total
            return float(time_of) / 1e3

        # Kernels are listed beside the operators that launched them.
        operators = [
            e for e in found.key_averages() if e.device_type == torch.autograd.DeviceType.CPU
        ]
        top = sorted(operators, key=own, reverse=True)[:n]
        return {
            "milliseconds": 1e3 * seconds,  # the profiler's own among them
            "busy_milliseconds": sum(map(own, operators)),
            "operators": [{"name": e.key, "calls": e.count, "milliseconds": own(e)} for e in top],
        }


@dataclass
class Attempt:
    """A step until it fails, for want of memory or of precision; from then on nothing."""

    step: Step
    error: str = ""

    def __call__(self) -> None:
        """Run it."""
        if not self.error:
            try:
                self.step()
            except Exception as error:
                self.error = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"


def measure(
    model: nn.Module,
    batch: Batch,
    meter: Meter,
    rounds: int,
    until: float,
    make_loop: MakeLoop,
) -> dict[str, Any]:
    """Time and memory of every step, as many rounds as fit: whole turns of ``Lazy``."""
    steps = {
        name: Attempt(step_of(model, batch, penalty))
        for name, penalty in penalties(model, batch, make_loop).items()
    }
    for step in steps.values():
        step()
    peaks = {name: meter.peak_gb(step) for name, step in steps.items()}
    one_round = sum(meter.seconds(step) for step in steps.values())
    fit = int((until - time.monotonic()) / one_round)
    rounds = max(EVERY, min(rounds, fit) // EVERY * EVERY)
    seconds, again = in_turns(steps, rounds, meter.now, PLAIN)
    profiled = {n: meter.where_time_goes(steps[n]) for n in _PROFILED}
    found: dict[str, Any] = {}
    for name, each in seconds.items():
        if steps[name].error:
            found[name] = {"error": steps[name].error}
            continue
        low, _, high = statistics.quantiles(each, n=4)
        found[name] = {
            "milliseconds": 1e3 * statistics.median(each),
            "quartiles": [1e3 * low, 1e3 * high],
            "over_plain": ratio(each, seconds[PLAIN]),
            "mean_over_plain": statistics.mean(each) / statistics.mean(seconds[PLAIN]),
            "peak_gb": peaks[name],
        }
        loop = next((n for n in steps if n.startswith(f"{name.split(':')[0]}: loop")), name)
        if loop != name and not steps[loop].error:
            found[name]["loop_over_this"] = ratio(seconds[loop], each)
    profiled = {name: each for name, each in profiled.items() if not steps[name].error}
    return {"rounds": rounds, "steps": found, "A/A": again, "profiles": profiled}


_PROFILED = (PLAIN, "EG: loop", "EG: double_backprop", "EG: recompute", "RRR: double_backprop")


# ---- Report --------------------------------------------------------------------------------


def report(name: str, n: int, found: dict[str, Any]) -> None:
    """Print the table of one network."""
    columns = ["milliseconds", "over_plain", "mean_over_plain", "loop_over_this", "peak_gb"]
    rows = [
        [kind, *(f.get(column) or "" for column in columns), f.get("error", "").split(":")[0]]
        for kind, f in found["steps"].items()
    ]
    title = f"{name}, batch {n}, median of {found['rounds']}"
    show(title, ["step", "ms", "/ plain", "mean / plain", "loop / this", "peak GB", ""], rows)
    show("A/A", [*found["A/A"]], [[*found["A/A"].values()]])


def main() -> None:
    """Run and report."""
    arguments = parser(__doc__)
    arguments.add_argument("--batch", type=int, default=64)
    arguments.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    arguments.add_argument("--seconds", type=float, default=270.0, help="for all of it, about")
    add_option(arguments)
    options = arguments.parse_args()
    make_loop = loop_from(options.authors_code)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu_training_step: skipped, no CUDA device.")
        return
    end = time.monotonic() + options.seconds
    device = torch.device(options.device)
    size, rounds = (MINIATURE, EVERY) if options.quick else (WHOLE, 4 * EVERY)
    n = min(options.batch, 4) if options.quick else options.batch
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    results: dict[str, Any] = {"device": name, "batch": n}

    def keep() -> None:  # what there is, should the rest not fit
        save(options.output, "gpu_training_step", vars(options), results)

    meter, networks = Meter(device), size.networks()
    for i, (name, make) in enumerate(networks.items()):
        torch.manual_seed(0)
        model, batch = make().to(device), Batch.of(n, size, device)
        left = end - time.monotonic()
        until = time.monotonic() + left / (len(networks) - i)
        found = measure(model, batch, meter, rounds, until, make_loop)
        results[name] = found | {"parameters": sum(p.numel() for p in model.parameters())}
        keep()
        report(name, n, found)
        del model, batch


if __name__ == "__main__":
    main()
