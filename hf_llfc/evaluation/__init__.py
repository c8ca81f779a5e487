"""Task to dataset, batches, loss and metric.

The configuration is importable without torch; everything that touches data or models is loaded on first use.
"""

from typing import TYPE_CHECKING

from hf_llfc.foundation.lazy import lazy_names
from hf_llfc.recipe.data import TASKS, EvaluationConfig

if TYPE_CHECKING:
    from hf_llfc.evaluation.data import EvaluationData, load_evaluation_data
    from hf_llfc.evaluation.metrics import OFFLINE_METRICS, load_metric
    from hf_llfc.evaluation.models import EvaluationResult, evaluate_model, forward_logits, model_inputs

__all__ = [
    "OFFLINE_METRICS",
    "TASKS",
    "EvaluationConfig",
    "EvaluationData",
    "EvaluationResult",
    "evaluate_model",
    "forward_logits",
    "load_evaluation_data",
    "load_metric",
    "model_inputs",
]

__getattr__ = lazy_names(
    __name__,
    {
        "EvaluationData": ".data",
        "load_evaluation_data": ".data",
        "OFFLINE_METRICS": ".metrics",
        "load_metric": ".metrics",
        "EvaluationResult": ".models",
        "evaluate_model": ".models",
        "forward_logits": ".models",
        "model_inputs": ".models",
    },
)
