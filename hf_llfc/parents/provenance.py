"""What an alignment tells of itself: which checkpoints it was found for, and what it moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_llfc.checkpoints import Checkpoint
from hf_llfc.errors import AlignmentError, raise_all
from hf_llfc.foundation.model_names import portable
from hf_llfc.parallel.workers import Workers
from hf_llfc.parents.parent import Parent
from hf_llfc.recipe import AlignSection
from hf_llfc.symmetry import Alignment


def identified(
    alignment: Alignment, reference: Checkpoint, model: Checkpoint, options: AlignSection, workers: Workers
) -> Alignment:
    """The alignment with what tells for which checkpoints it was found, and how, in its metadata."""
    # The first process knows the fingerprints already, from what tells this run from another.
    own = [each.fingerprint() for each in (reference, model)] if workers.rank == 0 else None
    fingerprints = workers.gather(own)[0]
    return alignment.with_metadata(
        reference={"id": portable(reference.id), "revision": reference.revision, "sha256": fingerprints[0]},
        model={"id": portable(model.id), "revision": model.revision, "sha256": fingerprints[1]},
        excluded=list(options.exclude),
        groups=options.groups,
    )


def refuse_foreign_alignment(alignment: Alignment, reference: Checkpoint, model: Checkpoint) -> None:
    """Refuses an alignment, from a file say, that was found for other inputs.

    Raises:
        AlignmentError: A fingerprint differs.
    """
    problems = []
    for role, checkpoint in (("reference", reference), ("model", model)):
        recorded: Mapping[str, Any] = alignment.metadata.get(role, {})
        if recorded.get("sha256") != checkpoint.fingerprint():
            problems.append(
                f"the {role} was {recorded.get('id', 'not recorded')} with weights {str(recorded.get('sha256'))[:12]}, "
                f"{checkpoint.id} has {checkpoint.fingerprint()[:12]}"
            )
    raise_all(problems, AlignmentError, "this alignment was made for other checkpoints; align again")


def alignments_summary(parents: Sequence[Parent]) -> Mapping[str, Any]:
    """Summary of the alignments of several models, with the method of the first, and of the order of their classes.

    Returns:
        As JSON values; empty where nothing was moved.
    """
    summaries = [alignment_summary(parent.alignment) for parent in parents if parent.alignment is not None]
    relabelled = [each.checkpoint.relabelling.because for each in parents if each.checkpoint.relabelling is not None]
    labels = {"labels": relabelled} if relabelled else {}
    if len(summaries) > 1:
        return {"method": summaries[0]["method"], "alignments": summaries, **labels}
    return {**summaries[0], **labels} if summaries else labels


def alignment_summary(alignment: Alignment) -> dict[str, Any]:
    """What an alignment did, for tables, cards and reports, as JSON values.

    Returns:
        `method`, objectives, cosines and `converged` where the method has them, `axes` with the units moved by kind of
        axis, and one `sentence`; `probe_change` and `probe_precision` of its probe, or `probe_left_out`, why there was
        none. Of more than two models that were aligned `together`: how, how many `models`, the `centre` of a star, and
        of a universe the mean cosine of all pairs.
    """
    kinds: dict[str, list[int]] = {}
    for axis, (moved, units) in alignment.moved.items():
        counts = kinds.setdefault(axis.split(".")[0], [0, 0])
        counts[0] += moved
        counts[1] += units
    summary: dict[str, Any] = {
        key: alignment.metadata[key]
        for key in (
            "method",
            "groups",
            "objective_before",
            "objective_after",
            "distance_before",
            "distance_after",
            "cosine_before",
            "cosine_after",
            "converged",
            "unmatched",
            "solver",
            "assignment_gap",
        )
        if key in alignment.metadata
    }
    summary |= _joint(alignment.metadata) | _probe(alignment.metadata)
    summary["reference"] = alignment.metadata.get("reference", {}).get("id")
    summary["model"] = alignment.metadata.get("model", {}).get("id")
    summary["axes"] = [{"axis": kind, "moved": moved, "units": units} for kind, (moved, units) in kinds.items()]
    moved = sum(row["moved"] for row in summary["axes"])
    units = sum(row["units"] for row in summary["axes"])
    method = f"{summary['method']} (all groups)" if summary.get("groups") == "full" else summary["method"]
    sentence = f"{method} moves {moved} of {units} units of {summary['model']} onto {summary['reference']}"
    if "together" in summary:
        centre = f" around {summary['centre']}" if "centre" in summary else ""
        sentence += f", in a {summary['together']} of {summary['models']} models{centre}"
    if "cosine_after" in summary:
        sentence += (
            f"; cosine of the weights {summary['cosine_before']:.4f} before, {summary['cosine_after']:.4f} after"
        )
    if "pairs_cosine_after" in summary:
        sentence += (
            f"; mean over all pairs {summary['pairs_cosine_before']:.4f} before, "
            f"{summary['pairs_cosine_after']:.4f} after"
        )
    if "assignment_gap" in summary:
        sentence += f"; exact assignments would raise the objective by less than {summary['assignment_gap']:.1e} of it"
    if "probe_change" in summary:
        sentence += f"; random inputs give the same answers to {summary['probe_change']:.0e} of the largest"
    elif "probe_left_out" in summary:
        sentence += f"; the moved model was not probed: {summary['probe_left_out']}"
    return {**summary, "sentence": sentence}


def _probe(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What the metadata of an alignment say of its probe, see `hf_llfc.parents.probe`."""
    probe: Mapping[str, Any] = metadata.get("probe", {})
    return {f"probe_{key}": value for key, value in probe.items()}


def _joint(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What the metadata of an alignment say of all models that were aligned together."""
    if universe := metadata.get("universe"):
        cosines = {f"pairs_{key}": universe[key] for key in ("cosine_before", "cosine_after")}
        return {"together": "universe", "models": universe["models"], **cosines}
    if star := metadata.get("star"):
        return {"together": "star", "models": star["models"], "centre": star["centre"]}
    return {}
