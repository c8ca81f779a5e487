"""Memory and time that matching takes, known from configs and headers before it begins."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch

from hf_llfc.checkpoints import Checkpoint
from hf_llfc.parents.specs import alignment_spec, bind
from hf_llfc.recipe import AlignSection


def matching_memory(checkpoint: Checkpoint, options: AlignSection, models: int = 2) -> int:
    """Memory of matching at its peak in bytes, activations not counted.

    Weight matching: the gains of the widest axis, in parts or with what SciPy takes to assign them, and two tensors;
    threads that match an axis each hold their own; in a universe also the sums of the other models. Methods that look
    at activations hold both models, in a universe all; what is gathered of the activations is a matrix an axis and pair
    of models, for commutativity matching three of moments an axis and the weights of both in float64, too. Learned
    matching holds both models, the moved and the merged one and its gradient, and for every axis a matrix, its gradient
    and two moments of Adam.
    """
    from hf_llfc.alignment.gains import PARTS
    from hf_llfc.alignment.universe import KEPT

    binding = bind(alignment_spec(checkpoint, options), checkpoint)
    widths = [binding.sizes[axis] for axis in binding.symmetric_axes]
    widest = max(widths, default=0)
    largest = max(info.elements for info in checkpoint.tensors.values())
    squares = sum(width**2 for width in widths)
    threads = torch.get_num_threads()
    by_weights = (PARTS + threads) * 4 * widest**2 + threads * 8 * largest
    if options.together == "universe":
        by_weights += min(KEPT, 8 * sum(info.elements for info in checkpoint.tensors.values()))
    involved = models if options.together == "universe" and options.method == "activation_matching" else 2
    by_activations = involved * checkpoint.nbytes + involved * (involved - 1) // 2 * 8 * squares
    if options.method == "weight_matching":
        return max(by_weights, by_activations) if options.start == "activation_matching" else by_weights
    if options.method == "activation_matching":
        return by_activations
    elements = sum(info.elements for info in checkpoint.tensors.values())
    if options.method == "commutativity_matching":
        return max(by_weights, 2 * checkpoint.nbytes + 2 * 8 * elements + 4 * 8 * squares)
    return max(by_weights, 5 * checkpoint.nbytes + 4 * 4 * squares)


def matching_cost(
    checkpoint: Checkpoint, options: AlignSection, models: int = 2, device: torch.device | None = None
) -> dict[str, float]:
    """Cost of one sweep of weight matching over one model, from the headers alone.

    All methods but activation matching start from weight matching.

    Args:
        checkpoint: One of the models.
        options: Options of the alignment.
        models: Number of models; in a universe each is matched to all others.
        device: Where matrices are multiplied; the processor where None.

    Returns:
        `operations`, additions and multiplications of the matrix products; `bytes` to read from the models; and
        `seconds` on this machine, from a short measurement of a matrix product and of a copy in memory.
    """
    from hf_llfc.alignment import Parameters
    from hf_llfc.alignment.assignment.auction import PASSES
    from hf_llfc.alignment.gains import CASTS, Gains
    from hf_llfc.alignment.groups import groups_of

    binding = bind(alignment_spec(checkpoint, options), checkpoint)
    model = Parameters(binding, checkpoint.read)
    gains, groups = Gains(model, model), groups_of(binding)
    operations = sum(gains.operations(group) for group in groups)
    read = sum(gains.elements(group) for group in groups)
    assigned = sum(float(group.size) ** 2 for group in groups if group.moves)
    itemsize = max((info.dtype.itemsize for info in checkpoint.tensors.values()), default=4)
    per_operation, per_byte = machine_costs(device)
    involved = models if options.together == "universe" else 2
    seconds = operations * per_operation + (read * (involved * itemsize + CASTS * 4) + assigned * PASSES * 4) * per_byte
    return {"operations": operations, "bytes": float(involved * itemsize) * read, "seconds": seconds}


def probe_seconds(checkpoint: Checkpoint) -> float:
    """Time that the probe of one moved model takes on this machine, from the headers and a short measurement.

    Twice every weight is read, cast to float32 and copied into the model, and meets the tokens of the inputs.
    """
    from hf_llfc.parents.probe import TOKENS

    per_operation, per_byte = machine_costs()
    elements = sum(info.elements for info in checkpoint.tensors.values())
    return 2 * (elements * 2 * TOKENS * per_operation + (checkpoint.nbytes + 4 * 4 * elements) * per_byte)


def machine_costs(device: torch.device | None = None) -> tuple[float, float]:
    """Seconds that an operation of a float32 matrix product and a byte copied in memory take, measured in a moment.

    Args:
        device: Where matrices are multiplied; the processor where None.
    """
    factor = torch.rand(1024, 1024, device=device)
    source = torch.rand(1 << 24)
    target = torch.empty_like(source)

    def median_seconds(work: Callable[[], object]) -> float:
        times = []
        for _ in range(5):
            start = perf_counter()
            work()
            times.append(perf_counter() - start)
        return sorted(times)[2]

    # To read a number of the result waits until an accelerator has it.
    product = median_seconds(lambda: (factor @ factor)[0, 0].item())
    copy = median_seconds(lambda: target.copy_(source))
    return product / (2 * 1024**3), copy / (4 * source.numel())
