"""What the stages of a run share, as one frozen value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hf_llfc.checkpoints import OutputFolder
from hf_llfc.checkpoints.writing.journal import Journal
from hf_llfc.foundation.progress import Progress
from hf_llfc.parallel.processes import Processes
from hf_llfc.parents.carrying import Carried, carried
from hf_llfc.parents.data import has_statistics, open_calibration_data, open_recipe_data
from hf_llfc.parents.opening import Models, open_recipe, refuse_replacing_inputs
from hf_llfc.parents.parent import Parent
from hf_llfc.recipe import Recipe
from hf_llfc.symmetry import Alignment

if TYPE_CHECKING:
    from hf_llfc.evaluation import EvaluationData
    from hf_llfc.parents.opening import Model

Value = TypeVar("Value")


@dataclass(frozen=True)
class RunContext:
    """A run whose models are open.

    Attributes:
        recipe: What is run.
        processes: Who runs it.
        output: Where the result goes.
        progress: Shown meanwhile, on the main process.
        models: The opened models.
        data: What to measure on; None where nothing is measured.
        calibration: The samples from which BatchNorm is recomputed; None where it is not.
        fitted_on: The samples that the merge is calibrated on, all or one set a model; none where it is not.
        alignments: One a parent; None where it stays as it is.
        folder: The staging folder of the output, once there is one.
        carried: Which files beside config and weights go with the result.
        warnings: What a user should know before using the result, a sentence each.
        is_temporary: Whether the models are gone after the run.
    """

    recipe: Recipe
    processes: Processes
    output: OutputFolder
    progress: Progress
    models: Models
    data: EvaluationData | None = None
    calibration: EvaluationData | None = None
    fitted_on: Sequence[EvaluationData] = ()
    alignments: Sequence[Alignment | None] = ()
    folder: Path | None = None
    carried: Carried = field(default_factory=Carried)
    warnings: Sequence[str] = ()
    is_temporary: bool = False

    @cached_property
    def _moved(self) -> tuple[list[Parent], Parent | None]:
        return self.models.moved(self.alignments or [None] * len(self.models.parents))

    @property
    def parents(self) -> list[Parent]:
        """The parents in the coordinates of the reference."""
        return self._moved[0]

    @property
    def base(self) -> Parent | None:
        """The base of task arithmetic."""
        return self._moved[1]

    @property
    def for_batch_norm(self) -> EvaluationData | None:
        """The samples from which BatchNorm is recomputed: those of the calibration, where nothing is measured."""
        if self.recipe.diagnose is not None or not self.fitted_on:
            return self.calibration
        return self.fitted_on[0] if has_statistics(self.models.parents[0]) else None

    @property
    def staging(self) -> Path:
        """The staging folder of the output."""
        assert self.folder is not None, "inside `staged`"
        return self.folder

    def on_main(self, work: Callable[[RunContext], Value]) -> Value:
        """Runs work on the main process; all processes get its value, or its error."""
        return self.processes.on_main(lambda: work(self))

    @contextmanager
    def staged(self) -> Iterator[RunContext]:
        """The same run with the staging folder of its output; see `staging_of`."""
        with staging_of(self.output, self.processes) as folder:
            yield replace(self, folder=folder)

    def stage(
        self,
        name: str,
        find: Callable[[], Value],
        *,
        save: Callable[[Journal, Value], tuple[Any, Iterable[Path]]],
        load: Callable[[Journal, Any], Value],
    ) -> Value:
        """The result of a stage whose work all processes share; see `Journal.stage`."""
        made = [] if self.on_main(lambda run: name in run.output.journal.stages) else [find()]

        def keep(run: RunContext) -> Value:
            journal = run.output.journal
            return journal.stage(
                name, made.pop, save=lambda result: save(journal, result), load=lambda value: load(journal, value)
            )

        return self.on_main(keep)


@contextmanager
def staging_of(output: OutputFolder, processes: Processes) -> Iterator[Path]:
    """The staging folder of an output; the main process makes and finishes it."""
    folder = processes.on_main(output.__enter__)
    try:
        yield folder
    except BaseException as error:
        if processes.is_main:
            output.__exit__(type(error), error, error.__traceback__)
        raise
    processes.on_main(lambda: output.__exit__(None, None, None))


def open_run(
    recipe: Recipe,
    output: OutputFolder,
    processes: Processes,
    progress: Progress,
    given: Sequence[Model] | None = None,
) -> RunContext:
    """Opens the models and the data of a recipe.

    Args:
        recipe: What is run.
        output: Where the result goes.
        processes: Who runs it; the main process downloads.
        progress: Shown meanwhile.
        given: What to take in place of the models that the recipe names, one for each.

    Raises:
        LLFCError: A model cannot be opened, models do not fit each other or the data, or one would be replaced.
    """
    models = processes.main_first(lambda: open_recipe(recipe, given))
    refuse_replacing_inputs(output, models.everything)
    data, calibration = open_recipe_data(recipe, models)
    fitted_on = open_calibration_data(recipe, models)
    run = RunContext(recipe, processes, output, progress, models, data, calibration, fitted_on)
    return replace(run, carried=carried(models, recipe))
