"""The words of the command line."""

from __future__ import annotations

import argparse
import json
import re
import sys

from hf_llfc.errors import suggest
from hf_llfc.foundation.choices import COMPARED, HEADS
from hf_llfc.foundation.version import __version__

TYPE_CHECKING = False
if TYPE_CHECKING:  # as in hf_llfc.foundation.lazy: `--help` loads nothing that it does not need
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any

    from hf_llfc.cli.mergekit_options import Translated
    from hf_llfc.recipe.options import Option

    Group = argparse._ActionsContainer

NAMES = {"output_dir": "out", "scale": "lambda"}
"""Options that have another name on the command line than their field."""

_NO_LABELS = "check looks at no labels"
LEFT_OUT: dict[tuple[str, str], dict[str, str]] = {
    ("merge", "Recipe"): {
        "models": "stand without an option",
        "parameters": "have options of their own: --weights, --normalize, --parameter",
        "align": "has options of its own",
        "calibrate": "has options of its own",
        "importance": "has options of its own",
        **dict.fromkeys(
            ("diagnose", "keep_where_broken", "publish", "layer_range", "slices", "modules", "document", "tokenizer"),
            "is a section of a recipe; see `run`",
        ),
    },
    ("merge", "AlignSection"): {"calibration": "has options of its own"},
    ("merge", "CalibrateSection"): {
        "data": "have options of their own",
        "targets": "needs data of every model, which a recipe has; see `run`",
    },
    ("align", "AlignSection"): {
        "calibration": "has options of its own",
        "reference": "is named by --to",
        "together": "align takes two models",
        "label_order": "an aligned model answers as before; `merge` and `diagnose` have it",
    },
    ("diagnose", "AlignSection"): {
        "calibration": "has options of its own",
        "reference": "the first model, or the base, stays",
    },
    ("diagnose", "DiagnoseSection"): {
        "data": "have options of their own",
        "batch_norm": "is a section of a recipe; see `run`",
    },
    ("check", "EvaluationConfig"): dict.fromkeys(("label_column", "label_map", "labels", "metric"), _NO_LABELS),
    ("push", "PublishSection"): {
        "repo_id": "stands without an option",
        "license": "the card that states it is written by then",
    },
}
"""Command and section → options that the command does not have, with the reason."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line; overrides of a recipe may stand anywhere, also before it and between options."""
    parser = _parser()
    given = list(sys.argv[1:] if arguments is None else arguments)
    translated = _of_mergekit(given, parser)
    options, rest = parser.parse_known_args(given if translated is None else translated.rest)
    unknown = [word for word in rest if options.command != "run" or word.startswith("-")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if options.command == "run":
        words = [options.recipe, *options.overrides, *rest]
        recipe = next((word for word in words if "=" not in word), words[0])
        words.remove(recipe)
        words = _with_folder(words, options)
        assert translated is not None
        words += translated.keys
        options.environment, options.notes = translated.environment, translated.notes
        # An option wins over a key, as the last word does elsewhere; JSON is YAML that keeps every text a text.
        values = {name: vars(options)[_dest(name)] for name in OF_A_RUN}
        words += [f"{name}={json.dumps(value)}" for name, value in values.items() if value is not None]
        options.recipe, options.overrides = recipe, words
    return options


def _of_mergekit(words: Sequence[str], parser: _Parser) -> Translated | None:
    """What mergekit's options among the words of `run` are here; None for other commands."""
    if "run" not in words:
        return None
    from hf_llfc.cli.mergekit_options import Translated

    translated = Translated(words)
    if translated.refused:
        parser.error(translated.refused)
    return translated


def _with_folder(words: Sequence[str], options: argparse.Namespace) -> list[str]:
    """Overrides, with a folder that stands behind the recipe, as mergekit has it, as that of the result."""
    from hf_llfc.recipe.options import options_of
    from hf_llfc.recipe.sections import Recipe

    folders = [word for word in words if "=" not in word and re.split("[.:]", word)[0] not in options_of(Recipe)]
    if len(folders) != 1 or options.out is not None:
        return list(words)
    return [f"output_dir={json.dumps(folders[0])}" if word == folders[0] else word for word in words]


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
        if adders:
            named = [action for action in self._actions if action.required and action.metavar]
            words = [" ".join([*action.option_strings[-1:], str(action.metavar)]) for action in named]
            self.usage = " ".join([self.prog, *sorted(words, key=lambda word: word.startswith("-")), "[options]"])

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        self.add_options()
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> None:  # type: ignore[override]
        wrong = re.match(r"(?:argument (\S+): invalid choice: '(.*?)'|unrecognized arguments: (-[^\s=]*))", message)
        hint = ""
        if wrong is not None and wrong[3]:
            from hf_llfc.cli.mergekit_options import explained

            owners = [command for command, options in self._options().items() if wrong[3] in options]
            known = [option for options in self._options().values() for option in options]
            elsewhere = f"; it is an option of {', '.join(owners)}" if owners else ""
            hint = explained(wrong[3]) or elsewhere or suggest(wrong[3], known)
        elif wrong is not None:
            hint = suggest(wrong[2], [name for action in self._actions for name in action.choices or ()])
        self.exit(2, f"hf-llfc: error: {message}{hint} (`{self.prog} --help` lists what there is)\n")

    def _options(self) -> dict[str, list[str]]:
        """All options by command."""
        commands = [action.choices for action in self._actions if isinstance(action.choices, dict)]
        parsers = {"hf-llfc": self, **{name: parser for choices in commands for name, parser in choices.items()}}
        for parser in parsers.values():
            parser.add_options()
        return {
            name: [option for action in parser._actions for option in action.option_strings]
            for name, parser in parsers.items()
        }


def _parser() -> _Parser:
    parser = _Parser(
        prog="hf-llfc",
        description="Align, merge and diagnose fine-tuned Hugging Face checkpoints, layer by layer.",
        epilog="A model is a Hub id, id@revision, or a local folder; model+adapter with an adapter of peft (LoRA, …). "
        "More: README.md and docs/.",
    )
    parser.add_argument("--version", action="version", version=f"hf-llfc {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (add, summary, example) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ("" if summary.endswith("?") else "."),
            epilog="example:\n  " + example.replace("\n", "\n  "),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.adders = (add, _add_common)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("messages")
    group.add_argument("--format", choices=("table", "json"), default="table", help="How the answer is printed.")
    group.add_argument("--quiet", action="store_true", help="Show no progress bars.")
    group.add_argument("-v", "--verbose", action="store_true", help="Log what is being done.")
    group.add_argument("--debug", action="store_true", help="Show tracebacks.")
    group.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="Import a Python module or a file (FILE.py) first: your own architectures and adapters.",
    )


def _dest(name: str) -> str:
    return NAMES.get(name, name)


def add_option(group: Group, each: Option, *flags: str, **settings: Any) -> None:
    """Adds one option as its description has it; its value is None where it is not given."""
    from collections.abc import Mapping, Sequence

    from hf_llfc.recipe.fitting import parts_of

    dest = _dest(each.name)
    names = flags or (*(["-o"] if dest == "out" else []), f"--{dest.replace('_', '-')}")
    kinds = parts_of(each.type)
    known = f" (one of: {', '.join(each.choices)})" if each.choices and each.metavar else ""
    default = f" (default: {each.default_words})" if not each.is_required and each.default is not False else ""
    settings = {"dest": dest, "help": f"{each.help}{known}{default}".replace("`", ""), **settings}
    if kinds == [bool]:
        action = argparse.BooleanOptionalAction if each.default is not False else "store_true"
        group.add_argument(*names, default=None, action=action, **settings)
        return
    if each.metavar:
        settings["metavar"] = each.metavar
    if each.reads is not None:
        settings["type"] = _numbers if tuple in kinds else str
    elif kinds == [tuple]:
        settings["nargs"] = "+"
    elif Mapping in kinds:
        settings |= {"type": _pairs, "metavar": "KEY=VALUE,…"}
    elif Sequence in kinds:
        settings["type"] = lambda text: text.split(",")
    elif int in kinds:
        settings["type"] = int if kinds == [int] else _whole_or_text
    elif kinds == [float]:
        settings["type"] = float
    group.add_argument(*names, choices=each.choices or None, **settings)


class _Joined(argparse.Action):
    """Values of one option, each of which may be several in a row."""

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        setattr(namespace, self.dest, [part for value in values for part in value])


def _numbers(text: str) -> list[float]:
    """Numbers with commas between them."""
    try:
        return [int(word) if word.strip().isdigit() else float(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid float value: {text!r}") from None


def _pairs(text: str) -> dict[str, str | int]:
    """Keys and values, with commas between the pairs."""
    pairs = [word.rpartition("=") for word in text.split(",")]
    if not all(key for key, _, _ in pairs):
        raise argparse.ArgumentTypeError(f"write KEY=VALUE,KEY=VALUE, not {text!r}")
    return {key: _whole_or_text(value) for key, _, value in pairs}


def _whole_or_text(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def _add_section(group: Group, command: str, section: str, *, without: Iterable[str] = ()) -> None:
    """Adds the options of a section; those that the command leaves out are known, to say why, and not shown."""
    from hf_llfc.recipe import sections
    from hf_llfc.recipe.options import options_of

    left_out = LEFT_OUT.get((command, section), {})
    for name, each in options_of(vars(sections)[section]).items():
        if name == "seed" or name in without or each.section is not None or (name in left_out and each.is_required):
            continue
        add_option(group, each, **({"help": argparse.SUPPRESS} if name in left_out else {}))


def _add_of_recipe(group: Group, *names: str, **settings: Any) -> None:
    """Adds options that recipes have at the top."""
    from hf_llfc.recipe.options import options_of
    from hf_llfc.recipe.sections import Recipe

    for name in names:
        add_option(group, options_of(Recipe)[name], **settings)


def _add_seed(parser: Group) -> None:
    parser.add_argument("--seed", type=int, help="Seed of all that is drawn at random. (default: 0)")


def _add_restart(group: Group) -> None:
    group.add_argument(
        "--restart", action="store_true", help="Discard what an interrupted run into the same folder had finished."
    )


def _add_dry_run(group: Group) -> None:
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="Print the plan, its cost and what sets the models apart; do nothing.",
    )
    group.add_argument(
        "--compare",
        choices=COMPARED,
        help="Of which tensors a dry run compares the models' changes of their base; none reads no weights. "
        "(default: sample)",
    )


def _add_output(parser: argparse.ArgumentParser, *names: str, required: bool) -> Group:
    """What every command has that reads checkpoints and writes a folder."""
    group = parser.add_argument_group("output")
    _add_of_recipe(group, "output_dir", required=required)
    _add_of_recipe(group, "overwrite", *names)
    _add_restart(group)
    return group


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--verify", action="store_true", help="Check on the real weights that the symmetries hold.")
    parser.add_argument("--all", action="store_true", help="Show one row a tensor, layers not folded.")
    parser.add_argument("--trust-remote-code", action="store_true", help="Run code that comes with the checkpoint.")
    _add_of_recipe(parser, "allow_pickle")
    _add_seed(parser)


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="The first model; alone, a recipe (a YAML file).")
    parser.add_argument("b", metavar="B", nargs="?", help="The second model.")
    parser.add_argument(
        "--level",
        type=int,
        choices=(0, 1, 2),
        help="How far to look: 0 configs and headers, 1 weights, 2 features. (default: 2 with data, else 1)",
    )
    _add_of_recipe(parser, "allow_pickle")
    _add_seed(parser)
    _add_data(parser, "check", "a few samples for level 2; labels are not looked at")


def _add_align(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="B")
    parser.add_argument("--to", required=True, metavar="A", help="The reference, which stays.")
    parser.add_argument("--use", metavar="FILE", help="Apply this alignment file instead of matching.")
    _add_of_recipe(parser, "allow_pickle", "device")
    _add_seed(parser)
    _add_output(parser, required=True)
    _add_matching(parser, "align", "--method", default="weight_matching")
    _add_data(parser, "align", CALIBRATION)


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL")
    _add_of_recipe(parser, "allow_pickle", "device", "max_memory")
    _add_dry_run(parser)
    _add_seed(parser)
    group = parser.add_argument_group("merge")
    _add_of_recipe(group, "merge_method", "base_model", "tokenizer_source", "chat_template", "tie_word_embeddings")
    _add_of_recipe(group, "trust_remote_code", "override_architecture", "prove")
    _add_weights(group, "One weight a model. (default: equal weights)")
    group.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="Divide the weights by their sum: the default of linear; other methods take them as they are.",
    )
    group.add_argument(
        "--parameter",
        dest="parameters",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="Parameter of the merge method (lambda=0.5, density=0.5); may be given several times.",
    )
    output = _add_output(parser, "dtype", "out_dtype", "max_shard_size", required=True)
    _add_of_recipe(output, "log_with", "logging_dir")
    _add_of_recipe(parser.add_argument_group("an adapter as the result"), "save_as", "rank", "max_error")
    _add_matching(parser, "merge", "--align", default="none")
    _add_data(parser, "merge", CALIBRATION_OR_IMPORTANCE, without=("trust_remote_code",))
    _add_calibration(parser)


def _add_extract(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE")
    parser.add_argument("finetuned", metavar="FINETUNED")
    rank = "Rank of the adapter, or auto: the smallest that loses nothing. Give this or --max-error."
    _add_of_recipe(parser, "rank", help=rank)
    _add_of_recipe(parser, "max_error", "allow_pickle", "trust_remote_code", "device")
    _add_dry_run(parser)
    _add_seed(parser)
    output = _add_output(parser, "dtype", required=True)
    _add_of_recipe(output, "log_with", "logging_dir")
    _add_data(
        parser, "extract", "data that base, fine-tune and adapter are measured on", without=("trust_remote_code",)
    )


def _add_diagnose(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help="Two: the line from A to B; more: the simplex.")
    _add_of_recipe(parser, "allow_pickle", "device")
    _add_seed(parser)
    group = parser.add_argument_group("diagnosis")
    _add_weights(group, "Weights of the merge of more than two models, or of task vectors. (default: equal weights)")
    _add_of_recipe(group, "base_model", help="Add and negate task vectors over this model. (default: none)")
    group.add_argument(
        "--heads", choices=HEADS, default="own", help="first: compare models of different tasks. (default: own)"
    )
    _add_section(group, "diagnose", "DiagnoseSection")
    output = _add_output(parser, required=False)
    _add_of_recipe(output, "log_with", "logging_dir")
    _add_matching(parser, "diagnose", "--align", default="none")
    _add_data(parser, "diagnose", "data to measure on")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file.")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="Values that replace those of the recipe; DIR is short for output_dir=DIR.",
    )
    _add_of_recipe(parser, *OF_A_RUN)
    _add_restart(parser)
    _add_dry_run(parser)


def _add_push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("repo_id", metavar="REPO_ID")
    _add_section(parser, "push", "PublishSection")
    parser.add_argument(
        "--force",
        action="store_true",
        help="Push although verdict, sanity check or a parent's terms say no, or over weights of others.",
    )
    parser.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="PATTERN",
        help="Push these files too, although no run wrote them.",
    )


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--out", default="demo", metavar="DIR", help="The folder to write. (default: demo)")
    _add_of_recipe(parser, "overwrite")
    _add_seed(parser)


def _add_nothing(parser: argparse.ArgumentParser) -> None:
    pass


def _add_weights(group: Group, help: str) -> None:
    group.add_argument("--weights", type=_numbers, nargs="+", action=_Joined, metavar="W", help=help)


def _add_matching(parser: argparse.ArgumentParser, command: str, flag: str, *, default: str) -> None:
    from hf_llfc.recipe.options import options_of
    from hf_llfc.recipe.sections import AlignSection

    group = parser.add_argument_group("alignment")
    method = options_of(AlignSection)["method"]
    group.add_argument(
        flag, dest="method", choices=method.choices, default=default, help=f"{method.help} (default: {default})"
    )
    _add_section(group, command, "AlignSection", without=("method",))


def _add_data(parser: argparse.ArgumentParser, command: str, purpose: str, without: Iterable[str] = ()) -> None:
    from hf_llfc.recipe.options import options_of
    from hf_llfc.recipe.sections import EvaluationConfig

    group = parser.add_argument_group("data", purpose)
    for name in ("task", "dataset"):
        add_option(group, options_of(EvaluationConfig)[name])
    _add_section(group, command, "EvaluationConfig", without=("task", "dataset", *without))


def calibration_options() -> dict[str, tuple[str, Option]]:
    """Options of `merge` for the section `calibrate` and its data: where the value lies → its key, and the option."""
    from dataclasses import replace

    from hf_llfc.recipe.calibration import OF_LABELS
    from hf_llfc.recipe.options import options_of
    from hf_llfc.recipe.sections import CalibrateSection, EvaluationConfig

    left_out = {*LEFT_OUT["merge", "CalibrateSection"], *OF_LABELS, "labels", "seed", "trust_remote_code"}
    options = {**options_of(CalibrateSection), **options_of(EvaluationConfig)}
    shown = {
        name: each if each.choices else replace(each, metavar=each.metavar or name.upper())
        for name, each in options.items()
    }
    return {f"calibrate_{name}": (each.key, each) for name, each in shown.items() if name not in left_out}


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("calibration", "the merge fitted to its parents' features on unlabelled samples")
    group.add_argument("--calibrate", action="store_true", default=None, help="Calibrate the merge.")
    for dest, (_, each) in calibration_options().items():
        add_option(group, each, f"--{dest.replace('_', '-')}", dest=dest)


CALIBRATION = "calibration data for activation, commutativity and learned matching"
CALIBRATION_OR_IMPORTANCE = f"{CALIBRATION}, or for the methods fisher and feedback"

OF_A_RUN = ("output_dir", "overwrite", "allow_pickle", "device")
"""Keys of a recipe that `run` has options for too."""

COMMANDS = {
    "inspect": (
        _add_inspect,
        "the permutation spec of a model as a table",
        "hf-llfc inspect google-bert/bert-base-uncased --verify",
    ),
    "check": (
        _add_check,
        "may these two be merged, as they are or aligned? or the models of a recipe?",
        "hf-llfc check A B --task text-classification --dataset data.jsonl",
    ),
    "align": (_add_align, "B as an ordinary checkpoint in A's coordinates", "hf-llfc align B --to A --out aligned"),
    "merge": (
        _add_merge,
        "merge models into a new folder",
        "hf-llfc merge A B --weights 0.7 0.3 --align weight_matching --out merged",
    ),
    "extract": (
        _add_extract,
        "what a fine-tune changed of its base, as an adapter",
        "hf-llfc extract BASE FINETUNED --rank 32 --out adapter",
    ),
    "diagnose": (
        _add_diagnose,
        "loss, metric and features between models, layer by layer",
        "hf-llfc diagnose A B --task text-classification --dataset data.jsonl --out report",
    ),
    "run": (
        _add_run,
        "a recipe, from parents to card",
        "hf-llfc run recipe.yaml align.method=weight_matching --out merged",
    ),
    "push": (_add_push, "an output folder to the Hub, with its card", "hf-llfc push merged NAMESPACE/NAME --private"),
    "demo": (_add_demo, "the main job on data and models that need no network", "hf-llfc demo --out demo"),
    "register-extension": (
        _add_nothing,
        "let the Hub's own command find this one as `hf llfc`",
        "hf-llfc register-extension",
    ),
}
"""Name → what adds its options, its summary and an example. The module of that name in this package executes it."""
