import json

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hf_llfc.errors import AlignmentError, SpecError
from hf_llfc.symmetry import Alignment, Permutation, PermutationSpec
from hf_llfc.symmetry.expressions import AxisUse, atoms_of_pieces, format_shape
from tests.symmetry.oracle import FIXED, SIZES, USES, entries_in, expressions, moved

LINES = [
    "embed  vocab residual",
    "up.<experts>  neurons[experts] residual",
    "down.<experts>  residual neurons[experts]",
    "router  experts residual",
    "fused  experts neurons[experts] + neurons[experts] residual",
    "head  vocab residual",
    "scale",
]
TOY_SIZES = {"vocab": 5, "residual": 4, "experts": 3, "neurons": 6}


@pytest.fixture
def spec() -> PermutationSpec:
    return PermutationSpec.from_lines(
        LINES, sizes=TOY_SIZES, symmetric=["residual", "experts", "neurons"], model_type="toy"
    )


@pytest.fixture
def state(generator: torch.Generator) -> dict[str, torch.Tensor]:
    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    embed = tensor(5, 4)
    return {
        "embed": embed,
        **{f"up.{expert}": tensor(6, 4) for expert in range(3)},
        **{f"down.{expert}": tensor(4, 6) for expert in range(3)},
        "router": tensor(3, 4),
        "fused": tensor(3, 12, 4),
        "head": embed,
        "scale": tensor(),
    }


def has_parents(dimensions) -> bool:
    return all(
        sum(other == AxisUse("outer") for other in atoms) == 1
        for atoms in atoms_of_pieces(dimensions)
        if AxisUse("inner", "outer") in atoms
    )


@given(
    st.lists(expressions(USES + FIXED), min_size=1, max_size=3).map(tuple).filter(has_parents),
    st.sets(st.sampled_from(["outer", "inner", "wide", "heads.3", "heads.12"])),
    st.integers(0, 2**31),
)
def test_any_expression_moves_as_its_entries_do(dimensions, symmetric, seed):
    assume(entries_in(dimensions) <= 3000)
    spec = PermutationSpec.from_lines(
        [f"x  {format_shape(dimensions)}", "all  outer inner[outer] wide heads.3 heads.12"],
        sizes=SIZES,
        symmetric=symmetric,
    )
    alignment = spec.random_alignment(torch.Generator().manual_seed(seed))
    tensor = torch.arange(entries_in(dimensions)).reshape(spec.tensors["x"].shape(SIZES))
    whole = torch.zeros(spec.tensors["all"].shape(SIZES))
    aligned = alignment.apply({"x": tensor, "all": whole})["x"]
    permutations = {axis: transform.perm.tolist() for axis, transform in alignment.transforms.items()}
    assert torch.equal(aligned, moved(tensor, dimensions, permutations))
    back = alignment.inverse().apply({"x": aligned, "all": whole})["x"]
    assert torch.equal(back, tensor)


def test_entries_in_names_move_with_what_is_inside_them(spec, state, generator):
    alignment = spec.random_alignment(generator)
    aligned = alignment.apply(state)
    e, n, r = (alignment.transforms[axis].perm for axis in ("experts", "neurons", "residual"))
    for expert in range(3):
        assert torch.equal(aligned[f"up.{expert}"], state[f"up.{e[expert]}"][n[expert]][:, r])
        assert torch.equal(aligned[f"down.{expert}"], state[f"down.{e[expert]}"][r][:, n[expert]])
        gate, up = state["fused"][e[expert]].split(6)
        assert torch.equal(aligned["fused"][expert], torch.cat([gate[n[expert]], up[n[expert]]])[:, r])
    assert torch.equal(aligned["router"], state["router"][e][:, r])
    assert torch.equal(aligned["scale"], state["scale"])


def test_tied_tensors_stay_tied_and_what_does_not_move_is_not_copied(spec, state, generator):
    aligned = spec.random_alignment(generator).apply(state)
    assert aligned["head"] is aligned["embed"]
    assert list(aligned) == list(state)
    assert aligned["scale"].data_ptr() == state["scale"].data_ptr()
    untouched = spec.identity_alignment().apply(state)
    in_one_piece = {name: tensor for name, tensor in state.items() if name != "fused"}
    assert all(untouched[name].data_ptr() == tensor.data_ptr() for name, tensor in in_one_piece.items())


def test_empty_tensors_and_tensors_on_no_device_move():
    spec = PermutationSpec.from_lines(["a  rows x", "b  x"], sizes={"rows": None, "x": 3}, symmetric=["x"])
    alignment = spec.random_alignment(torch.Generator().manual_seed(1))
    aligned = alignment.apply({"a": torch.empty(0, 3), "b": torch.arange(3)})
    assert aligned["a"].shape == (0, 3)
    on_meta = alignment.apply({"a": torch.empty(2, 3, device="meta"), "b": torch.empty(3, device="meta")})
    assert on_meta["a"].is_meta and on_meta["a"].shape == (2, 3)


def test_only_what_fits_the_spec_is_moved(spec, state):
    del state["router"]
    with pytest.raises(SpecError, match="router: missing"):
        spec.identity_alignment().apply(state)


def test_what_moved_is_counted(spec):
    swapped = torch.arange(6).repeat(3, 1)
    swapped[2, :2] = torch.tensor([1, 0])
    alignment = Alignment(spec, {**spec.identity_alignment().transforms, "neurons": Permutation(swapped)})
    assert alignment.moved == {"residual": (0, 4), "experts": (0, 3), "neurons": (2, 18)}
    assert not alignment.is_identity and spec.identity_alignment().is_identity


def test_alignments_of_differently_restricted_specs_compose(spec, state, generator):
    parts = [
        spec.fix("residual").random_alignment(generator),
        spec.keep("residual").random_alignment(generator),
        spec.keep("experts").random_alignment(generator),
        spec.fix("experts").random_alignment(generator),
    ]
    for first in parts:
        for second in parts:
            both = first.then(second)
            expected = second.apply(first.apply(state))
            assert all(torch.equal(tensor, expected[name]) for name, tensor in both.apply(state).items())
            assert set(both.transforms) == set(first.transforms) | set(second.transforms)
            assert set(both.spec.symmetric_axes) == set(both.transforms)
            undone = both.inverse().apply(expected)
            assert all(torch.equal(tensor, state[name]) for name, tensor in undone.items())


def test_alignments_of_different_specs_do_not_compose(spec):
    wider = PermutationSpec.from_lines(
        LINES, sizes={**TOY_SIZES, "residual": 8}, symmetric=["residual"], model_type="wide toy"
    )
    with pytest.raises(AlignmentError, match="of toy and wide toy, with axes of other names or sizes"):
        spec.identity_alignment().then(wider.identity_alignment())


def test_an_inverse_says_so(spec):
    alignment = spec.identity_alignment().with_metadata(method="x")
    assert alignment.inverse().metadata == {"method": "x", "inverted": True}
    assert alignment.inverse().inverse().metadata == {"method": "x", "inverted": False}


class TestFile:
    @pytest.fixture
    def path(self, tmp_path, spec, generator):
        self.alignment = spec.random_alignment(generator).with_metadata(objective_after=1.5, sweeps=[{"moved": 3}])
        self.alignment.save(tmp_path / "alignment.safetensors")
        return tmp_path / "alignment.safetensors"

    def rewrite(self, path, change_tensors=lambda tensors: None, change_header=lambda header: None):
        """Writes the file again after a change."""
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            header = json.loads(file.metadata()["hf_llfc"])
        tensors = load_file(path)
        change_tensors(tensors)
        change_header(header)
        save_file(tensors, path, metadata={"hf_llfc": json.dumps(header)})

    def assert_refused(self, path, spec, message):
        with pytest.raises(AlignmentError, match=message) as error:
            Alignment.load(path, spec)
        assert str(path) in str(error.value)

    def test_round_trip(self, path, spec):
        loaded = Alignment.load(path, spec)
        assert loaded.transforms == self.alignment.transforms
        assert loaded.metadata == self.alignment.metadata
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.int32}

    def test_the_same_alignment_gives_the_same_bytes(self, path, spec, tmp_path):
        Alignment.load(path, spec).save(tmp_path / "again.safetensors")
        assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()

    def test_it_may_leave_out_axes(self, tmp_path, spec, generator):
        part = spec.keep("residual").random_alignment(generator)
        part.save(tmp_path / "part.safetensors")
        assert Alignment.load(tmp_path / "part.safetensors", spec).transforms == part.transforms

    def test_missing(self, tmp_path, spec):
        self.assert_refused(tmp_path / "nothing.safetensors", spec, "cannot be read as an alignment file")

    @pytest.mark.parametrize("length", [0, 4, 200, -1])
    def test_truncated(self, path, spec, length):
        path.write_bytes(path.read_bytes()[:length])
        self.assert_refused(path, spec, "cannot be read as an alignment file")

    def test_not_safetensors(self, path, spec):
        path.write_text("perm: [0, 1]")
        self.assert_refused(path, spec, "cannot be read as an alignment file")

    def test_a_checkpoint(self, path, spec, state):
        save_file({name: tensor.clone() for name, tensor in state.items()}, path)
        self.assert_refused(path, spec, "not an alignment file of format 'hf_llfc.alignment/1'")

    @pytest.mark.parametrize("text", ["[]", "null", "{", '{"format": "hf_llfc.alignment/1"}'])
    def test_a_damaged_header(self, path, spec, text):
        save_file(load_file(path), path, metadata={"hf_llfc": text})
        self.assert_refused(path, spec, "alignment file")

    def test_another_format(self, path, spec):
        self.rewrite(path, change_header=lambda header: header.update(format="hf_llfc.alignment/9"))
        self.assert_refused(path, spec, "not an alignment file of format")

    def test_another_model_type(self, path, spec):
        self.rewrite(path, change_header=lambda header: header.update(model_type="llama"))
        self.assert_refused(path, spec, "model type 'llama' found, 'toy' expected")

    def test_another_size(self, path):
        wider = PermutationSpec.from_lines(
            LINES, sizes={**TOY_SIZES, "neurons": 7}, symmetric=["residual", "experts", "neurons"], model_type="toy"
        )
        self.assert_refused(path, wider, r"neurons: one int32 index array of shape \[3, 7\] expected")

    def test_an_axis_that_is_not_symmetric(self, path, spec):
        self.assert_refused(path, spec.fix("residual"), "residual: not a symmetric axis of the spec")

    def test_a_damaged_permutation(self, path, spec):
        self.rewrite(path, change_tensors=lambda tensors: tensors["residual:perm"].fill_(1))
        self.assert_refused(path, spec, "residual: not a permutation")

    def test_a_missing_permutation(self, path, spec):
        self.rewrite(path, change_tensors=lambda tensors: tensors.pop("residual:perm"))
        self.assert_refused(path, spec, r"residual: one int32 index array of shape \[4\] expected, \{\} found")

    def test_one_too_many(self, path, spec):
        self.rewrite(path, change_tensors=lambda tensors: tensors.update(other=torch.zeros(1)))
        self.assert_refused(path, spec, "other: belongs to no transform")

    def test_an_unknown_kind(self, path, spec):
        self.rewrite(path, change_header=lambda header: header["kinds"].update(residual="rotation"))
        self.assert_refused(path, spec, "residual: unknown transform kind 'rotation'; known: permutation")

    def test_all_problems_come_at_once(self, path, spec):
        def damage(tensors):
            tensors["residual:perm"].fill_(1)
            del tensors["experts:perm"]

        self.rewrite(path, damage, lambda header: header.update(model_type="llama"))
        self.assert_refused(path, spec, "3 problems")
