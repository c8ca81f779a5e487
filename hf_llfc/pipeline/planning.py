"""What a run would do and what it costs, told before it begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hf_llfc.alignment.costs import machine_costs, matching_cost, probe_seconds
from hf_llfc.checkpoints import Checkpoint, OutputFolder
from hf_llfc.foundation.choices import AUTO
from hf_llfc.parallel.devices import device_alone
from hf_llfc.parents.carrying import carried
from hf_llfc.parents.data import open_calibration_data
from hf_llfc.parents.opening import Models, open_recipe, refuse_replacing_inputs, stand_ins
from hf_llfc.parents.probe import is_in_memory
from hf_llfc.parents.specs import alignment_spec, bind
from hf_llfc.pipeline.adapter_out import adapter_plan, companions_of, planned_bytes, with_base_of_adapters
from hf_llfc.pipeline.closeness import warnings_of
from hf_llfc.pipeline.resources import peak_memory
from hf_llfc.pipeline.tally import tally
from hf_llfc.pipeline.weighting import plan_merge
from hf_llfc.pipeline.which_method import SEVERAL_DOCUMENTS, compared
from hf_llfc.recipe import Recipe


def plan(recipe: Recipe, *, compare: str = "sample") -> dict[str, Any]:
    """What a run would do and what it costs, and what the models changed of their base; see `plan_one`.

    Of several documents all steps, and the costs of all: bytes added up, the highest peak; their models, of which some
    are still to be made, are not compared.

    Raises:
        LLFCError: The recipe or its parents are at fault.
    """
    if not recipe.earlier:
        return plan_one(recipe, compare=compare)
    made = stand_ins(recipe)
    steps: list[dict[str, Any]] = []
    costs = []
    for each in (*recipe.earlier, recipe):
        planned = plan_one(each, made, compare="none")
        steps += [{"step": "document", "what": each.document or "the last one"}, *planned["steps"]]
        costs.append(planned["cost"])
    cost = {key: sum(each[key] for each in costs) for key in ("bytes_read", "bytes_written")}
    cost["peak_memory_bytes"] = max(each["peak_memory_bytes"] for each in costs)
    return {"steps": steps, "cost": cost, "task_vectors": {"sentence": SEVERAL_DOCUMENTS}}


def plan_one(
    recipe: Recipe, made: Mapping[str, Checkpoint] | None = None, *, compare: str = "sample"
) -> dict[str, Any]:
    """What a run would do and what it costs, from configs and headers, and what the models changed of their base.

    Args:
        recipe: The recipe.
        made: What other documents make that are not there yet, by name.
        compare: Of which tensors task vectors are compared: a random `sample` of bounded size, `all`, or `none`, for
            which no weights are read. Weights that are not on this machine are not downloaded for it.

    Returns:
        `steps` with what each does, `tensors` with what becomes of every tensor, and `cost` with bytes to read and
        write and the peak of memory that tensors of the models take (Python, its libraries and activations come on
        top), as JSON values. Where weights are matched, if only for another method to start from, `matching` in `cost`
        holds what one sweep over one model takes: `operations`, `bytes`, and `seconds` as a short measurement on this
        machine predicts them; `probe` holds the `seconds` of probing the moved models, and `calibration` about what a
        calibration takes: `samples`, `forward_passes` over them, `operations`, `bytes` and `seconds`. `task_vectors` is
        what `which_method.compared` finds.

    Raises:
        LLFCError: The recipe or its parents are at fault.
    """
    recipe = with_base_of_adapters(recipe)
    output = OutputFolder(recipe.output_dir, recipe.overwrite)
    if made is None or recipe.document is None:
        output.check()
    device = device_alone(recipe.device)
    opened = open_recipe(recipe, made=made)
    refuse_replacing_inputs(output, opened.everything)
    first = opened.parents[0]
    merge = plan_merge(opened.moved([None] * len(opened.parents)), recipe, sections=opened.sections)
    infos = merge.infos
    written = planned_bytes(opened, recipe) if recipe.is_adapter else sum(info.nbytes for info in infos.values())
    read = sum(each.nbytes for each in opened.all)
    steps = [{"step": "read", "what": ", ".join(each.id for each in opened.named)}]
    steps += [{"step": "dequantise", "what": each} for each in opened.quantised]
    steps += [{"step": section.where, "what": section.what} for section in opened.sections]
    if opened.vocabulary is not None:
        steps.append({"step": "vocabulary", "what": opened.vocabulary})
    if opened.base is not None and (head := [name for name in opened.base.borrowed if name in opened.base.lacking]):
        what = f"that of {first.id}: {len(head)} tensors, {head[0]} among them, which {opened.base.id} lacks"
        steps.append({"step": "head", "what": what})
    steps += [{"step": "head", "what": sentence} for sentence in opened.heads]
    steps += [{"step": "labels", "what": sentence} for sentence in opened.relabelled]
    moving = [each for each in opened.parents if each is not opened.reference]
    if recipe.align.method != "none":
        spec = alignment_spec(first, recipe.align)
        kinds = sorted({axis.split(".")[0] for axis in bind(spec, first).symmetric_axes})
        onto = opened.reference.id
        what = f"{recipe.align.method} over {', '.join(kinds)}; onto {onto}"
        if recipe.align.together != "reference" and len(opened.all) > 2:
            what += f", in a {recipe.align.together} of {len(opened.all)} models"
        steps.append({"step": "align", "what": what})
        if recipe.align.probe:
            held_how = "in memory" if is_in_memory(first) else "whose weights are read as its modules run"
            what = f"{', '.join(each.id for each in moving)} on random inputs before and after, each {held_how}"
            steps.append({"step": "probe", "what": what})
    if recipe.measures_importance:
        methods = [each.method for each in ([part.recipe for part in recipe.parts] or [recipe])]
        weighed = ", ".join(dict.fromkeys(each.importance for each in methods if each is not None and each.importance))
        on = ", ".join(sorted({str(each.dataset) for each in recipe.importance_data if each is not None}))
        steps.append({"step": "importance", "what": f"{weighed} on {on}"})
    steps.append(
        {
            "step": "merge",
            "what": f"{_methods(recipe)} of {len(opened.parents)} models, {len(infos)} tensors"
            if not opened.sections
            else f"{_methods(recipe)} of {len(opened.named)} models in {len(opened.sections)} parts, "
            f"{len(infos)} tensors",
        }
    )
    counted = None if recipe.is_adapter else tally(opened, merge)
    if counted is not None:
        steps.append({"step": "tensors", "what": counted.sentence})
    adapted = [each.id for each in opened.named if each.adapter is not None]
    if adapted and recipe.prove and not recipe.is_adapter:
        what = f"{', '.join(adapted)} on random inputs, folded and as peft runs them"
        steps.append({"step": "prove", "what": what})
    if recipe.is_adapter:
        steps.append({"step": "adapter", "what": adapter_plan(opened, recipe)})
    calibration: dict[str, Any] = {}
    if recipe.calibrate is not None:
        told, calibration = _calibration(recipe, opened, device, is_there=made is None)
        steps.append({"step": "calibrate", "what": told})
    if recipe.diagnose is not None:
        data = recipe.diagnose.data
        what = f"{data.task} on {data.dataset}, {_points(recipe, opened)} points{_passes_by_block(recipe, opened)}"
        steps.append({"step": "diagnose", "what": what})
    beside = carried(opened, recipe)
    left = f"; left behind: {', '.join(beside.left)}" if beside.left and not recipe.is_adapter else ""
    taken = companions_of(first) if recipe.is_adapter else [*beside.files, *beside.sums]
    steps.append({"step": "carry over", "what": f"{', '.join(taken) or 'nothing'}{left}"})
    steps.append({"step": "write", "what": str(recipe.output_dir)})
    if recipe.publish is not None:
        steps.append({"step": "publish", "what": recipe.publish.repo_id})
    held = peak_memory(recipe, opened.all, infos)
    by_weights = recipe.align.method not in ("none", "activation_matching")
    matching = {"matching": matching_cost(first, recipe.align, len(opened.all), device)} if by_weights else {}
    reads = read * (1 if recipe.align.method == "none" else 2)
    probing = {}
    if recipe.align.method != "none" and recipe.align.probe:
        reads += 2 * sum(each.nbytes for each in moving)
        probing = {"probe": {"seconds": len(moving) * probe_seconds(first)}}
    if recipe.calibrate is not None:
        reads += sum(each.nbytes for each in opened.parents)
    cost: dict[str, Any] = {"bytes_read": reads, "bytes_written": written, "peak_memory_bytes": held}
    cost |= {**matching, **probing, **calibration}
    return {
        "steps": steps,
        "cost": cost,
        "tensors": counted.to_dict() if counted is not None else None,
        "warnings": warnings_of(opened, beside),
        "task_vectors": compared(recipe, opened, merge, compare),
    }


def _calibration(
    recipe: Recipe, opened: Models, device: torch.device | None, *, is_there: bool
) -> tuple[str, dict[str, dict[str, float]]]:
    """What a calibration does, and what it takes where the models are there to be asked."""
    section, count = recipe.calibrate, len(opened.parents)
    assert section is not None
    names = ", ".join(dict.fromkeys(str(each.dataset) for each in recipe.calibration_data))
    what = f"{section.method} towards {'the blend of' if section.targets == 'blend' else 'each of'} {count} models"
    what += f", ridge {section.ridge}" if section.method == "calibrate" else ""
    if not is_there:
        return f"{what}, on {names}", {}
    from hf_llfc.calibration.costs import calibration_cost

    data = open_calibration_data(recipe, opened)
    samples = sum(map(len, data))
    batch, _ = next(data[0].batches())
    chooses = section.ridge == AUTO
    cost = calibration_cost(opened.parents[0], batch, samples, count, method=section.method, chooses=chooses)
    per_operation, per_byte = machine_costs(device)
    read = (count + 1) * opened.parents[0].nbytes
    numbers = {
        "samples": samples,
        "forward_passes": cost.passes,
        "operations": cost.operations + cost.solving,
        "bytes": read,
        # Products and solves are in float64.
        "seconds": (cost.operations + 2 * cost.solving) * per_operation + read * per_byte,
    }
    what += f", on {samples} samples of {names}; about {cost.passes:.0f} forward passes over them"
    return what, {"calibration": numbers}


def _methods(recipe: Recipe) -> str:
    """The names of the methods by which tensors are merged."""
    names = [part.recipe.merge_method for part in recipe.parts] or [recipe.merge_method]
    return ", ".join(dict.fromkeys(names))


def _passes_by_block(recipe: Recipe, opened: Models) -> str:
    """What the measure of blocks takes besides; empty where nobody asks for it, or the number of blocks is not told."""
    layers = getattr(opened.parents[0].config, "num_hidden_layers", None)
    assert recipe.diagnose is not None
    if "blocks" not in recipe.diagnose.measures or not isinstance(layers, int):
        return ""
    from hf_llfc.diagnostics.measures.blocks import trial_passes

    passes = trial_passes(layers + 2, max(2, len(opened.parents)))
    return f"; blocks take about {passes:.0f} forward passes more"


def _points(recipe: Recipe, opened: Models) -> int:
    """How many models a diagnosis runs on every batch."""
    from hf_llfc.diagnostics.checkpoints import region_of

    assert recipe.diagnose is not None
    is_no_sum = recipe.method is not None
    count = 2 if is_no_sum and opened.base is not None and len(opened.parents) == 1 else len(opened.parents)
    weights = recipe.weights or [1 / count] * count
    if len(weights) < 2 and opened.base is None:
        return 1
    over_base = opened.base is not None and not is_no_sum
    return len(region_of(weights, recipe.diagnose, arithmetic_over_base=over_base).points)
