"""What can go wrong, as a user reads it.

Every message says what is wrong, which model and tensor it concerns, what was found against what was expected,
and what to do next.
"""

from collections.abc import Iterable, Sequence

_LISTED = 30


class LLFCError(ValueError):
    """The input is at fault; the message is complete and needs no traceback.

    Attributes:
        problems: Each thing that is wrong, where several were collected.
    """

    problems: Sequence[str] = ()


class SpecError(LLFCError):
    """A permutation spec or axis expression does not hold, or does not fit a checkpoint."""


class CheckpointError(LLFCError):
    """A checkpoint cannot be found, read, trusted, compared or written."""


class StorageError(CheckpointError):
    """The disk is full, or a file that was in order cannot be read or written now; the same run may succeed later."""


class ResourceError(StorageError):
    """Memory, or the address space of the process, does not suffice; the same run may succeed with more."""


class AlignmentError(LLFCError):
    """Two models cannot be aligned, or an alignment does not belong to these models."""


class RecipeError(LLFCError):
    """A recipe, or a value that overrides one of its keys, is not valid."""


class EvaluationError(LLFCError):
    """Data, task or metric cannot be used for evaluation."""


class PublishingError(LLFCError):
    """A card cannot be rendered or a folder cannot be pushed to the Hub."""


class ProcessError(LLFCError):
    """Another process of the launcher ended or cannot be reached; the same run may succeed later.

    Attributes:
        rank: Which process it is, if that is known.
    """

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


def raise_all(problems: Sequence[str], kind: type[LLFCError], heading: str) -> None:
    """Raises one error that lists the problems, at most the first thirty, and returns silently if there is none.

    Args:
        problems: One message per problem.
        kind: The class of the error.
        heading: What was being checked; the first line of the message, without a colon.

    Raises:
        LLFCError: An instance of `kind`, if there is any problem.
    """
    if not problems:
        return
    if len(problems) == 1:
        raise _with_problems(kind(f"{heading}: {problems[0]}"), problems)
    lines = [f"{heading}: {len(problems)} problems"]
    for problem in problems[:_LISTED]:
        lines.append("  - " + problem.replace("\n", "\n    "))
    if len(problems) > _LISTED:
        lines.append(f"  and {len(problems) - _LISTED} more")
    raise _with_problems(kind("\n".join(lines)), problems)


def _with_problems(error: LLFCError, problems: Sequence[str]) -> LLFCError:
    error.problems = tuple(problems)
    return error


def refuse_other_count(weights: Sequence[object], models: int, kind: type[LLFCError]) -> None:
    """Refuses weights that are not one a model.

    Args:
        weights: The weights.
        models: How many models there are.
        kind: The class of the error.

    Raises:
        LLFCError: An instance of `kind`, if there are more or fewer.
    """
    if len(weights) != models:
        raise kind(f"{len(weights)} weights for {models} models; give one weight a model")


def suggest(name: str, choices: Iterable[str]) -> str:
    """The nearest of `choices`, as the end of an error message, or nothing if none is near.

    Args:
        name: What the user wrote.
        choices: What would have been valid.

    Returns:
        For example ``"; did you mean 'weight_matching'?"``, or the empty string.
    """
    import difflib  # only when something is wrong

    # Compared without case, because a wrong case is the nearest of all mistakes.
    by_folded_name = {choice.casefold(): choice for choice in choices}
    nearest = difflib.get_close_matches(name.casefold(), by_folded_name, n=1, cutoff=0.6)
    return f"; did you mean '{by_folded_name[nearest[0]]}'?" if nearest else ""
