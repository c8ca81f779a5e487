"""Checkpoints: opened from the Hub, a folder or memory, read lazily by tensor, compared, built into models, written."""

from typing import TYPE_CHECKING

from hf_llfc.checkpoints.checkpoint import Checkpoint, tensor_bytes
from hf_llfc.checkpoints.header import TensorInfo
from hf_llfc.checkpoints.opening import open_checkpoint
from hf_llfc.checkpoints.planned import state_dict_on_disk
from hf_llfc.checkpoints.positioned import TensorBytes
from hf_llfc.checkpoints.writing.output import OutputFolder
from hf_llfc.checkpoints.writing.shards import ShardFiles, Sink, Written
from hf_llfc.foundation.lazy import lazy_names

if TYPE_CHECKING:  # what knows model classes takes seconds to load
    from hf_llfc.checkpoints.comparison import body_tensors, compare
    from hf_llfc.checkpoints.models import load_model
    from hf_llfc.checkpoints.names import tensors_of
    from hf_llfc.checkpoints.writing.writer import write_checkpoint, write_share

__all__ = [
    "Checkpoint",
    "OutputFolder",
    "ShardFiles",
    "Sink",
    "TensorBytes",
    "TensorInfo",
    "Written",
    "body_tensors",
    "compare",
    "load_model",
    "open_checkpoint",
    "state_dict_on_disk",
    "tensor_bytes",
    "tensors_of",
    "write_checkpoint",
    "write_share",
]

__getattr__ = lazy_names(
    __name__,
    {
        "body_tensors": ".comparison",
        "compare": ".comparison",
        "load_model": ".models",
        "tensors_of": ".names",
        "write_checkpoint": ".writing.writer",
        "write_share": ".writing.writer",
    },
)
