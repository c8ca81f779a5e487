"""What a merge changes of its base, one weight at a time: in thin factors, without a weight where that can be.

Three ways lead from the models to the change of a weight. Where all have it in factors, and the method goes by no more
than the subspace of these (`Sees.SUBSPACE`), cores of that subspace are merged. Where the method goes by changes, these
are multiplied out, one weight at a time, and merged over a base of zeros. Everything else merges the weights themselves
and takes the base's from the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from hf_llfc.checkpoints.buffers import is_parameter
from hf_llfc.checkpoints.header import TensorInfo
from hf_llfc.checkpoints.low_rank import LowRank
from hf_llfc.checkpoints.names import Group, Layout
from hf_llfc.checkpoints.source import Source
from hf_llfc.checkpoints.views.factors import factors_of
from hf_llfc.checkpoints.views.folding import Folding
from hf_llfc.checkpoints.writing.adapter import is_module_of_lora, is_parameter_of_lora
from hf_llfc.errors import CheckpointError, RecipeError
from hf_llfc.merging import Merge
from hf_llfc.merging.low_rank import RankChoice, Thin, merge_in_subspace, thin
from hf_llfc.merging.methods import Base, Need, Sees
from hf_llfc.parents.parent import Parent

TIED = "is tied to another weight, and a change of one of the two would tear them apart"
NO_PLACE = "is a parameter of its own, for which an adapter has no place"


@dataclass(frozen=True)
class Names:
    """What becomes of all that the models change, by names in memory.

    Attributes:
        thin: Weights that get factors.
        saved: Modules that are written whole.
        biases: Biases.
        rows: Embeddings of which rows are written → these.
        lost: What an adapter has no place for → why.
    """

    thin: tuple[str, ...]
    saved: tuple[str, ...]
    biases: tuple[str, ...]
    rows: Mapping[str, Sequence[int]]
    lost: Mapping[str, str]


class Changes:
    """The changes that a merge makes.

    Attributes:
        layout: Names of the result.
        names: What becomes of all that changes.
        ways: How many weights were merged which way: in the `subspace`, as `changes`, as `weights`.
    """

    def __init__(self, merge: Merge, parents: Sequence[Parent], base: Parent, choice: RankChoice) -> None:
        """Finds out what changes; of models that are no adapters, all weights are read for it.

        Args:
            merge: What becomes of every tensor.
            parents: The models.
            base: What they change.
            choice: The rank of the factors.

        Raises:
            CheckpointError: Nothing changes.
        """
        first = parents[0].checkpoint
        assert first.model_class is not None
        self.layout = Layout(first.model_class, first.config)
        self.ways = {"subspace": 0, "changes": 0, "weights": 0}
        self._merge, self._base, self._choice = merge, base, choice
        self._parents = parents
        self._model = self.layout.empty_model()
        self._make_memory = self.layout.memory_reader(first.tensors)
        self._groups: Mapping[str, Group] = {name: group for group in self.layout.groups for name in group.memory}
        self.names = self._split(self._changed())
        if not (self.names.thin or self.names.saved or self.names.biases or self.names.rows):
            raise CheckpointError(
                f"{first.label}: changes nothing of {base.checkpoint.label} that an adapter could hold"
            )

    @cached_property
    def _foldings(self) -> list[Folding] | None:
        """What every adapter changes; None where one of the models is none that tells it by module."""
        adapters = [parent.checkpoint.adapter for parent in self._parents]
        found = [adapter.folding for adapter in adapters if adapter is not None and adapter.folding is not None]
        return found if len(found) == len(adapters) else None

    def change(self, name: str) -> Thin:
        """The change of one weight, in factors.

        Args:
            name: One of `names.thin`.

        Raises:
            CheckpointError: A tensor cannot be merged.
            RecipeError: The merge scales the base.
        """
        for disk in self._groups[name].disk:
            self._refuse_scaled_base(disk)
        factors = self._factors(name)
        if factors is not None:
            if self._sees(name) is Sees.SUBSPACE:
                found = merge_in_subspace(factors, lambda cores: self._merged_cores(name, cores), self._choice)
                if found is not None:
                    self.ways["subspace"] += 1
                    return found
            if self._sees(name) is not Sees.WEIGHTS and len(self._groups[name].memory) == 1:
                self.ways["changes"] += 1
                return thin(self._merged_changes(name, factors), self._choice)
        self.ways["weights"] += 1
        return thin(self._by_expert(name, self._difference(name)), self._choice)

    def tensor(self, name: str) -> Tensor:
        """A merged tensor in memory, as the model has it."""
        return self._make_memory(name, self._wide(torch.float32).tensor)

    def lost(self, name: str) -> float:
        """The norm of the change of a tensor."""
        return float(torch.linalg.vector_norm(self._difference(name), dtype=torch.float64))

    def saved_names(self, path: str) -> list[str]:
        """The tensors of a module, by their names in it."""
        return [name for name, tensor in self._module(path).state_dict().items() if tensor.is_floating_point()]

    def _changed(self) -> list[str]:
        """Names in memory of what changes, in the order of the model."""
        if self._foldings is not None:
            found = {name for folding in self._foldings for name in (*folding.layers, *folding.others)}
            return [name for name in self.layout.names_in_memory if name in found]
        return [name for name, group in self._groups.items() if any(map(self._differs, group.disk))]

    def _differs(self, disk: str) -> bool:
        """Whether a model has another tensor than the base."""
        if not is_parameter(disk, self._merge.infos[disk]):
            return False
        base = self._base.read_unrounded(disk)
        return any(not torch.equal(source.read(disk), base) for source in self._merge.sources)

    @cached_property
    def _infos(self) -> Mapping[str, TensorInfo]:
        state = self._model.state_dict()
        return {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}

    def _split(self, changed: Sequence[str]) -> Names:
        foldings = self._foldings or []
        saved = {path for folding in foldings for path in folding.saved}
        tied = {*self.layout.ties, *self.layout.ties.values()}
        rows: dict[str, list[int]] = {}
        thin_names, biases, lost = [], [], {}
        # Biases come last: those of a module that is written whole are written with it.
        for name in sorted(changed, key=_is_bias):
            path, _, leaf = name.rpartition(".")
            module = self._module(path)
            if any(name.startswith(f"{whole}.") for whole in saved):
                continue
            of_rows = [folding.rows[name] for folding in foldings if name in folding.rows]
            others = [folding for folding in foldings if name in folding.layers or name in folding.others]
            if of_rows and name in self.layout.ties:
                continue  # those of the weight that it is tied to
            if of_rows and len(of_rows) == len(others):
                rows[name] = sorted({row for part in of_rows for row in part})
            elif name in tied and name not in {key for folding in foldings for key in folding.layers}:
                lost[name] = TIED
            elif is_module_of_lora(module, leaf) or (path and is_parameter_of_lora(module, leaf)):
                thin_names.append(name)
            elif _is_bias(name):
                biases.append(name)
            elif path and not any(module.children()):
                saved.add(path)
            else:
                lost[name] = NO_PLACE
        return Names(tuple(thin_names), tuple(sorted(saved)), tuple(biases), rows, lost)

    def _module(self, path: str) -> nn.Module:
        return self._model.get_submodule(path)

    def _factors(self, name: str) -> list[LowRank | None] | None:
        """The factors of one weight, None in a model that leaves it as it is; None where one changes it otherwise."""
        if self._foldings is None or any(name in folding.others for folding in self._foldings):
            return None
        first, *others = map(self._settings, self._groups[name].disk)
        if any(each != first for each in others):
            return None
        return [factors_of(folding.layers[name]) if name in folding.layers else None for folding in self._foldings]

    def _settings(self, disk: str) -> object:
        """What decides how a tensor is merged, apart from its name."""
        if self._merge.method is None:
            return tuple(self._merge.weights[disk])
        settings = self._merge.settings[disk]
        return settings.shared, settings.of_models

    def _sees(self, name: str) -> Sees:
        """What of the models the merge of one weight goes by."""
        disk = self._groups[name].disk[0]
        method = self._merge.method
        if method is None:
            return Sees.SUBSPACE
        if method.sees is Sees.WEIGHTS or (method.base is not Base.REQUIRED and self._merge.base is None):
            return Sees.SUBSPACE if method.sees is Sees.SUBSPACE and method.base is Base.NONE else Sees.WEIGHTS
        if method.need is Need.ELEMENTWISE and method.sees is Sees.SUBSPACE:
            return Sees.SUBSPACE  # a sum, whatever is stacked
        by_row = method.by_row is not None and self._merge.settings[disk].switch(method.by_row[0]) == method.by_row[1]
        is_apart = len(self._infos[name].shape) == 3 or len(self._groups[name].disk) > 1
        is_vector = 1 in self._infos[name].shape[-2:]
        return Sees.CHANGES if by_row or is_apart or is_vector else method.sees

    def _merged_cores(self, name: str, cores: list[Tensor]) -> Tensor:
        """The merge of square matrices in place of the changes of one weight."""
        disk = self._groups[name].disk[0]
        if self._merge.method is None:
            weights = self._merge.weights[disk]
            return sum((weight * core for weight, core in zip(weights, cores, strict=True)), torch.zeros(()).double())
        base = None if self._merge.base is None else torch.zeros_like(cores[0])
        return self._merge.method.merge(cores, base, self._merge.settings[disk], torch.float64)

    def _refuse_scaled_base(self, disk: str) -> None:
        """Refuses a merge without a base whose weights do not sum to 1, so that it is none of changes of the base."""
        merge = self._merge
        if merge.base is not None:
            return
        if merge.method is None:
            total = sum(merge.weights[disk])
        else:
            ones = [torch.ones(1, dtype=torch.float64) for _ in self._parents]
            total = float(merge.method.merge(ones, None, merge.settings[disk], torch.float64))
        if abs(total - 1) > 1e-6:
            raise RecipeError(
                f"{disk}: the weights of the models sum to {total:g}, so that a linear merge scales the base as well, "
                "and no adapter holds that; let them sum to 1, or add up the changes with merge_method task_arithmetic"
            )

    def _merged_changes(self, name: str, factors: Sequence[LowRank | None]) -> Tensor:
        """The merge of changes that are multiplied out, over a base of zeros."""
        shape = self._infos[name].shape

        def source(factor: LowRank | None) -> Source:
            made = torch.zeros(shape) if factor is None else factor.product().float().reshape(shape)
            disk = self.layout.to_disk({name: made})
            return Source("a change", disk.__getitem__, lambda _: None, lambda _: None)

        merge = self._wide(torch.float32)
        zeros = source(None) if merge.base is not None else None
        merge = replace(merge, sources=[source(factor) for factor in factors], base=zeros)
        merged = self._make_memory(name, merge.tensor)
        return self._by_expert(name, merged)

    def _difference(self, name: str) -> Tensor:
        """The change of one tensor, from the merged one and the base's."""
        merged = self._make_memory(name, self._wide(torch.float64).tensor)
        base = self._make_memory(name, self._base.read_unrounded)
        if merged.shape != base.shape:
            raise CheckpointError(
                f"{name}: has shape {list(merged.shape)}, and {list(base.shape)} in {self._base.checkpoint.label}; an "
                "adapter keeps the shapes of its base"
            )
        return merged.sub_(base).float()

    def _wide(self, dtype: torch.dtype) -> Merge:
        """The merge, not rounded to the dtype of the models."""
        infos = {
            name: replace(info, dtype=torch.promote_types(info.dtype, dtype)) if info.dtype.is_floating_point else info
            for name, info in self._merge.infos.items()
        }
        return replace(self._merge, infos=infos)

    def _by_expert(self, name: str, tensor: Tensor) -> Tensor:
        """A weight as one matrix an expert."""
        is_stack = tensor.dim() == 3 and not is_module_of_lora(self._module(name.rpartition(".")[0]), "weight")
        return tensor if is_stack else tensor.flatten(1)[None]


def _is_bias(name: str) -> bool:
    return name.endswith("bias")
