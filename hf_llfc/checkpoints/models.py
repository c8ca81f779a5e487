"""Models built from checkpoints, strictly: every tensor is used, none is invented."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_llfc.checkpoints.checkpoint import Checkpoint
from hf_llfc.checkpoints.header import TensorInfo
from hf_llfc.checkpoints.names import Layout
from hf_llfc.checkpoints.settings import most_common_dtype
from hf_llfc.errors import CheckpointError, raise_all


def load_model(
    checkpoint: Checkpoint,
    *,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    model_class: type[PreTrainedModel] | None = None,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Builds the model of a checkpoint, with its own weights or with others.

    Args:
        checkpoint: Where the config and, without `state_dict`, the weights come from.
        state_dict: Weights under their names on disk, for example merged ones. The model gets copies.
        model_class: The class to build; None takes the one that the config names.
        dtype: The dtype of the model; None keeps the one in which most weights are stored.

    Returns:
        The model on the CPU, in evaluation mode.

    Raises:
        CheckpointError: If the model class is not known, or a tensor is missing, left over or of another shape.
    """
    model_class = model_class or checkpoint.model_class
    if model_class is None:
        raise CheckpointError(
            f"{checkpoint.label}: the model class {checkpoint.architecture or '(the config names none)'} is not known"
            " to transformers; pass model_class, register it with AutoModel.register, or allow trust_remote_code"
        )
    read = state_dict.items() if state_dict is not None else checkpoint.state_dict()
    given = {name: tensor for name, tensor in read if name not in checkpoint.spare}
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in given.items()}
    heading = f"{checkpoint.label}: the tensors are not those of {model_class.__name__}"
    layout = Layout(model_class, checkpoint.config)
    plan = layout.plan(infos, heading)
    raise_all([f"tensor {name} is left over" for name in plan.unused], CheckpointError, heading)

    dtype = dtype or most_common_dtype(infos)
    options: dict[str, Any] = {"add_pooling_layer": False} if layout.lacks_pooler(plan) else {}
    loaded: Any = model_class.from_pretrained(
        None,
        config=checkpoint.config,
        # transformers takes tensors over unless it casts them; those of the caller must not change with the model.
        state_dict={name: tensor.clone() if tensor.dtype == dtype else tensor for name, tensor in given.items()},
        dtype=dtype,
        output_loading_info=True,
        generation_config=checkpoint.generation_config,
        **options,
    )
    model, report = loaded  # with output_loading_info, transformers returns both
    problems = [f"tensor {name} is missing" for name in sorted(report["missing_keys"]) if name not in plan.lacking]
    problems += [f"tensor {name} is left over" for name in sorted(report["unexpected_keys"])]
    raise_all(problems, CheckpointError, heading)
    return model
