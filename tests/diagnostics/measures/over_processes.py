"""Run by a launcher: takes all measures of a tiny pair and writes what each process found.

python -m torch.distributed.run --nproc-per-node 2 over_processes.py FOLDER
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch

from hf_llfc.diagnostics.measures.measures import run_measures, run_merge_measures
from hf_llfc.diagnostics.streaming import Execution
from hf_llfc.errors import EvaluationError
from hf_llfc.foundation.choices import MERGE_MEASURES, PAIR_MEASURES
from hf_llfc.parallel.processes import Processes
from tests.diagnostics.pairs import data_of, pair, subject_of


def measure(processes: Processes | None) -> dict:
    """All rows of measures of pairs, and of a merge, as JSON values."""
    models = pair("bert")
    data = data_of("bert", models[0].config, batch_size=3)
    found = run_measures(PAIR_MEASURES, *models, data, alphas=(0.25, 0.5), execution=Execution(processes))
    models = pair("gpt2")
    data = data_of("gpt2", models[0].config, count=23, batch_size=3)
    found |= run_merge_measures(MERGE_MEASURES, subject_of(models, (0.5, 0.5)), data, execution=Execution(processes))
    return {name: [dataclasses.asdict(row) for row in rows] for name, rows in found.items()}


def break_one_sample(processes: Processes) -> str:
    """What a process raises when a sample of the second one alone is empty."""
    models = pair("bert")
    data = data_of("bert", models[0].config, batch_size=3)
    encode = data.encode

    def with_empty_sample(positions):
        batch = encode(positions)
        batch["attention_mask"][positions == 1] = 0
        return batch

    object.__setattr__(data, "encode", with_empty_sample)
    try:
        run_measures(["commutativity"], *models, data, execution=Execution(processes))
    except EvaluationError as error:
        return str(error)
    return "nothing was raised"


if __name__ == "__main__":
    torch.set_num_threads(1)
    with Processes() as processes:
        found = {"rows": measure(processes), "processes": processes.count}
        found["error"] = break_one_sample(processes)
        path = Path(sys.argv[1]) / f"{processes.rank}.json"
        path.write_text(json.dumps(found))
