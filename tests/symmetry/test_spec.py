import pytest
import torch

from hf_llfc import PermutationSpec
from hf_llfc.errors import SpecError
from hf_llfc.symmetry import TensorSpec, parse
from tests.tiny_models import tiny_config

LINES = [
    "net.embed.weight  vocab residual",
    "net.experts.<experts.0>.up.weight  neurons.0[experts] residual",
    "net.experts.<experts.0>.down.weight  residual neurons.0[experts]",
    "net.router.weight  experts.0 residual",
    "net.norm.weight?  residual",
    "net.norm.count?~",
    "pooler.weight?  pooled residual",
    "head.weight  labels pooled  if pooler.weight",
    "head.weight  labels residual  unless pooler.weight",
]
SIZES = {"vocab": 11, "residual": 6, "experts": 2, "neurons": 3, "pooled": 5, "labels": None}
SYMMETRIC = ("residual", "experts", "neurons", "pooled")
SHAPES = {
    "net.embed.weight": (11, 6),
    "net.experts.0.up.weight": (3, 6),
    "net.experts.1.up.weight": (3, 6),
    "net.experts.0.down.weight": (6, 3),
    "net.experts.1.down.weight": (6, 3),
    "net.router.weight": (2, 6),
    "head.weight": (4, 6),
}


@pytest.fixture
def spec() -> PermutationSpec:
    return PermutationSpec.from_lines(LINES, sizes=SIZES, symmetric=SYMMETRIC, model_type="toy", prefix="net.")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a.weight  residual 3", TensorSpec("a.weight", parse("residual 3"))),
        ("  a.weight residual  ", TensorSpec("a.weight", parse("residual"))),
        ("a.scale", TensorSpec("a.scale", ())),
        ("a.bias?  residual", TensorSpec("a.bias", parse("residual"), optional=True)),
        ("a.mean~  residual", TensorSpec("a.mean", parse("residual"), statistic=True)),
        ("a.count?~", TensorSpec("a.count", (), optional=True, statistic=True)),
        ("a.count~?", TensorSpec("a.count", (), optional=True, statistic=True)),
        ("a.weight  r  if b.weight", TensorSpec("a.weight", parse("r"), condition=("if", "b.weight"))),
        ("a.weight? r unless b", TensorSpec("a.weight", parse("r"), optional=True, condition=("unless", "b"))),
        ("a.scale  if b", TensorSpec("a.scale", (), condition=("if", "b"))),
        ("a.scale? if b", TensorSpec("a.scale", (), optional=True, condition=("if", "b"))),
        ("e.<experts.0>.w  n", TensorSpec("e.<experts.0>.w", parse("n"))),
    ],
)
def test_a_line_declares_a_tensor(line, expected):
    assert TensorSpec.from_line(line) == expected


@pytest.mark.parametrize("line", ["", "?", "?a  residual", "a?b  residual"])
def test_a_line_that_declares_nothing(line):
    with pytest.raises(SpecError, match="not a tensor declaration"):
        TensorSpec.from_line(line)


def test_an_error_in_an_expression_names_the_tensor():
    with pytest.raises(SpecError, match=r"^a\.weight: axis expression, column 1: this '\(' is never closed"):
        TensorSpec.from_line("a.weight  (heads head_dim")


def test_names_carry_indices():
    tensor = TensorSpec.from_line("l.<experts.0>.x.<heads>.w  neurons.0[experts]")
    assert tensor.name_axes == ("experts.0", "heads")
    assert tensor.name_at((3, 1)) == "l.3.x.1.w"
    assert [use.axis for use in tensor.axes] == ["experts.0", "heads", "neurons.0"]


@pytest.mark.parametrize(
    ("lines", "sizes", "symmetric", "problem"),
    [
        (["a  x", "a  x"], {"x": 2}, ["x"], "a is declared twice"),
        (["a  residual"], {"residuals": 2}, [], "axis 'residual' has no size; did you mean 'residuals'"),
        (["a  x"], {"x": 2}, ["y"], "symmetric axis 'y' occurs in no tensor"),
        (["a  x"], {"x": None}, ["x"], "symmetric axis 'x' needs a size"),
        (["a.<x>  y"], {"x": None, "y": 2}, [], "axis 'x' in its name needs a size"),
        (["a  x[y]"], {"x": 2, "y": 2}, ["x"], r"a: x\[y\] needs its parent axis 'y' beside it"),
        (["a  (x[y] 2) + y"], {"x": 2, "y": 2}, ["x"], r"a: x\[y\] needs its parent axis 'y' beside it"),
        (["a  y y x[y]"], {"x": 2, "y": 2}, ["x"], "beside it, exactly once"),
        (["a  y x[y]", "b  x"], {"x": 2, "y": 2}, ["x"], "b: axis 'x' depends on None here, elsewhere on 'y'"),
        (["a  z y[z] x[y]"], {"x": 2, "y": 2, "z": 2}, [], "depends on 'y', which depends on"),
    ],
)
def test_declarations_that_contradict_themselves(lines, sizes, symmetric, problem):
    with pytest.raises(SpecError, match=problem):
        PermutationSpec.from_lines(lines, sizes=sizes, symmetric=symmetric)


def test_a_parent_may_be_in_the_name():
    PermutationSpec.from_lines(["a.<y>  x[y]"], sizes={"x": 2, "y": 2}, symmetric=["x"])


def test_all_problems_come_at_once():
    with pytest.raises(SpecError) as error:
        PermutationSpec.from_lines(["a  x", "b  z"], sizes={}, symmetric=["y"], model_type="toy")
    assert str(error.value).startswith("the permutation spec of toy contradicts itself: 3 problems\n")


def test_sizes_by_full_name_go_first():
    spec = PermutationSpec.from_lines(["a  n.0 n.1"], sizes={"n": 4, "n.1": 7}, symmetric=["n.1"])
    assert [spec.axes[axis].size for axis in ("n.0", "n.1")] == [4, 7]
    assert spec.symmetric_axes == ("n.1",)


def test_parents_come_before_the_axes_that_depend_on_them(spec):
    assert spec.symmetric_axes == ("residual", "experts.0", "pooled", "neurons.0")


def test_a_checkpoint_binds(spec):
    binding = spec.bind(SHAPES)
    assert binding.tensors["net.experts.1.up.weight"].index == (1,)
    assert binding.tensors["head.weight"].spec.expression == "labels  residual"
    assert binding.sizes["labels"] == 4
    assert binding.symmetric_axes == ("residual", "experts.0", "neurons.0")
    for name, bound in binding.tensors.items():
        assert binding.name_of(bound.spec, bound.index) == name


def test_a_condition_chooses_the_declaration(spec):
    binding = spec.bind({**SHAPES, "pooler.weight": (5, 6), "head.weight": (4, 5)})
    assert binding.tensors["head.weight"].spec.expression == "labels  pooled"
    assert "pooled" in binding.symmetric_axes


def test_optional_tensors_and_statistics_bind(spec):
    binding = spec.bind({**SHAPES, "net.norm.weight": (6,), "net.norm.count": ()})
    assert binding.tensors["net.norm.count"].spec.statistic
    assert not binding.tensors["net.norm.weight"].spec.statistic


def test_names_without_the_prefix_are_the_same_tensors(spec):
    bare = {name.removeprefix("net."): shape for name, shape in SHAPES.items()}
    assert {bound.spec.name for bound in spec.bind(bare).tensors.values()} == {
        bound.spec.name for bound in spec.bind(SHAPES).tensors.values()
    }
    with pytest.raises(SpecError, match=r"embed\.weight: the same tensor as net\.embed\.weight"):
        spec.bind({**SHAPES, "embed.weight": (11, 6)})


def test_every_misfit_is_named_at_once(spec):
    shapes = {**SHAPES, "net.router.weight": (3, 6), "net.embed.wieght": (11, 6)}
    del shapes["net.embed.weight"], shapes["net.experts.1.down.weight"]
    with pytest.raises(SpecError) as error:
        spec.bind(shapes)
    assert str(error.value).split("\n") == [
        "the checkpoint does not fit the permutation spec of toy: 4 problems",
        "  - net.embed.wieght: not declared; did you mean 'net.embed.weight'?",
        "  - net.embed.weight: missing, expected [vocab  residual]",
        "  - net.experts.1.down.weight: missing, expected [residual  neurons.0[experts]]",
        "  - net.router.weight: shape [3, 6] found, [2, 6] expected from the config [experts.0  residual]",
    ]


def test_a_size_that_only_the_checkpoint_tells_is_the_same_everywhere():
    spec = PermutationSpec.from_lines(["p  (labels 2)", "w  labels", "b  labels"], sizes={"labels": None}, symmetric=[])
    assert spec.bind({"p": (6,), "w": (3,), "b": (3,)}).sizes["labels"] == 3
    with pytest.raises(SpecError, match=r"b: shape \[4\] found, \[3\] expected"):
        spec.bind({"p": (6,), "w": (3,), "b": (4,)})
    lonely = PermutationSpec.from_lines(["p  (labels 2)"], sizes={"labels": None}, symmetric=[])
    with pytest.raises(SpecError, match=r"p: shape \[6\] does not tell the size of 'labels'"):
        lonely.bind({"p": (6,)})


def test_a_wrong_number_of_dimensions(spec):
    with pytest.raises(SpecError, match=r"net\.embed\.weight: shape \[11, 6, 1\] found, \[11, 6\] expected"):
        spec.bind({**SHAPES, "net.embed.weight": (11, 6, 1)})
    with pytest.raises(SpecError, match=r"head\.weight: shape \[\] does not tell the size of 'labels'"):
        spec.bind({**SHAPES, "head.weight": ()})


def test_a_checkpoint_of_another_architecture_is_refused_quickly(spec):
    strangers = {f"transformer.h.{layer}.attn.weight": (6, 6) for layer in range(3000)}
    with pytest.raises(SpecError, match="3007 problems"):
        spec.bind(strangers)


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        (["residual"], ("experts.0", "pooled", "neurons.0")),
        (["neurons"], ("residual", "experts.0", "pooled")),
        (["neurons.0"], ("residual", "experts.0", "pooled")),
        (["*.0"], ("residual", "pooled")),
        (["residual", "p*"], ("experts.0", "neurons.0")),
        (["vocab"], ("residual", "experts.0", "pooled", "neurons.0")),
        ([], ("residual", "experts.0", "pooled", "neurons.0")),
    ],
)
def test_axes_can_be_fixed_by_pattern(spec, patterns, left):
    assert spec.fix(*patterns).symmetric_axes == left
    assert spec.keep(*patterns).symmetric_axes == tuple(axis for axis in spec.symmetric_axes if axis not in left)
    assert spec.fix(*patterns).axes.keys() == spec.axes.keys()


def test_a_pattern_that_matches_nothing_suggests(spec):
    with pytest.raises(SpecError) as error:
        spec.fix("residuals", "heads.*")
    assert "no axis matches 'residuals'; did you mean 'residual'?" in str(error.value)
    assert "no axis matches 'heads.*'" in str(error.value)
    assert "axes: experts, labels, neurons, pooled, residual, vocab" in str(error.value)
    with pytest.raises(SpecError, match="no axis matches 'residuals'"):
        spec.keep("residuals")


def test_a_fixed_axis_no_longer_moves(spec):
    random = spec.fix("residual", "experts").random_alignment(torch.Generator().manual_seed(0))
    assert set(random.transforms) == {"pooled", "neurons.0"}
    assert set(spec.fix("residual").identity_alignment().transforms) == {"experts.0", "pooled", "neurons.0"}


def test_the_table_reads_as_the_declarations_were_written(spec):
    rows = spec.table()
    assert rows[0] == {"tensor": "net.embed.weight", "axes": "vocab  residual", "symmetric": "residual"}
    assert rows[1]["symmetric"] == "experts.0 neurons.0 residual"
    assert rows[4]["tensor"] == "net.norm.weight?"
    assert len(rows) == len(LINES)
    assert spec.fix("residual").table()[0]["symmetric"] == ""


@pytest.mark.parametrize(
    ("place", "value"),
    [(0, 8), (1, "many"), (2, None), (3, ["residual"]), (3, "nobody"), (4, "any"), (4, [])],
    ids=str,
)
def test_an_axis_that_is_none_is_refused_as_it_is_read(place, value):
    values = PermutationSpec.from_config(tiny_config("bert")).to_dict()
    assert PermutationSpec.from_dict(values).to_dict() == values
    values["axes"][1][place] = value
    with pytest.raises(SpecError, match=r"not a permutation spec: .*(of the axis|which is none)"):
        PermutationSpec.from_dict(values)


def test_without_adapters_the_error_says_what_to_import(monkeypatch):
    monkeypatch.setattr(PermutationSpec, "look_up", None)
    with pytest.raises(SpecError, match="import PermutationSpec from hf_llfc"):
        PermutationSpec.from_config(tiny_config("bert"))
