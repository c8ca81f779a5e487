"""Experiment trackers: what a run found, as curves and scalars beside those of other runs.

The trackers are accelerate's own (`accelerate.tracking`), under its names. One run of ours is one run there: project
`hf-llfc`, named like the output folder. The keys:

| key | step |
|---|---|
| `path/loss`, `path/METRIC` | 1000·α on a line, else the place of the point |
| `layers/LAYER/llfc`, `layers/LAYER/ratio` | the same |
| `align/MODEL/START/objective`, `…/moved` of weight matching | the sweep |
| `align/MODEL/loss` of learned matching | the step of gradient descent, one mean a twentieth |
| `models/loss`, `models/METRIC` | the place of the parent; the merge comes last |
| `barrier/loss`, `barrier/error`, `verdict`, `because` | 0 |
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_llfc.errors import LLFCError
from hf_llfc.recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

    from hf_llfc.diagnostics import ConnectivityReport
    from hf_llfc.symmetry import Alignment

logger = logging.getLogger(__name__)

PROJECT = "hf-llfc"


def refuse_missing_trackers(names: Sequence[str]) -> None:
    """Refuses trackers whose package is not installed.

    Raises:
        LLFCError: One of them.
    """
    if not names:
        return
    from accelerate.tracking import get_available_trackers

    available = [str(each) for each in get_available_trackers()]
    missing = [name for name in names if name not in available]
    if missing:
        raise LLFCError(
            f"the tracker {missing[0]} is not installed: `pip install {missing[0].replace('_', '-')}`, or leave it out "
            "of log_with"
        )


class Trackers:
    """What a run is logged to; nothing where no tracker is named. A tracker that fails is warned of, and ends no run.

    Args:
        names: Of accelerate's trackers; installed ones.
        logging_dir: Where those write that write files.
        name: Of the run.
        config: What the run was asked for, as plain data.
    """

    def __init__(
        self, names: Sequence[str], *, logging_dir: str | Path = "runs", name: str = "", config: Mapping[str, Any] = {}
    ) -> None:
        self._accelerator: Accelerator | None = None
        if not names:
            return
        import torch
        from accelerate import Accelerator
        from accelerate.utils import ProjectConfiguration

        folder = Path(logging_dir) / name
        with self._guarded():
            accelerator = Accelerator(
                cpu=not torch.accelerator.is_available(),
                log_with=list(names),
                project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder)),
            )
            of_run = {each: {"name": name} for each in ("trackio", "wandb") if each in names}
            accelerator.init_trackers(PROJECT, config=dict(_flat(config)), init_kwargs=of_run)
            self._accelerator = accelerator

    def alignments(self, found: Sequence[Alignment | None]) -> None:
        """How the objectives rose, and what was learned."""
        for place, alignment in enumerate(found):
            if alignment is None:
                continue
            metadata = alignment.metadata
            for sweep in metadata.get("sweeps") or ():
                key = f"align/{place}/{sweep['start'].replace(' ', '_')}"
                values = {f"{key}/objective": sweep["objective"], f"{key}/moved": sweep["moved"]}
                self._log(values, sweep["sweep"])
            losses = metadata.get("losses") or ()
            for part, loss in enumerate(losses, start=1):
                self._log({f"align/{place}/loss": loss}, round(part * metadata["learning_steps"] / len(losses)))

    def report(self, report: ConnectivityReport | None) -> None:
        """The path, every layer along it, and what came of it."""
        if report is None:
            return
        steps: dict[Any, int] = {}
        for row in report.path_rows():
            place = row.pop("alpha", row.pop("point", None))
            steps[place] = round(1000 * place) if report.region == "line" else len(steps)
            self._log({f"path/{name}": value for name, value in row.items()}, steps[place])
        for row in report.part_rows("layers"):
            place = row.get("alpha", row.get("point"))
            values = {f"layers/{row['layer']}/{name}": row[name] for name in ("llfc", "ratio")}
            self._log(values, steps.setdefault(place, len(steps)))
        barrier = {"barrier/loss": report.barrier.loss, "barrier/error": report.barrier.error}
        self._log({**barrier, "verdict": report.verdict.answer, "because": report.verdict.because}, 0)

    def table(self, table: Sequence[Mapping[str, Any]]) -> None:
        """Loss and metrics of the parents and of the merge."""
        for place, row in enumerate(table):
            values = {"loss": row.get("loss"), **row.get("metrics", {})}
            self._log({f"models/{name}": value for name, value in values.items()}, place)

    def finish(self) -> None:
        """Waits until everything is written."""
        if self._accelerator is not None:
            names = [tracker.name for tracker in self._accelerator.trackers]
            with self._guarded():
                self._accelerator.end_training()
                if "trackio" in names:
                    # It would finish the run once more as Python ends, and say so on stdout.
                    import trackio

                    trackio.finish()
            self._accelerator = None

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        known = {name: value for name, value in values.items() if isinstance(value, int | float | str)}
        if self._accelerator is not None and known:
            with self._guarded():
                self._accelerator.log(known, step=step)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Nothing of a tracker's own goes to stdout, which is for answers, and none of its errors ends a run."""
        try:
            with redirect_stdout(sys.stderr):
                yield
        except Exception as error:
            self._accelerator = None
            logger.warning("logging to the trackers ends here: %s: %s", type(error).__name__, error)


@contextmanager
def tracking(recipe: Recipe, *, is_main: bool) -> Iterator[Trackers]:
    """Trackers for as long as a run takes; silent ones on all processes but the main one. See `Trackers`."""
    trackers = Trackers(
        recipe.log_with if is_main else (),
        logging_dir=recipe.logging_dir,
        name=Path(recipe.output_dir).name,
        config=recipe.to_dict(),
    )
    try:
        yield trackers
    finally:
        trackers.finish()


def _flat(config: Any, key: str = "") -> Iterator[tuple[str, bool | int | float | str]]:
    """Plain data as `a.b.0` → value."""
    entries = config.items() if isinstance(config, Mapping) else enumerate(config) if _is_list(config) else None
    if entries is not None:
        for name, value in entries:
            yield from _flat(value, f"{key}.{name}" if key else str(name))
    elif config is not None:
        yield key, config if isinstance(config, bool | int | float | str) else str(config)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)
