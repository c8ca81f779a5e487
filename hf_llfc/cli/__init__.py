"""The command line: `hf-llfc …`, which is also `hf llfc …` as an extension of the Hub's own client.

stdout carries data, stderr messages and progress. Exit codes: 0 done, 1 the answer is no (`check`, `inspect --verify`),
2 the input is at fault, 130 interrupted.
"""

from __future__ import annotations

import io
import os
import sys
from importlib import import_module

from hf_llfc.cli.arguments import parse
from hf_llfc.errors import LLFCError, ProcessError

TYPE_CHECKING = False
if TYPE_CHECKING:  # as in hf_llfc.foundation.lazy: `--help` loads nothing that it does not need
    import argparse
    from collections.abc import Sequence

# What the processes of a launcher do together; anything else the main one does alone.
SHARED_COMMANDS = ("align", "merge", "extract", "diagnose", "run")

# What of its options a command that takes long reads first: it is named before what computes is loaded, which takes
# seconds.
READ_FIRST = {
    "align": ("to", "model"),
    "check": ("a", "b"),
    "demo": (),
    "diagnose": ("models",),
    "extract": ("base", "finetuned"),
    "merge": ("models",),
    "run": ("recipe",),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: The command line; `sys.argv` where None.

    Returns:
        The exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a letter that the terminal has not must not end what works
            stream.reconfigure(errors="backslashreplace" if stream is sys.stderr else "replace")
    options = parse(arguments)
    if not is_main_process() and options.command not in SHARED_COMMANDS:
        return 0
    _quiet_libraries(verbose=options.verbose)
    _stop_as_interrupted()
    try:
        from hf_llfc.parallel.threads import wait_asleep  # `--help` waits for nothing that it does not need

        wait_asleep()
        if options.command == "run":
            os.environ.update(options.environment)
        _announce(options)
        _import_modules(options.imports)
        return int(import_module(f"hf_llfc.cli.{options.command.replace('-', '_')}").execute(options))
    except ProcessError as error:
        # Where the main process is the one that is gone, the next one speaks.
        speaks = is_main_process() or (error.rank == 0 and os.environ.get("RANK") == "1")
        return _report_error(str(error), options, speaks=speaks)
    except LLFCError as error:
        return _report_error(str(error), options)
    except KeyboardInterrupt:
        if is_main_process():
            print("hf-llfc: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except OSError as error:  # a full disk, say
        if options.debug:
            raise
        what = ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)
        return _report_error(f"{what}; run again with --debug to see where", options)
    except Exception as error:
        if options.debug:
            raise
        what = f"unexpected {type(error).__name__}: {error}"
        return _report_error(f"{what}; run again with --debug for the traceback", options)


def run_main(arguments: Sequence[str] | None = None) -> int:
    """`python -m hf_llfc`: a recipe among the arguments, and no command, runs it."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] != "run" and any(word.endswith((".yaml", ".yml")) for word in words):
        words.insert(0, "run")
    return main(words)


def _import_modules(names: Sequence[str]) -> None:
    """Imports modules by name, or files by path, whose folder does not join the import path."""
    for name in names:
        try:
            _import_file(name) if name.endswith(".py") else import_module(name)
        except (ImportError, OSError, TypeError, ValueError) as error:
            file = f"{name.replace('.', '/')}.py"
            hint = f"; the file is imported by --import {file}" if os.path.isfile(file) else ""
            raise LLFCError(f"--import {name}: cannot be imported: {error}{hint}") from None


def _import_file(path: str) -> None:
    from importlib.util import module_from_spec, spec_from_file_location

    name = os.path.basename(path).removesuffix(".py")
    path = os.path.realpath(path)
    if any(getattr(module, "__file__", None) == path for module in list(sys.modules.values())):
        return
    if name in sys.modules or name in sys.stdlib_module_names:
        raise ImportError(f"another module is called {name!r}; give the file another name")
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("it is no Python file")
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


def is_main_process() -> bool:
    """Whether this is the one of a launcher's processes that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def _announce(options: argparse.Namespace) -> None:
    """Says at once what is going to be read."""
    if options.command not in READ_FIRST or options.quiet or not is_main_process():
        return
    values = [vars(options)[name] for name in READ_FIRST[options.command]]
    names = [name for value in values for name in (value if isinstance(value, list) else [value]) if name is not None]
    what = f"reading {', '.join(names)}" if names else "loading scikit-learn's digits and transformers"
    print(f"hf-llfc: {what}", file=sys.stderr, flush=True)
    for note in options.notes if options.command == "run" else ():
        print(f"hf-llfc: {note}", file=sys.stderr, flush=True)


def _stop_as_interrupted() -> None:
    """Lets a termination clean up as an interrupt from the keyboard does."""
    import signal
    import threading

    if threading.current_thread() is threading.main_thread():  # no other may
        signal.signal(signal.SIGTERM, _stop)


def _stop(number: int, frame: object) -> None:
    """Says why a run ends; a launcher stops all its processes when one of them has ended."""
    if is_main_process():
        launched = ": another process of the launcher ended, or the launcher was stopped" if _is_launched() else ""
        # What is kept for a next run, if anything is, whoever writes it says.
        print(f"hf-llfc: stopped by a signal{launched}", file=sys.stderr, flush=True)
    sys.exit(128 + number)


def _is_launched() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _report_error(message: str, options: argparse.Namespace, *, speaks: bool | None = None) -> int:
    """Prints an error, once for all processes, and gives the exit code.

    Args:
        message: The whole message.
        options: Of the command.
        speaks: Whether this process prints it; where None, the main one does.
    """
    if is_main_process() if speaks is None else speaks:
        if options.format == "json":
            from hf_llfc.cli.console import print_json

            print_json({"error": message})
        print(f"hf-llfc: error: {message}", file=sys.stderr)
    return 2


def _quiet_libraries(*, verbose: bool) -> None:
    """The libraries' own banners and bars would bury ours."""
    import logging
    import warnings

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
