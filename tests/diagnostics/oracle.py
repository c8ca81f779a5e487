"""LLFC as the paper writes it, in float64, with every feature of every model kept; shares no code with the package."""

import copy
from dataclasses import dataclass

import numpy as np
import torch

from tests.tiny_models import FullDouble


@dataclass
class Oracle:
    """What the paper's formulas give.

    Args:
        llfc: Mean and std per layer and α.
        baseline: Mean and std per layer.
        coefficient: Mean and std per layer and α.
        losses: Mean cross-entropy per α.
        errors: Share of wrong predictions per α.
    """

    llfc: dict
    baseline: dict
    coefficient: dict
    losses: dict
    errors: dict


def run(model, sample, modules):
    """Flattened features of one sample without padding, and its logits."""
    kept = {}
    handles = []
    for name in modules:

        def hook(module, args, output, name=name):
            tensor = output if isinstance(output, torch.Tensor) else output[0]
            kept[name] = tensor.detach().double().numpy().ravel().copy()

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    with torch.no_grad(), FullDouble():
        logits = model(**sample).logits
    for handle in handles:
        handle.remove()
    kept["logits"] = logits.double().numpy().ravel().copy()
    return kept, logits[0].double().numpy()


def between(model_a, model_b, alpha):
    """A new model with weights αA + (1−α)B."""
    merged = copy.deepcopy(model_a)
    state_b = model_b.state_dict()
    state = {}
    for name, a in model_a.state_dict().items():
        b = state_b[name]
        state[name] = (alpha * a.double() + (1 - alpha) * b.double()).to(a.dtype) if a.is_floating_point() else a
    merged.load_state_dict(state)
    return merged.eval()


def losses_of(logits, labels, task):
    """Loss and hit of every prediction of one sample."""
    if labels.ndim == 0:
        logits, labels = logits[None], labels[None]
    elif task == "text-generation":
        logits, labels = logits[:-1], labels[1:]
    found = []
    for row, label in zip(logits, labels, strict=True):
        if label != -100:
            shifted = row - row.max()
            found.append((np.log(np.exp(shifted).sum()) - shifted[label], row.argmax() == label))
    return found


def measure(model_a, model_b, samples, modules, alphas, task) -> Oracle:
    """Runs every model on every sample alone.

    Args:
        model_a: The model with weight α.
        model_b: The other.
        samples: Inputs of one sample each, unpadded, with its labels.
        modules: Names of the layers.
        alphas: All α, ends included.
        task: What the labels mean.
    """
    models = {alpha: between(model_a, model_b, alpha) for alpha in alphas}
    features = {alpha: [] for alpha in alphas}
    scores = {alpha: [] for alpha in alphas}
    for inputs, labels in samples:
        for alpha, model in models.items():
            kept, logits = run(model, inputs, modules)
            features[alpha].append(kept)
            scores[alpha] += losses_of(logits, labels.numpy(), task)
    llfc, baseline, coefficient = {}, {}, {}
    for layer in [*modules, "logits"]:
        distances = []
        for f_a, f_b in zip(features[1.0], features[0.0], strict=True):
            a, b = f_a[layer], f_b[layer]
            distances.append(1 - (a @ b) / (np.linalg.norm(a) * np.linalg.norm(b)))
        baseline[layer] = (np.mean(distances), np.std(distances))
        for alpha in alphas:
            distances, coefficients = [], []
            for f_m, f_a, f_b in zip(features[alpha], features[1.0], features[0.0], strict=True):
                merged = f_m[layer]
                blend = alpha * f_a[layer] + (1 - alpha) * f_b[layer]
                distances.append(1 - (merged @ blend) / (np.linalg.norm(merged) * np.linalg.norm(blend)))
                coefficients.append((merged @ blend) / np.linalg.norm(blend) ** 2)
            llfc[layer, alpha] = (np.mean(distances), np.std(distances))
            coefficient[layer, alpha] = (np.mean(coefficients), np.std(coefficients))
    return Oracle(
        llfc,
        baseline,
        coefficient,
        {alpha: np.mean([loss for loss, _ in found]) for alpha, found in scores.items()},
        {alpha: 1 - np.mean([hit for _, hit in found]) for alpha, found in scores.items()},
    )
