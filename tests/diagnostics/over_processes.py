"""Run by a launcher: diagnoses and evaluates a tiny pair and writes what each process found.

python -m torch.distributed.run --nproc-per-node 2 over_processes.py FOLDER
"""

import copy
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from hf_llfc.diagnostics import diagnose_models
from hf_llfc.diagnostics.points import line
from hf_llfc.diagnostics.streaming import Execution
from hf_llfc.diagnostics.suggest import suggest_weights
from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation import EvaluationConfig, evaluate_model, load_evaluation_data
from hf_llfc.parallel.processes import Processes
from tests.evaluation.tiny_data import text_rows, word_tokenizer
from tests.tiny_models import tiny_model

ALPHAS = (0.25, 0.5)


def diagnose(processes: Processes | None) -> dict:
    """The report and one model's scores, as JSON values."""
    models = [tiny_model("bert", "sequence-classification", seed) for seed in (0, 1)]
    config = EvaluationConfig(task="text-classification", dataset=text_rows(11), batch_size=3, metric="macro_f1")
    data = load_evaluation_data(config, word_tokenizer(), models[0].config)
    report = diagnose_models(models, data, region=line(ALPHAS), execution=Execution(processes))
    scores = evaluate_model(models[0], data, processes=processes)
    suggestion = suggest_weights(models, data, reference=(0.5, 0.5), execution=Execution(processes))
    return {
        "report": report.to_dict(),
        "suggestion": asdict(suggestion),
        "scores": {"loss": scores.loss, "samples": scores.samples, **scores.metrics},
    }


def break_one_sample(processes: Processes) -> str:
    """What a process raises when a sample of the second one alone has no finite features."""
    models = [tiny_model("bert", "sequence-classification", seed) for seed in (0, 1)]
    config = EvaluationConfig(task="text-classification", dataset=text_rows(11), batch_size=3)
    data = load_evaluation_data(config, word_tokenizer(), models[0].config)
    encode = data.encode

    def with_empty_sample(positions):
        batch = copy.copy(encode(positions))
        batch["attention_mask"][positions == 1] = 0
        return batch

    object.__setattr__(data, "encode", with_empty_sample)
    try:
        diagnose_models(models, data, region=line(ALPHAS), execution=Execution(processes))
    except EvaluationError as error:
        return str(error)
    return "nothing was raised"


if __name__ == "__main__":
    torch.set_num_threads(1)
    with Processes() as processes:
        found = {**diagnose(processes), "processes": processes.count, "error": break_one_sample(processes)}
        path = Path(sys.argv[1]) / f"{processes.rank}.json"
        path.write_text(json.dumps(found))
