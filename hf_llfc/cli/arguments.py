"""The words of the command line."""

from __future__ import annotations

import argparse
import re

from hf_llfc import __version__
from hf_llfc.errors import suggest
from hf_llfc.foundation.choices import (
    ALIGNMENT_METHODS,
    GROUPS,
    HEADS,
    MEASURES,
    SOLVERS,
    STARTS,
    SUGGESTIONS,
    TOGETHER,
    TRACKERS,
    UNITS,
)

TYPE_CHECKING = False
if TYPE_CHECKING:  # as in hf_llfc.foundation.lazy: `--help` loads nothing that it does not need
    from collections.abc import Callable, Sequence

MATCHING_OPTIONS = ("axes", "exclude", "groups", "together", "start", "restarts", "max_sweeps", "solver")

DATA_FIELDS = (
    "task", "dataset", "name", "split", "text_column", "text_pair_column", "label_column", "image_column", "tokenizer",
    "metric", "samples", "batch_size", "max_length",
)  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
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
    """Ends with one message that suggests the nearest command, option or value.

    Attributes:
        adders: What adds the options, called when the command is parsed: most commands never are.
    """

    adders: tuple[Callable[[argparse.ArgumentParser], None], ...] = ()

    def add_options(self) -> None:
        """Adds the options that are not there yet."""
        adders, self.adders = self.adders, ()
        for add in adders:
            add(self)

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        self.add_options()
        return super().parse_known_args(args, namespace)

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
        for parser in parsers:
            parser.add_options()
        return [option for parser in parsers for action in parser._actions for option in action.option_strings]


def _parser() -> _Parser:
    parser = _Parser(
        prog="hf-llfc",
        description="Align, merge and diagnose fine-tuned Hugging Face checkpoints, layer by layer.",
        epilog="A model is a Hub id, id@revision, or a local folder; model+adapter with an adapter of peft (LoRA, …). "
        "More: README.md and docs/.",
    )
    parser.add_argument("--version", action="version", version=f"hf-llfc {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (add, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary + ".")
        command.adders = (_add_common, add)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=("table", "json"), default="table", help="how the answer is printed")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--verbose", action="store_true", help="log what is being done")
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="import a Python module first: your own architectures and adapters",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def _add_pickle(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-pickle", action="store_true", help="open weights that are pickled, where you trust their author"
    )


def _add_trackers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--log-with", nargs="+", default=[], choices=TRACKERS, help="trackers of accelerate to log to as well"
    )
    parser.add_argument(
        "--logging-dir", default="runs", metavar="DIR", help="where trackers write that write files (default: runs)"
    )


def _add_restart(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--restart", action="store_true", help="discard what an interrupted run into the same folder had finished"
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    """What every command has that reads checkpoints and writes a folder."""
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier output")
    _add_restart(parser)
    _add_pickle(parser)
    parser.add_argument(
        "--device",
        help="where models run, matching multiplies and tensors are summed: auto, cpu, cuda, cuda:1 (default: models "
        "where accelerate puts them, all else on the processor)",
    )


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--verify", action="store_true", help="check on the real weights that the symmetries hold")
    parser.add_argument("--all", action="store_true", help="one row a tensor, layers not folded")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trust-remote-code", action="store_true")
    _add_pickle(parser)


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A")
    parser.add_argument("b", metavar="B")
    parser.add_argument(
        "--level",
        type=int,
        choices=(0, 1, 2),
        help="how far to look: 0 configs and headers, 1 weights, 2 features (default: 2 with data, 1 without)",
    )
    parser.add_argument("--seed", type=int, default=0)
    _add_pickle(parser)
    _add_data(parser, purpose="a few samples for level 2; labels are not looked at")


def _add_align(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="B")
    parser.add_argument("--to", required=True, metavar="A", help="the reference, which stays")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--use", metavar="FILE", help="apply this alignment file instead of matching")
    _add_output(parser)
    _add_matching(parser, default="weight_matching")
    _add_data(parser, purpose="calibration data for activation matching and learned matching")


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--weights", type=float, nargs="+", metavar="W", help="one a model; equal weights without it")
    parser.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="divide the weights by their sum: the default of linear; other methods take them as they are",
    )
    parser.add_argument(
        "--merge-method", default="linear", help="linear, task_arithmetic, or of mergekit ties, slerp, …"
    )
    parser.add_argument(
        "--parameter",
        dest="parameters",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the merge, for a method of mergekit (density=0.5)",
    )
    parser.add_argument("--base-model", metavar="MODEL", help="the base of task arithmetic, or of mergekit's methods")
    parser.add_argument("--dtype", help="of the result; that of the first model without it")
    parser.add_argument(
        "--tokenizer-source",
        metavar="MODEL",
        help="whose tokenizer and processor go with the result: a model, its place, base, or union of their "
        "vocabularies (default: 0, the first)",
    )
    parser.add_argument("--out", required=True, metavar="DIR")
    _add_output(parser)
    _add_trackers(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the plan and its cost, do nothing")
    _add_matching(parser, default="none")
    _add_data(parser, purpose="calibration data for activation matching and learned matching")


def _add_diagnose(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help="two: the line from A to B; more: the simplex")
    parser.add_argument("--weights", type=float, nargs="+", metavar="W", help="of the merge of more than two models")
    parser.add_argument("--base-model", metavar="MODEL", help="add and negate task vectors over this model")
    parser.add_argument("--alphas", type=int, default=11, help="how many steps of the path, ends included")
    parser.add_argument("--heads", choices=HEADS, default="own", help="first: compare models of different tasks")
    parser.add_argument(
        "--layers",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="modules to compare instead of the blocks, or: attention, mlp, pre_activations",
    )
    parser.add_argument("--unit", choices=UNITS, default="sample", help="one feature vector a sample or a token")
    parser.add_argument("--measures", nargs="+", default=[], choices=MEASURES, help="what else to measure on a pair")
    parser.add_argument(
        "--suggest", choices=SUGGESTIONS, help="look for better weights: one a model, or one a model and layer"
    )
    parser.add_argument(
        "--offload", action="store_true", help="read weights when a module runs, for models larger than memory"
    )
    parser.add_argument("--out", metavar="DIR", help="folder for report and plots")
    _add_output(parser)
    _add_trackers(parser)
    _add_matching(parser, default="none")
    _add_data(parser, purpose="data to measure on")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="values that replace those of the recipe"
    )
    _add_restart(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the plan and its cost, do nothing")


def _add_push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("repo_id", metavar="REPO_ID")
    parser.add_argument("--private", action="store_true", default=None, help="a new repository is private")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request on an existing repository")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to, made where it is missing")
    parser.add_argument("--tag", help="name the commit; a tag that names another one is refused")
    parser.add_argument(
        "--force",
        action="store_true",
        help="push although verdict, sanity check or a parent's terms say no, or over weights of others",
    )


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="demo", metavar="DIR", help="folder to write (default: demo)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true")


def _add_nothing(parser: argparse.ArgumentParser) -> None:
    pass


def _add_matching(parser: argparse.ArgumentParser, *, default: str) -> None:
    group = parser.add_argument_group("alignment")
    flag = "--method" if parser.prog.endswith(" align") else "--align"
    group.add_argument(flag, dest="method", choices=ALIGNMENT_METHODS, default=default, help=f"default: {default}")
    group.add_argument("--axes", nargs="+", default=[], metavar="PATTERN", help="axes that may move (all)")
    group.add_argument("--exclude", nargs="+", default=[], metavar="PATTERN", help="axes that stay (residual, say)")
    group.add_argument(
        "--groups", choices=GROUPS, default="permutation", help="full: all that the architecture allows, by its weights"
    )
    if flag == "--align":
        group.add_argument(
            "--together",
            choices=TOGETHER,
            default="reference",
            help="of more than two models: each onto the first, by way of a centre, or all at once",
        )
    group.add_argument("--start", choices=STARTS, default="identity")
    group.add_argument("--restarts", type=int, default=2, help="starts of weight matching; the best wins")
    group.add_argument("--max-sweeps", type=int, default=50)
    group.add_argument(
        "--solver", choices=SOLVERS, default="exact", help="auction: to within 1e-4 of the optimum, for very wide axes"
    )
    group.add_argument("--steps", type=int, help="of learned matching (500)")
    group.add_argument("--learning-rate", type=float, help="of learned matching (0.01)")
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


COMMANDS = {
    "inspect": (_add_inspect, "the permutation spec of a model as a table"),
    "check": (_add_check, "may these two be merged, as they are or aligned?"),
    "align": (_add_align, "B as an ordinary checkpoint in A's coordinates"),
    "merge": (_add_merge, "merge models into a new folder"),
    "diagnose": (_add_diagnose, "loss, metric and features between models, layer by layer"),
    "run": (_add_run, "a recipe, from parents to card"),
    "push": (_add_push, "an output folder to the Hub, with its card"),
    "demo": (_add_demo, "the main job on data and models that need no network"),
    "register-extension": (_add_nothing, "let the Hub's own command find this one as `hf llfc`"),
}
"""Name → what adds its options, and its summary. The module of that name in this package executes it."""
