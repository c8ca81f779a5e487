"""A small training with the Trainer of transformers; as a script, one process of a launcher's training.

torchrun --nproc-per-node 2 trainer_script.py FOLDER
"""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_llfc
from tests.runs import byte_llama


class Bytes(Dataset):
    """Sixteen sequences of sixteen bytes, the same every time."""

    def __init__(self) -> None:
        self.ids_nt = torch.randint(0, 256, (16, 16), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids_nt)

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids_nt[place], "labels": self.ids_nt[place]}


def trainer(folder: Path, *callbacks: TrainerCallback, model: Any = None, **settings: Any) -> Trainer:
    """Six steps of four samples, four steps an epoch, unless `settings` say otherwise."""
    arguments = TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            **settings,
        }
    )
    model = byte_llama(0) if model is None else model
    return Trainer(model, arguments, train_dataset=Bytes(), eval_dataset=Bytes(), callbacks=list(callbacks))


class _Keeper(TrainerCallback):
    """Copies what the Trainer saves to where it deletes nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            shutil.copytree(
                Path(args.output_dir) / f"checkpoint-{state.global_step}", self.folder / str(state.global_step)
            )


@contextmanager
def keep_all(trained: Trainer, folder: Path) -> Iterator[None]:
    """Keeps a copy of every checkpoint."""
    keeper = _Keeper(folder)
    trained.add_callback(keeper)
    yield
    trained.remove_callback(keeper)


def main() -> None:
    """Trains, and tells what this process knows of the end."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    callback = hf_llfc.MergeCallback(folder / "soup")
    trained = trainer(folder / "run", callback, save_steps=2, save_total_limit=1, per_device_train_batch_size=2)
    with keep_all(trained, folder / "kept"):
        trained.train()
    models = callback.result.table if callback.result is not None else []
    told = {
        "main": trained.is_world_process_zero(),
        "problem": str(callback.problem) if callback.problem is not None else None,
        "steps": [int(row["id"].rsplit("-", 1)[-1]) for row in models],
    }
    (folder / f"{trained.args.process_index}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
