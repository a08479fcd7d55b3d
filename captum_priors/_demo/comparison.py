"""The main job itself: two runs, two evaluations, one report."""

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from captum_priors._demo import report
from captum_priors._demo.data import Images
from captum_priors._demo.evaluation import evaluate
from captum_priors._demo.training import Epoch, Settings, train
from captum_priors.priors import PixelPrior, Prior


def compare(
    images: Images, output: Path, seed: int, epochs: int, weight: float, names: tuple[str, str]
) -> None:
    """Train both models, evaluate them alike, print and write the comparison."""
    settings = Settings(seed=seed, epochs=epochs, weight=weight)
    console = Console()
    makers = dict(zip(names, (None, _pixel_prior), strict=True))
    columns = (
        TextColumn("{task.description:14}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} epochs"),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
    )
    runs = {}
    with Progress(*columns, console=console) as progress:
        for name, make_prior in makers.items():
            task = progress.add_task(name, total=epochs, figures="")

            def show(epoch: Epoch, task: object = task) -> None:
                progress.update(
                    task,  # type: ignore[arg-type]  # rich's id, bound for this run
                    advance=1,
                    figures=f"loss {epoch.loss:.3f}  penalty {epoch.penalty:.0f}  "
                    f"accuracy {epoch.accuracy:.3f}",
                )

            runs[name] = train(*images.train, settings, make_prior, show)
    evaluations = {
        name: evaluate(run.model, *images.test, images.train[0], seed) for name, run in runs.items()
    }
    table = report.table(names, (evaluations[names[0]], evaluations[names[1]]))
    report.show(console, images, runs, table)
    prior = f"{weight:g} * {_pixel_prior(nn.Identity())!r}"
    result = report.figures(images, settings, prior, runs, evaluations)
    report.write(output, result, images, runs, evaluations)
    console.print(f"Written: {output / 'report.json'}, {output / 'report.png'}")


def _pixel_prior(model: nn.Module) -> Prior:
    """One reference for each image and step, drawn from the batch itself."""
    return PixelPrior(model, n_samples=1)
