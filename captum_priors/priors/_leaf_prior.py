"""What every prior that is no combination of others has: a reduction and a random stream."""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from captum_priors._engine._processes import current_processes, world_size
from captum_priors._engine._random import RandomStream
from captum_priors._engine._smooth import check_beta
from captum_priors._engine._wrappers import data_parallel_rank, watched
from captum_priors._errors import expected_found, one_of
from captum_priors.priors._base import Prior

Reduction = Literal["mean", "sum"]


_UNDECIDED = expected_found(
    "statistic of a batch",
    "to be told which examples make the batch, because several processes train together",
    "nothing said",
    "Write captum_priors.integrations.AcrossProcesses(prior) where the processes share each batch, "
    "or AcrossProcesses(prior, 'self') where every process has a batch of its own.",
)


class LeafPrior(Prior):
    """A term of a sum of priors."""

    _score_name = "score"

    def __init__(self, *, reduction: Reduction, smooth: float | None) -> None:
        super().__init__()
        one_of("reduction", reduction, ("mean", "sum"))
        self.reduction: Reduction = reduction
        self.smooth = None if smooth is None else check_beta("smooth", smooth)
        self.stream = RandomStream(type(self).__name__)

    @property
    def draws_baselines(self) -> bool:
        """Whether baselines are a distribution to draw from, rather than one for each example."""
        return False

    def explained_modules(self) -> Sequence[nn.Module]:
        """Return every module that an evaluation runs."""
        return ()

    def differentiates_twice(self) -> bool:
        """Whether the backward pass runs through input gradients."""
        return True

    def _seed_now(self, *, count: bool = True) -> int:
        """Seed of this call: processes with examples of their own draw numbers of their own."""
        if not self.training_step():
            return self.stream.peek(advance=False)
        processes = current_processes()
        rank = processes.rank if processes else data_parallel_rank(self.explained_modules)
        draw = self.stream.next_seed if count else self.stream.peek
        return draw(advance=True, rank=rank)

    def _reduce(self, scores: Any, batch: int | None) -> Tensor:
        """Reduce the scores of a batch; what is no batch of tensors has any number of rows."""
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else None
        if shape is None or shape not in ((), (shape[:1] if batch is None else (batch,))):
            found = type(scores).__name__ if shape is None else shape
            raise ValueError(
                expected_found(
                    f"`{self._score_name}`",
                    f"a tensor of shape ({'n' if batch is None else batch},), or () for the batch",
                    str(found),
                    "Return one unreduced number for each example.",
                )
            )
        reduced: Tensor = scores.mean() if self.reduction == "mean" else scores.sum()
        processes = current_processes()
        if scores.dim() == 0:
            if processes is None and world_size() > 1 and self.training_step():
                raise ValueError(_UNDECIDED)
        elif processes is not None:
            reduced = reduced * (processes.share if self.reduction == "mean" else processes.size)
        return watched(reduced, self.explained_modules, whole=self.differentiates_twice())

    def _shared_options(self) -> dict[str, Any]:
        """Options that every leaf has, where they are not the default."""
        options: dict[str, Any] = {}
        if self.smooth is not None:
            options["smooth"] = self.smooth
        if self.reduction != "mean":
            options["reduction"] = self.reduction
        return options
