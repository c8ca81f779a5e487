"""The command line: `hf-llfc …`, which is also `hf llfc …` as an extension of the Hub's own client.

stdout carries data, stderr messages and progress. Exit codes: 0 done, 1 the answer is no (`check`, `inspect --verify`),
2 the input is at fault, 130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_llfc import __version__
from hf_llfc.choices import ALIGNMENT_METHODS, HEADS, MEASURES, STARTS, SUGGESTIONS, UNITS
from hf_llfc.errors import LLFCError, suggest

if TYPE_CHECKING:
    from hf_llfc.diagnostics import ConnectivityReport, LayerRow
    from hf_llfc.evaluation import EvaluationConfig
    from hf_llfc.recipe import AlignSection, Recipe

Handler = Callable[[argparse.Namespace], int]

# What the processes of a launcher do together; anything else the main one does alone.
SHARED_COMMANDS = ("align", "merge", "diagnose", "run")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: The command line; `sys.argv` where None.

    Returns:
        The exit code.
    """
    options = _parse(arguments)
    if not _is_main_process() and options.command not in SHARED_COMMANDS:
        return 0
    _quiet_libraries(verbose=options.verbose)
    with suppress(ValueError):  # only the main thread may; a stop then cleans up as an interrupt does
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        _import_modules(options.imports)
        return int(options.handler(options))
    except LLFCError as error:
        _report_error(str(error), options)
        return 2
    except KeyboardInterrupt:
        print("hf-llfc: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except OSError as error:  # a full disk, say
        if options.debug:
            raise
        what = ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)
        _report_error(f"{what}; run again with --debug to see where", options)
        return 2
    except Exception as error:
        if options.debug:
            raise
        _report_error(f"unexpected {type(error).__name__}: {error}; run again with --debug for the traceback", options)
        return 2


def run_main(arguments: Sequence[str] | None = None) -> int:
    """`python -m hf_llfc`: a recipe among the arguments, and no command, runs it."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] != "run" and any(word.endswith((".yaml", ".yml")) for word in words):
        words.insert(0, "run")
    return main(words)


def _import_modules(names: Sequence[str]) -> None:
    sys.path.insert(0, "")  # a console script does not look in the working directory, `python -m` does
    for name in names:
        try:
            import_module(name)
        except ImportError as error:
            raise LLFCError(f"--import {name}: cannot be imported: {error}") from None


def _is_main_process() -> bool:
    """Whether this is the one of a launcher's processes that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def _report_error(message: str, options: argparse.Namespace) -> None:
    if not _is_main_process():
        return
    if options.format == "json":
        from hf_llfc.console import print_json

        print_json({"error": message})
    print(f"hf-llfc: error: {message}", file=sys.stderr)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line; overrides of a recipe may stand anywhere, also before it and between options."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if options.command != "run" or word.startswith("-")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if options.command == "run":
        words = [options.recipe, *options.overrides, *rest]
        recipe = next((word for word in words if "=" not in word), words[0])
        words.remove(recipe)
        options.recipe, options.overrides = recipe, words
    return options


class _Parser(argparse.ArgumentParser):
    """Ends with one message that suggests the nearest command, option or value."""

    def error(self, message: str) -> None:  # type: ignore[override]
        wrong = re.match(r"(?:argument (\S+): invalid choice: '(.*?)'|unrecognized arguments: (-[^\s=]*))", message)
        hint = ""
        if wrong is not None and wrong[3]:
            hint = suggest(wrong[3], self._options())
        elif wrong is not None:
            hint = suggest(wrong[2], [name for action in self._actions for name in action.choices or ()])
        self.exit(2, f"hf-llfc: error: {message}{hint} (`{self.prog} --help` lists what there is)\n")

    def _options(self) -> list[str]:
        """All options, also those of the commands."""
        commands = [action.choices for action in self._actions if isinstance(action.choices, dict)]
        parsers = [self, *(parser for choices in commands for parser in choices.values())]
        return [option for parser in parsers for action in parser._actions for option in action.option_strings]


def _parser() -> argparse.ArgumentParser:
    common = _Parser(add_help=False)
    common.add_argument("--format", choices=("table", "json"), default="table", help="how the answer is printed")
    common.add_argument("--quiet", action="store_true", help="no progress bars")
    common.add_argument("--verbose", action="store_true", help="log what is being done")
    common.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="import a Python module first: your own architectures and adapters",
    )
    common.add_argument("--debug", action="store_true", help="show tracebacks")

    parser = _Parser(
        prog="hf-llfc",
        description="Align, merge and diagnose fine-tuned Hugging Face checkpoints, layer by layer.",
        epilog="A model is a Hub id, id@revision, or a local folder. More: README.md and docs/.",
    )
    parser.add_argument("--version", action="version", version=f"hf-llfc {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, handler: Handler, summary: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, parents=[common], help=summary, description=summary + ".")
        added.set_defaults(handler=handler)
        return added

    inspect = command("inspect", _inspect, "the permutation spec of a model as a table")
    inspect.add_argument("model", metavar="MODEL")
    inspect.add_argument("--verify", action="store_true", help="check on the real weights that the symmetries hold")
    inspect.add_argument("--all", action="store_true", help="one row a tensor, layers not folded")
    inspect.add_argument("--seed", type=int, default=0)
    inspect.add_argument("--trust-remote-code", action="store_true")

    check = command("check", _check, "may these two be merged, as they are or aligned?")
    check.add_argument("a", metavar="A")
    check.add_argument("b", metavar="B")
    check.add_argument(
        "--level",
        type=int,
        choices=(0, 1, 2),
        help="how far to look: 0 configs and headers, 1 weights, 2 features (default: 2 with data, 1 without)",
    )
    check.add_argument("--seed", type=int, default=0)
    _add_data(check, purpose="a few samples for level 2; labels are not looked at")

    align = command("align", _align, "B as an ordinary checkpoint in A's coordinates")
    align.add_argument("model", metavar="B")
    align.add_argument("--to", required=True, metavar="A", help="the reference, which stays")
    align.add_argument("--out", required=True, metavar="DIR")
    align.add_argument("--use", metavar="FILE", help="apply this alignment file instead of matching")
    align.add_argument("--overwrite", action="store_true")
    _add_matching(align, default="weight_matching")
    _add_data(align, purpose="calibration data for activation matching")

    merge = command("merge", _merge, "merge models into a new folder")
    merge.add_argument("models", nargs="+", metavar="MODEL")
    merge.add_argument("--weights", type=float, nargs="+", metavar="W", help="one a model; equal weights without it")
    merge.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="divide the weights by their sum, or take them although their sum is not one",
    )
    merge.add_argument("--merge-method", default="linear", help="linear or task_arithmetic")
    merge.add_argument("--base-model", metavar="MODEL", help="the base of task arithmetic")
    merge.add_argument("--dtype", help="of the result; that of the first model without it")
    merge.add_argument("--out", required=True, metavar="DIR")
    merge.add_argument("--overwrite", action="store_true")
    merge.add_argument("--dry-run", action="store_true", help="print the plan and its cost, do nothing")
    _add_matching(merge, default="none")
    _add_data(merge, purpose="calibration data for activation matching")

    diagnose = command("diagnose", _diagnose, "loss, metric and features between models, layer by layer")
    diagnose.add_argument("models", nargs="+", metavar="MODEL", help="two: the line from A to B; more: the simplex")
    diagnose.add_argument("--weights", type=float, nargs="+", metavar="W", help="of the merge of more than two models")
    diagnose.add_argument("--base-model", metavar="MODEL", help="add and negate task vectors over this model")
    diagnose.add_argument("--alphas", type=int, default=11, help="how many steps of the path, ends included")
    diagnose.add_argument("--heads", choices=HEADS, default="own", help="first: compare models of different tasks")
    diagnose.add_argument(
        "--layers",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="modules to compare instead of the blocks, or: attention, mlp, pre_activations",
    )
    diagnose.add_argument("--unit", choices=UNITS, default="sample", help="one feature vector a sample or a token")
    diagnose.add_argument("--measures", nargs="+", default=[], choices=MEASURES, help="what else to measure on a pair")
    diagnose.add_argument(
        "--suggest", choices=SUGGESTIONS, help="look for better weights: one a model, or one a model and layer"
    )
    diagnose.add_argument(
        "--offload", action="store_true", help="read weights when a module runs, for models larger than memory"
    )
    diagnose.add_argument("--out", metavar="DIR", help="folder for report and plots")
    diagnose.add_argument("--overwrite", action="store_true")
    _add_matching(diagnose, default="none")
    _add_data(diagnose, purpose="data to measure on")

    run = command("run", _run, "a recipe, from parents to card")
    run.add_argument("recipe", metavar="RECIPE", help="YAML file")
    run.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="values that replace those of the recipe"
    )
    run.add_argument("--dry-run", action="store_true", help="print the plan and its cost, do nothing")

    push = command("push", _push, "an output folder to the Hub, with its card")
    push.add_argument("folder", metavar="DIR")
    push.add_argument("repo_id", metavar="REPO_ID")
    push.add_argument("--private", action="store_true", default=None)
    push.add_argument("--create-pr", action="store_true")
    push.add_argument("--revision", help="branch to push to")
    push.add_argument("--force", action="store_true", help="push although the verdict or the sanity check says no")

    demo = command("demo", _demo, "the main job on data and models that need no network")
    demo.add_argument("--out", default="demo", metavar="DIR", help="folder to write (default: demo)")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--overwrite", action="store_true")
    return parser


def _add_matching(parser: argparse.ArgumentParser, *, default: str) -> None:
    group = parser.add_argument_group("alignment")
    flag = "--method" if parser.prog.endswith(" align") else "--align"
    group.add_argument(flag, dest="method", choices=ALIGNMENT_METHODS, default=default, help=f"default: {default}")
    group.add_argument("--axes", nargs="+", default=[], metavar="PATTERN", help="axes that may move (all)")
    group.add_argument("--exclude", nargs="+", default=[], metavar="PATTERN", help="axes that stay (residual, say)")
    group.add_argument("--start", choices=STARTS, default="identity")
    group.add_argument("--restarts", type=int, default=2, help="starts of weight matching; the best wins")
    group.add_argument("--max-sweeps", type=int, default=50)
    group.add_argument("--seed", type=int, default=0)


def _add_data(parser: argparse.ArgumentParser, *, purpose: str) -> None:
    group = parser.add_argument_group("data", purpose)
    group.add_argument("--dataset", help="Hub id, or a local csv, json, parquet, text file or folder")
    group.add_argument("--task", help="text-classification, text-generation, fill-mask or image-classification")
    for name in (
        "name",
        "split",
        "text-column",
        "text-pair-column",
        "label-column",
        "image-column",
        "tokenizer",
        "metric",
    ):
        group.add_argument(f"--{name}", dest=name.replace("-", "_"))
    for name in ("samples", "batch-size", "max-length"):
        group.add_argument(f"--{name}", dest=name.replace("-", "_"), type=int)


MATCHING_OPTIONS = ("axes", "exclude", "start", "restarts", "max_sweeps")

_DATA_FIELDS = (
    "task", "dataset", "name", "split", "text_column", "text_pair_column", "label_column", "image_column", "tokenizer",
    "metric", "samples", "batch_size", "max_length",
)  # fmt: skip


def _data_settings(options: argparse.Namespace) -> dict[str, Any]:
    return {field: value for field in _DATA_FIELDS if (value := vars(options)[field]) is not None}


def _evaluation_config(options: argparse.Namespace, *, required: bool) -> EvaluationConfig | None:
    from hf_llfc.errors import EvaluationError
    from hf_llfc.evaluation import EvaluationConfig

    settings = _data_settings(options)
    if not settings and not required:
        return None
    missing = [f"--{field}" for field in ("task", "dataset") if field not in settings]
    if missing:
        raise EvaluationError(f"{' and '.join(missing)} must be given to know what to measure on")
    return EvaluationConfig(**settings, seed=options.seed)


def _refuse_given(options: argparse.Namespace, names: Sequence[str], because: str) -> None:
    """Nothing that a user wrote is ignored: options that have no effect here are an error."""
    from hf_llfc.errors import RecipeError
    from hf_llfc.recipe import AlignSection

    unset = vars(AlignSection())
    given = [name for name in names if vars(options)[name] and vars(options)[name] != unset.get(name)]
    if given:
        raise RecipeError(f"{', '.join('--' + name.replace('_', '-') for name in given)}: has no meaning {because}")


def _refuse_unused_data(options: argparse.Namespace) -> None:
    """Data are for activations."""
    if "activation_matching" not in (options.method, options.start):
        _refuse_given(options, _DATA_FIELDS, "without activation matching, which alone looks at data")


def _align_section(options: argparse.Namespace, *, calibration: EvaluationConfig | None) -> AlignSection:
    from hf_llfc.recipe import AlignSection

    return AlignSection(
        method=options.method,
        axes=tuple(options.axes),
        exclude=tuple(options.exclude),
        start=options.start,
        restarts=options.restarts,
        max_sweeps=options.max_sweeps,
        seed=options.seed,
        calibration=calibration,
    )


def _inspect(options: argparse.Namespace) -> int:
    from hf_llfc.api import inspect
    from hf_llfc.console import fold_layers, print_json, print_table

    found = inspect(
        options.model, verify=options.verify, seed=options.seed, trust_remote_code=options.trust_remote_code
    )
    axes = [
        {"axis": axis.name, "size": axis.size, "depends on": axis.parent, "symmetric": axis.symmetric}
        for axis in found.spec.axes.values()
    ]
    if options.format == "json":
        print_json(
            {
                "model": found.model,
                "model_type": found.model_type,
                "architecture": found.architecture,
                "spec": found.spec.origin,
                "notes": list(found.spec.notes),
                "parameters": found.parameters,
                "symmetric_axes": list(found.symmetric_axes),
                "axes": axes,
                "tensors": list(found.tensors),
                "verification": found.verification,
            }
        )
    else:
        rows = [
            {**row, "symmetric": " ".join(row["symmetric"]), "shape": "×".join(map(str, row["shape"]))}
            for row in found.tensors
        ]
        kind = found.architecture or found.model_type
        title = f"{found.model}: {kind}, {found.parameters:,} parameters, {found.spec.origin} spec"
        print_table(
            title, rows if options.all else fold_layers(rows), columns=("tensor", "shape", "dtype", "axes", "symmetric")
        )
        for note in found.spec.notes:
            print(f"{found.spec.origin} spec: {note}")
        if found.verification is not None:
            sentence = "the symmetries hold" if found.verification["verified"] else "THE SYMMETRIES DO NOT HOLD"
            print(
                f"verification: a random transform of every symmetric axis changes the logits by "
                f"{found.verification['change']:.1e} (float noise {found.verification['noise']:.1e}): {sentence}"
            )
    return 0 if found.verification is None or found.verification["verified"] else 1


def _check(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from hf_llfc.api import check
    from hf_llfc.console import print_json, print_table, progress_bars

    _refuse_given(options, ("label_column", "metric"), "for check, which looks at no labels")
    data = _evaluation_config(options, required=options.level == 2)
    with progress_bars(shown=not options.quiet) as progress:
        result = check(options.a, options.b, level=options.level, data=data, seed=options.seed, progress=progress)
    if options.format == "json":
        print_json(asdict(result))
    else:
        state = " after weight matching" if result.aligned else ""
        if result.tensors:
            print_table("tensors farthest apart", [asdict(row) for row in result.tensors])
        if result.layers:
            rows = [{"layer": row.layer, **_means(row)} for row in result.layers]
            print_table(f"layers at the midpoint{state}", rows)
        if result.criteria:
            print_table(f"what decides{state}", [asdict(criterion) for criterion in result.criteria])
        print(f"{result.answer}: {result.because}")
        for problem in result.problems:
            print(f"  - {problem}")
    return 0 if result.answer in ("merge", "undecided") else 1


def _means(row: LayerRow) -> dict[str, float | None]:
    return {
        "llfc": row.llfc.mean,
        "baseline": row.baseline.mean,
        "ratio": row.ratio,
        "coefficient": row.coefficient.mean,
    }


def _align(options: argparse.Namespace) -> int:
    from hf_llfc.commands import write_aligned
    from hf_llfc.console import print_json, print_table, progress_bars
    from hf_llfc.stages import alignment_summary

    _refuse_unused_data(options)
    if options.use is not None:
        names = ("method", *MATCHING_OPTIONS, "seed", *_DATA_FIELDS)
        _refuse_given(options, names, "with --use, which matches nothing")
    settings = _align_section(options, calibration=_evaluation_config(options, required=False))
    with progress_bars(shown=not options.quiet) as progress:
        alignment = write_aligned(
            options.model,
            to=options.to,
            out=options.out,
            options=settings,
            file=options.use,
            overwrite=options.overwrite,
            progress=progress,
        )
    if not _is_main_process():
        return 0
    summary = alignment_summary(alignment)
    if options.format == "json":
        print_json({"out": options.out, **summary})
    else:
        print_table(f"{options.model} in the coordinates of {options.to}: {options.out}", summary["axes"])
    return 0


def _matching_section(options: argparse.Namespace) -> dict[str, Any]:
    section: dict[str, Any] = {"method": options.method}
    if options.method != "none":
        section |= {
            "start": options.start,
            "restarts": options.restarts,
            "max_sweeps": options.max_sweeps,
            "seed": options.seed,
        }
        section |= {name: vars(options)[name] for name in ("axes", "exclude") if vars(options)[name]}
        if data := _data_settings(options):
            section["calibration"] = data
    return section


def _merge(options: argparse.Namespace) -> int:
    from hf_llfc.errors import RecipeError
    from hf_llfc.recipe import load_recipe

    if options.method == "none":
        _refuse_given(options, (*MATCHING_OPTIONS, "seed"), "without --align")
    _refuse_unused_data(options)
    weights = options.weights or [1 / len(options.models)] * len(options.models)
    if len(weights) != len(options.models):
        raise RecipeError(f"{len(weights)} weights for {len(options.models)} models; give one weight a model")
    recipe: dict[str, Any] = {
        "models": [
            {"model": model, "parameters": {"weight": weight}}
            for model, weight in zip(options.models, weights, strict=True)
        ],
        "merge_method": options.merge_method,
        "align": _matching_section(options),
        "output_dir": options.out,
        "overwrite": options.overwrite,
    }
    if options.base_model:
        recipe["base_model"] = options.base_model
    if options.dtype:
        recipe["dtype"] = options.dtype
    if options.normalize is not None:
        recipe["parameters"] = {"normalize": options.normalize}
    return _run_recipe(load_recipe(recipe), options)


def _diagnose(options: argparse.Namespace) -> int:
    from hf_llfc.commands import write_diagnosis
    from hf_llfc.console import progress_bars
    from hf_llfc.errors import EvaluationError
    from hf_llfc.recipe import DiagnoseSection

    if options.method == "none":
        _refuse_given(options, MATCHING_OPTIONS, "without --align")
    data = _evaluation_config(options, required=True)
    assert data is not None
    settings = _align_section(options, calibration=data)
    if options.alphas < 3:
        raise EvaluationError(f"--alphas must be at least 3, both ends and one point between, not {options.alphas}")
    if len(options.models) == 2 and options.weights and not options.base_model:
        raise EvaluationError("--weights has no meaning for a line, which is measured at every weight; see --alphas")
    section = DiagnoseSection(
        data,
        tuple(step / (options.alphas - 1) for step in range(options.alphas)),
        tuple(options.layers),
        options.unit,
        tuple(options.measures),
        options.suggest,
        options.offload,
    )
    with progress_bars(shown=not options.quiet) as progress:
        report = write_diagnosis(
            options.models,
            section,
            align=settings,
            weights=options.weights,
            base_model=options.base_model,
            heads=options.heads,
            out=options.out,
            overwrite=options.overwrite,
            progress=progress,
        )
    if _is_main_process():
        _show_report(report, options)
    return 0


def _run(options: argparse.Namespace) -> int:
    from hf_llfc.recipe import load_recipe

    return _run_recipe(load_recipe(options.recipe, options.overrides), options)


def _run_recipe(recipe: Recipe, options: argparse.Namespace) -> int:
    from hf_llfc.console import format_bytes, print_json, print_table, progress_bars

    if options.dry_run:
        from hf_llfc.planning import plan

        planned = plan(recipe)
        if not _is_main_process():
            return 0
        if options.format == "json":
            print_json(planned)
        else:
            cost = {
                "read": planned["cost"]["bytes_read"],
                "written": planned["cost"]["bytes_written"],
                "memory for tensors": planned["cost"]["peak_memory_bytes"],
            }
            print_table("plan", planned["steps"])
            print_table("cost", [{name: format_bytes(count) for name, count in cost.items()}])
        return 0
    from hf_llfc.pipeline import run

    with progress_bars(shown=not options.quiet) as progress:
        result = run(recipe, progress=progress)
    if not result.is_main_process:
        return 0
    if options.format == "json":
        print_json(result.to_dict())
        return 0
    rows = [
        {"model": row["id"], **{name: row[name] for name in ("loss",) if name in row}, **row.get("metrics", {})}
        for row in result.table
    ]
    if any("loss" in row for row in rows):
        print_table("models on the same data", rows)
    for summary in result.alignments:
        print(summary["sentence"])
    if result.report is not None:
        _show_report(result.report, options)
    print(f"merged checkpoint: {result.folder}")
    if result.url:
        print(f"on the Hub: {result.url}")
    return 0


def _show_report(report: ConnectivityReport, options: argparse.Namespace) -> None:
    from hf_llfc.console import print_json, print_table
    from hf_llfc.publishing.tables import report_tables

    if options.format == "json":
        print_json(report.to_dict())
        return
    for table in report_tables(report):
        print_table(table.title, table.rows, numbers=table.numbers)
    if report.suggestion is not None:
        print(f"suggestion: {report.suggestion.because}")
    print(f"verdict: {report.verdict.answer}: {report.verdict.because}")


def _push(options: argparse.Namespace) -> int:
    from hf_llfc.console import print_json
    from hf_llfc.publishing import publish

    url = publish(
        options.folder,
        options.repo_id,
        private=options.private,
        create_pr=options.create_pr,
        revision=options.revision,
        force=options.force,
    )
    if options.format == "json":
        print_json({"url": url})
    else:
        print(url)
    return 0


def _demo(options: argparse.Namespace) -> int:
    from hf_llfc.console import print_json, print_table, progress_bars
    from hf_llfc.demo import run_demo

    with progress_bars(shown=not options.quiet) as progress:
        result = run_demo(options.out, seed=options.seed, overwrite=options.overwrite, progress=progress)
    if options.format == "json":
        print_json(result)
    else:
        print_table("midpoint of two models, before and after alignment", result["rows"])
        for sentence in result["sentences"]:
            print(sentence)
    return 0


def _quiet_libraries(*, verbose: bool) -> None:
    """The libraries' own banners and bars would bury ours."""
    form = "%(name)s: %(message)s" if verbose else "hf-llfc: warning: %(message)s"
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format=form)
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
    if not verbose:
        for chatty in ("huggingface_hub.utils._http", "huggingface_hub._snapshot_download"):
            logging.getLogger(chatty).setLevel(logging.ERROR)  # every retry; what it ends in is an error of ours
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
        logging.getLogger("datasets").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=FutureWarning)


if __name__ == "__main__":
    sys.exit(main())
