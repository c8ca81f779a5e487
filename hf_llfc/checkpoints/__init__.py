"""Checkpoints: opened from the Hub, a folder or memory, read lazily by tensor, compared, built into models, written."""

from hf_llfc.checkpoints.comparison import body_tensors, compare
from hf_llfc.checkpoints.header import TensorInfo
from hf_llfc.checkpoints.models import load_model
from hf_llfc.checkpoints.names import tensors_of
from hf_llfc.checkpoints.output import OutputFolder
from hf_llfc.checkpoints.reader import Checkpoint, open_checkpoint, state_dict_on_disk
from hf_llfc.checkpoints.writer import write_checkpoint

__all__ = [
    "Checkpoint",
    "OutputFolder",
    "TensorInfo",
    "body_tensors",
    "compare",
    "load_model",
    "open_checkpoint",
    "state_dict_on_disk",
    "tensors_of",
    "write_checkpoint",
]
