"""Which class of transformers a config builds."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import TYPE_CHECKING

from hf_llfc.errors import SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# From the most complete model to the bare one; a table of the auto classes in transformers.
_MAPPINGS = (
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING",
    "MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING",
    "MODEL_FOR_TEXT_TO_SPECTROGRAM_MAPPING",
    "MODEL_FOR_PRETRAINING_MAPPING",
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_MASKED_LM_MAPPING",
    "MODEL_FOR_CTC_MAPPING",
    "MODEL_FOR_RNNT_MAPPING",
    "MODEL_FOR_TDT_MAPPING",
    "MODEL_FOR_RETRIEVAL_MAPPING",
    "MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING",
    "MODEL_FOR_OBJECT_DETECTION_MAPPING",
    "MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING",
    "MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING",
    "MODEL_FOR_DEPTH_ESTIMATION_MAPPING",
    "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING",
    "MODEL_FOR_IMAGE_TO_IMAGE_MAPPING",
    "MODEL_FOR_IMAGE_MATTING_MAPPING",
    "MODEL_FOR_POSE_ESTIMATION_MAPPING",
    "MODEL_FOR_KEYPOINT_DETECTION_MAPPING",
    "MODEL_FOR_KEYPOINT_MATCHING_MAPPING",
    "MODEL_FOR_TABLE_RECOGNITION_MAPPING",
    "MODEL_FOR_TEXT_RECOGNITION_MAPPING",
    "MODEL_FOR_DECISION_MAPPING",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING",
    "MODEL_FOR_TIME_SERIES_PREDICTION_MAPPING",
    "MODEL_MAPPING",
    "MODEL_FOR_MASK_GENERATION_MAPPING",
    "MODEL_FOR_BACKBONE_MAPPING",
)


def model_class_for(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that a config builds.

    Args:
        config: Any model config.

    Returns:
        The class that `config.architectures` names, or else the most complete one that transformers has for the config.

    Raises:
        SpecError: transformers has no modelling class for the config.
    """
    import transformers

    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if inspect.isclass(found) and issubclass(found, transformers.PreTrainedModel):
            return found
    found = _of_config(type(config))
    if found is None:
        raise SpecError(
            f"no modelling class for {type(config).__name__} (model type {config.model_type!r}) in transformers "
            f"{transformers.__version__}"
        )
    return found


def _of_config(config_class: type[PreTrainedConfig]) -> type[PreTrainedModel] | None:
    from transformers.models.auto import modeling_auto

    for name in _MAPPINGS:
        mapping = getattr(modeling_auto, name)
        if config_class not in mapping:
            continue
        try:
            found = mapping[config_class]
        except ValueError:  # the table names a class that is not exported
            continue
        if isinstance(found, tuple):
            found = found[0]
        return found
    candidates = _in_modelling_files(config_class)
    # A head names its backbone by attribute; of what is left the longest file position is the most complete.
    return candidates[-1] if candidates else None


def _in_modelling_files(config_class: type[PreTrainedConfig]) -> list[type[PreTrainedModel]]:
    """Classes of the package of a config whose `config_class` it is, bare models before those with a head."""
    from transformers import PreTrainedModel

    module = config_class.__module__.replace(".configuration_", ".modeling_")
    try:
        names = vars(import_module(module))
    except ModuleNotFoundError:
        return []
    return [
        member
        for member in names.values()
        if inspect.isclass(member)
        and issubclass(member, PreTrainedModel)
        and member.__module__ == module
        and member.config_class is config_class
        and not member.__name__.endswith("PreTrainedModel")
        and "forward" in vars(member)
    ]
