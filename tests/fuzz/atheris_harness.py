"""Guided fuzzing of one target with atheris, which looks for inputs that reach new code.

python -m tests.fuzz.atheris_harness TARGET [FOLDER] [-runs=N] [-max_total_time=SECONDS]

TARGET is one of those of tests/fuzz/targets.py; the inputs that were worth keeping lie in FOLDER.
"""

import sys

import atheris

with atheris.instrument_imports(include=["hf_llfc"]):
    from tests.fuzz import targets
    from tests.fuzz.test_fuzz import VALID


def main() -> None:
    name = sys.argv.pop(1)
    if name in targets.BYTES:
        starts = [VALID[name](), b""]
        run = targets.BYTES[name]
    else:
        starts = [b"(kv.0 q.0[kv] head_dim) residual + 3", b"models.0.parameters.weight=0.3"]
        target = targets.TEXTS[name]

        def run(content: bytes) -> None:
            target(content.decode("utf-8", "replace"))

    for start in starts:
        run(start)
    # The fuzzer starts from the valid content, of which it changes bytes.
    atheris.Setup(sys.argv, lambda content: run(content), enable_python_coverage=True)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
