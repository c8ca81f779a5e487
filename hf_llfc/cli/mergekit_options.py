"""The options of `mergekit-yaml`, and what `hf-llfc run` makes of each; docs/mergekit.md shows the same table."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:  # as in hf_llfc.foundation.lazy: `--help` loads nothing that it does not need
    from collections.abc import Sequence

WORKS, NOT_NEEDED, REFUSED = "works", "not needed", "refused"


class Answer:
    """What becomes of an option.

    Attributes:
        kind: `WORKS`, by what `becomes` says; `NOT_NEEDED`, it changes nothing here and the run goes on; or `REFUSED`.
        words: What it is here, or what to do instead.
        value: What its value is called; empty if it has none.
        becomes: The key of a recipe and its value, or a variable of the environment; `{}` is the option's value.
    """

    def __init__(self, kind: str, words: str, *, value: str = "", becomes: str = "") -> None:
        self.kind, self.words, self.value, self.becomes = kind, words, value, becomes


_IN_PARTS = "tensors are read, merged and written in parts; `max_memory` bounds them"
_WRITTEN = "weights are written as they are merged"

ANSWERS = {
    "--cuda": Answer(WORKS, "`--device cuda`", becomes="device=cuda"),
    "--gpu-rich": Answer(WORKS, "`--device cuda`; what else it stands for is not needed", becomes="device=cuda"),
    "--out-shard-size": Answer(WORKS, "`max_shard_size`, in bytes", value="SIZE", becomes="max_shard_size={}"),
    "--random-seed": Answer(WORKS, "`seed`", value="N", becomes="seed={}"),
    "--trust-remote-code": Answer(
        WORKS, "`trust_remote_code`, for all checkpoints of the recipe", becomes="trust_remote_code=true"
    ),
    "--num-threads": Answer(WORKS, "the environment variable OMP_NUM_THREADS", value="N", becomes="OMP_NUM_THREADS={}"),
    "--transformers-cache": Answer(
        WORKS, "the environment variable HF_HUB_CACHE", value="DIR", becomes="HF_HUB_CACHE={}"
    ),
    "--copy-tokenizer": Answer(NOT_NEEDED, "a tokenizer always goes with the result, see `tokenizer_source`"),
    "--write-model-card": Answer(NOT_NEEDED, "a card is always written"),
    "--safe-serialization": Answer(NOT_NEEDED, "weights are always written as safetensors"),
    "--lazy-unpickle": Answer(NOT_NEEDED, "weights are read by tensor; pickled ones need `--allow-pickle`"),
    "--low-cpu-memory": Answer(NOT_NEEDED, _IN_PARTS),
    "--read-to-gpu": Answer(NOT_NEEDED, _IN_PARTS),
    "--clone-tensors": Answer(NOT_NEEDED, "every tensor is written by itself"),
    "--async-write": Answer(NOT_NEEDED, _WRITTEN),
    "--write-threads": Answer(NOT_NEEDED, _WRITTEN, value="N"),
    "--lora-merge-cache": Answer(
        NOT_NEEDED, "adapters are folded as tensors are read, and nothing is kept on the disk", value="DIR"
    ),
    "--lora-merge-dtype": Answer(NOT_NEEDED, "adapters are folded in float32 or better", value="DTYPE"),
    "--multi-gpu": Answer(
        NOT_NEEDED,
        "a process computes on one device; start several by `torchrun --nproc-per-node N -m hf_llfc RECIPE`",
    ),
    "--allow-crimes": Answer(
        NOT_NEEDED, "models that do not fit each other are refused all the same; `hf-llfc check A B` says what differs"
    ),
    "--unsafe-truncate-embeddings": Answer(
        REFUSED, "`tokenizer_source=base` brings the rows of all models to one vocabulary, token by token"
    ),
    "--no-copy-tokenizer": Answer(REFUSED, "a tokenizer always goes with the result; delete its files if you must"),
    "--no-write-model-card": Answer(
        REFUSED, "README.md and llfc/ always say how the result was made; delete them if you must"
    ),
    "--no-safe-serialization": Answer(REFUSED, "weights are only written as safetensors"),
    "--load-in-4bit": Answer(REFUSED, "weights are merged as they are stored; quantise the result afterwards"),
    "--load-in-8bit": Answer(REFUSED, "weights are merged as they are stored; quantise the result afterwards"),
}
"""Option → what becomes of it. `--device`, `--quiet` and `-v` mean here what they mean there."""

_SHORT = {"-j": "--num-threads"}
_THOUSANDS = {"K": 10**3, "M": 10**6, "B": 10**9}


class Translated:
    """A command line of mergekit in words of ours.

    Attributes:
        rest: What is no option of mergekit.
        keys: `key=value` for a recipe.
        environment: Variables to set.
        notes: What is told about each option.
        refused: The message about those that cannot be; empty if there are none.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.rest: list[str] = []
        self.keys: list[str] = []
        self.environment: dict[str, str] = {}
        self.notes: list[str] = []
        refused = []
        queue = list(words)
        while queue:
            word = queue.pop(0)
            flag, equals, value = word.partition("=")
            flag = _SHORT.get(flag, flag)
            answer = ANSWERS.get(flag)
            if answer is None:
                positive = flag.replace("--no-", "--", 1)
                if flag.startswith("--no-") and positive in ANSWERS:
                    self.notes.append(f"{flag}: so it is without {positive}")
                else:
                    self.rest.append(word)
                continue
            if answer.value and not equals:
                value = queue.pop(0) if queue and not queue[0].startswith("-") else ""
            if answer.value and not value:
                refused.append(f"{flag}: needs a value, {answer.value}")
            elif answer.kind == REFUSED:
                refused.append(f"{flag}: {answer.words}")
            else:
                self._take(flag, answer, value)
        self.refused = "; ".join(refused)

    def _take(self, flag: str, answer: Answer, value: str) -> None:
        self.notes.append(f"{flag}: {'as ' if answer.kind == WORKS else 'not needed, '}{answer.words}")
        if answer.kind != WORKS:
            return
        name, _, _ = answer.becomes.partition("=")
        if name.isupper():
            self.environment[name] = value
        else:
            self.keys.append(answer.becomes.format(size_of(value) if name == "max_shard_size" else value))


def size_of(text: str) -> str:
    """A size as mergekit writes it (5B, 500M), in bytes; another as it is."""
    number, unit = text[:-1], text[-1:].upper()
    return str(int(number) * _THOUSANDS[unit]) if unit in _THOUSANDS and number.isdigit() else text


def explained(flag: str) -> str:
    """What to write for an option of mergekit, as the end of a message; empty for others."""
    answer = ANSWERS.get(flag)
    return f"; {flag} is mergekit's: {answer.words}" if answer is not None else ""
