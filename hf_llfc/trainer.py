"""A callback for the Trainer of transformers: checkpoints of one training, merged or diagnosed at its end.

Checkpoints of one run are spawned from each other: they share their coordinates, so that nothing is aligned, and their
uniform average is a model soup along the trajectory (LAWA: Kaddour, 2022, arXiv 2209.14981; soups: Wortsman et al.,
ICML 2022).
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy
from transformers.utils import is_peft_available

from hf_llfc.checkpoints.files import ADAPTER_CONFIG, ADAPTER_FILE, CONFIG_FILE
from hf_llfc.errors import LLFCError, RecipeError
from hf_llfc.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

    from hf_llfc.diagnostics import ConnectivityReport
    from hf_llfc.pipeline.flow import Result

logger = logging.getLogger(__name__)

COLLECTION = "_llfc_checkpoints"
"""Below the Trainer's output folder; what begins with an underscore the Trainer does not push."""
FINAL = "final"
# What a checkpoint holds for a training to go on, and a model does not need.
_OF_TRAINING = re.compile(
    r"optimizer\..*|scheduler\.pt|scaler\.pt|rng_state.*\.pth|trainer_state\.json|training_args\.bin"
)
_STEP = re.compile(r"step-(\d+)")


class MergeCallback(TrainerCallback):
    """Collects checkpoints while a Trainer trains, and merges or diagnoses them when it ends.

    Collected are the checkpoints that the Trainer saves, by hard links, so that they stay when `save_total_limit`
    deletes them and take no room while it does not. In a training of several processes the main one collects, and all
    of them share the merge. A training that is resumed goes on with what it had collected up to that checkpoint.

    Of a model that is trained through peft the Trainer saves adapters: each is folded into the base that it names, and
    the result is a whole model, the average of the folded ones.

    A merge that fails ends no training: what is wrong is logged, kept as `problem`, and the checkpoints stay.

    Attributes:
        result: What the merge made; None before the end, and where nothing is merged.
        reports: Without a merge, the diagnosis of every checkpoint against the final model, by its step.
        problem: Why there is no result, where the end failed.

    Example:
        trainer = Trainer(model, args, train_dataset=data, callbacks=[hf_llfc.MergeCallback("soup", last=5)])
        trainer.train()
        AutoModel.from_pretrained("soup")
    """

    def __init__(
        self,
        out: str | Path,
        *,
        every: int | None = None,
        last: int | None = None,
        weights: Sequence[float] | None = None,
        merge: bool = True,
        keep: bool = False,
        base: str | Path | None = None,
        **settings: Any,
    ) -> None:
        """Takes what is to be done; everything that can be checked is checked now.

        Args:
            out: The folder to write: an ordinary checkpoint with its card, or without a merge one folder of evidence
                a checkpoint.
            every: Also lets the Trainer save at every so many steps, and collects these checkpoints alone; where None
                every one that it saves by itself.
            last: How many of them count, from the end; all where None.
            weights: One a checkpoint, the oldest first; equal weights where None.
            merge: Whether they are merged; otherwise each is diagnosed against the final model.
            keep: Whether what was collected stays after the end.
            base: What adapters are folded into, a Hub id or a folder; where None, what their config names.
            settings: Any other key of a recipe: `diagnose`, which says on what to measure, `dtype`, `overwrite`,
                `publish`, and so on.

        Raises:
            RecipeError: Something of this is not valid, or does not go together.
        """
        settings = {key: value for key, value in settings.items() if value is not None}
        of_a_merge = sorted(set(settings) - {"overwrite", "diagnose"})
        for name, value, least in (("every", every, 1), ("last", last, 2 if merge else 1)):
            if value is not None and value < least:
                raise RecipeError(f"MergeCallback: {name}={value}; at least {least} is expected")
        if weights is not None and last is not None and len(weights) != last:
            raise RecipeError(f"MergeCallback: {len(weights)} weights for the last {last} checkpoints; give one each")
        if not merge and "diagnose" not in settings:
            raise RecipeError("MergeCallback: without a merge, `diagnose` must say on what to measure")
        if not merge and (weights is not None or of_a_merge):
            given = ", ".join(["weights"] * (weights is not None) + of_a_merge)
            raise RecipeError(f"MergeCallback: {given}: has no meaning without a merge")
        self.out = Path(out)
        self.every = every
        self.last = last
        self.weights = list(weights) if weights is not None else None
        self.merge = merge
        self.keep = keep
        self.base = base
        self.settings = settings
        self.result: Result | None = None
        self.reports: dict[int, ConnectivityReport] = {}
        self.problem: LLFCError | None = None
        self.recipe = self._planned()

    def _planned(self) -> Recipe:
        """The recipe of the merge, with names in place of the checkpoints that are yet to come."""
        count = len(self.weights) if self.weights is not None else self.last or 2
        shares = self.weights or [1 / count] * count
        models = [
            {"model": f"step-{place}", "parameters": {"weight": share}} for place, share in enumerate(shares, start=1)
        ]
        return load_recipe({"models": models, "output_dir": str(self.out), **self.settings})

    # -- what the Trainer calls

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Finds out, before the training, whether anything will be collected and may be written.

        Raises:
            RecipeError: The Trainer saves nothing, or adapters whose base nobody names.
            CheckpointError: The output folder cannot be written.
        """
        from hf_llfc.checkpoints import OutputFolder

        self.result, self.reports, self.problem = None, {}, None
        if self.every is None and args.save_strategy == SaveStrategy.NO:
            raise RecipeError("MergeCallback: the Trainer saves no checkpoint (save_strategy='no'); give every=STEPS")
        if self.base is None and _has_nameless_base(kwargs.get("model")):
            raise RecipeError(
                "MergeCallback: the adapters of this training name no base, so that they could not be folded: save the "
                "base, and give base=FOLDER"
            )
        if not state.is_world_process_zero:
            return
        OutputFolder(self.out, self.recipe.overwrite).check()
        # What lies after the step at which a training goes on belongs to a path that is given up.
        given_up = [path for step, path in _collected(args).items() if step > state.global_step]
        if given_up:
            logger.warning("%d checkpoints that another training had collected are discarded", len(given_up))
        for path in given_up:
            shutil.rmtree(path)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Asks the Trainer to save: it alone knows how, when a model is spread over processes."""
        if self.every is not None and (state.global_step % self.every == 0 or state.global_step >= state.max_steps):
            control.should_save = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Collects a checkpoint.

        Raises:
            RecipeError: It is none that can be merged.
        """
        wanted = self.every is None or state.global_step % self.every == 0 or state.global_step >= state.max_steps
        if not state.is_world_process_zero or not wanted:
            return
        checkpoint = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        _link(checkpoint, _collection(args) / f"step-{state.global_step}")
        found = list(_collected(args).values())
        for path in found[: -self.last] if self.last is not None else []:
            shutil.rmtree(path)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Merges or diagnoses what was collected."""
        from hf_llfc.parallel.processes import Processes

        try:
            with Processes() as processes:
                found = processes.on_main(lambda: _collected(args))
                final = None if self.merge else processes.on_main(lambda: _final(args, state, kwargs["model"], found))
            if final is None:
                self._merge(found)
            else:
                self._diagnose(found, final)
        except LLFCError as error:
            self.problem = error
            if state.is_world_process_zero:
                logger.error("%s\nThe checkpoints stay in %s", error, _collection(args))
            return
        if state.is_world_process_zero and not self.keep:
            shutil.rmtree(_collection(args), ignore_errors=True)

    # -- what comes of it

    def _merge(self, found: Mapping[int, Path]) -> None:
        from hf_llfc.api import merge

        if len(found) < 2:
            raise RecipeError(f"MergeCallback: {len(found)} checkpoints were saved; a merge needs two: save more often")
        if self.weights is not None and len(found) != len(self.weights):
            raise RecipeError(
                f"MergeCallback: {len(self.weights)} weights for {len(found)} checkpoints that were saved"
            )
        models = [self._named(path) for path in found.values()]
        self.result = merge(models, self.weights, out=self.out, temporary=not self.keep, **self.settings)

    def _named(self, path: Path) -> str:
        """What a checkpoint is called where models are named: an adapter with its base."""
        is_adapter = (path / ADAPTER_CONFIG).is_file()
        return f"{self.base}+{path}" if is_adapter and self.base is not None else str(path)

    def _diagnose(self, found: Mapping[int, Path], final: Path) -> None:
        from hf_llfc.pipeline.single_stages import write_diagnosis
        from hf_llfc.recipe import ModelEntry

        assert self.recipe.diagnose is not None, "asked for without a merge"
        for step, path in found.items():
            if path != final:
                models = (ModelEntry(self._named(final)), ModelEntry(self._named(path)))
                recipe = replace(self.recipe, models=models, output_dir=str(self.out / path.name))
                self.reports[step] = write_diagnosis(recipe)
        if not self.reports:
            raise RecipeError(
                "MergeCallback: only the final model was saved, nothing to compare it with: save more often"
            )


def _collection(args: TrainingArguments) -> Path:
    return Path(str(args.output_dir)) / COLLECTION


def _collected(args: TrainingArguments) -> dict[int, Path]:
    """What is collected, by step, the oldest first."""
    folder = _collection(args)
    steps = [
        (int(match[1]), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := _STEP.fullmatch(path.name)) is not None
    ]
    return dict(sorted(steps))


def _link(checkpoint: Path, target: Path) -> None:
    """Takes the model out of a checkpoint, whole or not at all.

    Raises:
        RecipeError: There is no model in it that can be merged.
    """
    names = [path.name for path in sorted(checkpoint.iterdir()) if path.is_file()]
    names = [name for name in names if _OF_TRAINING.fullmatch(name) is None]
    is_adapter = {ADAPTER_CONFIG, ADAPTER_FILE} <= set(names)
    is_model = CONFIG_FILE in names and any(name.endswith(".safetensors") for name in names)
    if not is_adapter and not is_model:
        raise RecipeError(
            f"MergeCallback: {checkpoint} holds no whole model: {', '.join(names) or 'nothing'}; only checkpoints with "
            f"{CONFIG_FILE} and safetensors, or adapters, are merged (of FSDP, save the full state dict)"
        )
    draft = target.with_name(f"draft-{target.name}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for name in names:
        try:
            os.link(checkpoint / name, draft / name)
        except OSError:  # a file system without links
            shutil.copy2(checkpoint / name, draft / name)
    shutil.rmtree(target, ignore_errors=True)
    draft.rename(target)


def _has_nameless_base(model: object) -> bool:
    """Whether a model has adapters of peft that do not say what they belong to."""
    if not is_peft_available():
        return False
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return False
    config: Any = model.active_peft_config
    return not config.base_model_name_or_path


def _final(args: TrainingArguments, state: TrainerState, model: PreTrainedModel, found: Mapping[int, Path]) -> Path:
    """Where the model that the training ends with lies; it is written where no checkpoint holds it.

    Raises:
        RecipeError: It cannot be written here.
    """
    best = state.best_model_checkpoint if args.load_best_model_at_end else None
    step = int(best.rsplit("-", 1)[-1]) if best is not None else state.global_step
    if step in found:
        return found[step]
    target = _collection(args) / FINAL
    if best is not None:
        _link(Path(best), target)
        return target
    if args.fsdp or args.deepspeed:
        raise RecipeError(
            "MergeCallback: the final model was not saved, and is spread over processes; give every=STEPS"
        )
    model.save_pretrained(target)
    return target
