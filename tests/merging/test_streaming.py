"""Merging in parts gives the bytes of merging whole tensors, whoever does which part, within the memory allowed."""

import threading
import time
from math import prod

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_llfc.checkpoints import TensorInfo
from hf_llfc.checkpoints.files import LocalFiles, open_weights
from hf_llfc.checkpoints.source import Moved, Source
from hf_llfc.checkpoints.writing.shards import ShardFiles, ShardLayout
from hf_llfc.errors import CheckpointError
from hf_llfc.merging import Merge, WeightSchedule, merge_streamed, streaming
from hf_llfc.merging.methods import Base, find_method
from hf_llfc.merging.methods.parts import PART as METHOD_PART
from hf_llfc.parallel.forked import can_fork
from hf_llfc.parallel.workers import Workers

WEIGHTS = (0.3, 0.7)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(streaming, "CHUNK", 32)
    monkeypatch.setattr(streaming, "PART", 100)


@pytest.fixture(params=["threads", "copies"])
def workers(request, monkeypatch):
    """Two workers: threads, and copies of the process where there can be any."""
    if request.param == "copies":
        monkeypatch.setattr(streaming, "FORKED", 0)
    return Workers(2)


def network(generator, dtype=torch.bfloat16):
    return {
        "embed.weight": torch.randn(37, 11, generator=generator).to(dtype),
        "layers.0.weight": torch.randn(16, 16, generator=generator).to(dtype),
        "layers.0.scale": torch.randn((), generator=generator).to(dtype),
        "layers.0.nothing": torch.empty(0, 4, dtype=dtype),
        "bn.running_mean": torch.randn(5, generator=generator).to(dtype),
        "bn.running_var": torch.rand(5, generator=generator).to(dtype),
        "bn.num_batches_tracked": torch.tensor(7),
        "position_ids": torch.arange(9)[None],
    }


def infos_of(state):
    return {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}


def from_file(state, folder, label="file"):
    """A source whose tensors can be read in parts."""
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    weights = open_weights(LocalFiles(label, folder))
    return Source(label, weights.read, weights.span)


def from_memory(state, label="memory"):
    return Source(label, state.__getitem__)


def written(merge, folder, **options):
    """The merged tensors as they are found on the disk."""
    folder.mkdir()
    with ShardFiles(folder, ShardLayout.of(merge.infos, 1000)).create() as files:
        merge_streamed(merge, files, **options)
    return {name: tensor for path in folder.iterdir() for name, tensor in load_file(path).items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("over_base", [False, True])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_parts_make_the_whole(generator, tmp_path, threads, over_base, out_dtype):
    states = [network(generator), network(generator, torch.float32), network(generator, torch.float16)]
    infos = {
        name: TensorInfo(out_dtype, info.shape) if info.dtype.is_floating_point else info
        for name, info in infos_of(states[0]).items()
    }
    sources = [from_file(states[0], tmp_path / "a"), from_memory(states[1])]
    base = from_file(states[2], tmp_path / "base") if over_base else None
    schedules = [WeightSchedule.constant(weight) for weight in WEIGHTS]
    merge = Merge.plan(sources, infos, schedules, base=base)
    assert_same(written(merge, tmp_path / "out", workers=Workers(threads)), dict(merge.tensors()))


def test_parts_read_from_files_alone_make_the_whole(generator, tmp_path, workers):
    states = [network(generator), network(generator)]
    sources = [from_file(state, tmp_path / letter) for state, letter in zip(states, "ab", strict=True)]
    merge = Merge.plan(sources, infos_of(states[0]), [WeightSchedule.constant(weight) for weight in WEIGHTS])
    in_memory = Merge(list(map(from_memory, states)), merge.infos, merge.weights)
    assert_same(written(merge, tmp_path / "out", workers=workers), dict(in_memory.tensors()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("by_rows", "by_columns"), [(True, True), (True, False), (False, True), (False, False)])
def test_rows_and_columns_are_moved_as_they_are_summed(by_rows, by_columns, dtype, generator, tmp_path, workers):
    shapes = {"tall": (37, 11), "a row more than a part": (3, 130), "vector": (250,), "one": (1,)}
    states = [
        {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()} for _ in range(2)
    ]
    places = {
        name: [
            torch.randperm(size, generator=generator) if moves else None
            for size, moves in zip(shape, (by_rows, by_columns), strict=False)
        ]
        for name, shape in shapes.items()
    }
    stored = from_file(states[1], tmp_path / "b")

    def moved(name):
        rows, columns = (None if index is None else index.numpy() for index in [*places[name], None][:2])
        return Moved(stored.span(name), (shapes[name][0], prod(shapes[name][1:])), rows, columns)

    by_hand = dict(states[1])
    for name, indices in places.items():
        for dimension, index in enumerate(indices):
            by_hand[name] = by_hand[name] if index is None else by_hand[name].index_select(dimension, index)
    schedules = [WeightSchedule.constant(weight) for weight in WEIGHTS]
    sources = [from_file(states[0], tmp_path / "a"), Source("moved", by_hand.__getitem__, moved=moved)]
    found = written(Merge.plan(sources, infos_of(states[0]), schedules), tmp_path / "out", workers=workers)
    expected = Merge.plan([from_memory(states[0]), from_memory(by_hand)], infos_of(states[0]), schedules)
    assert_same(found, dict(expected.tensors()))


def test_one_model_is_copied_bit_for_bit(generator, tmp_path, workers):
    state = network(generator)
    merge = Merge.copy(from_file(state, tmp_path / "a"), infos_of(state))
    found = written(merge, tmp_path / "out", workers=workers)
    for name, tensor in state.items():
        assert found[name].reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()


def test_a_copy_from_a_file_is_never_in_memory_as_a_whole(generator, tmp_path):
    state = network(generator)
    source = from_file(state, tmp_path / "a")

    def refuse(name):
        raise AssertionError(f"{name} was read as a whole")

    merge = Merge.copy(Source("file", refuse, source.span), infos_of(state))
    assert_same(written(merge, tmp_path / "out"), state)


def test_processes_write_every_byte_once(generator, tmp_path):
    states = [network(generator), network(generator)]
    sources = [from_file(state, tmp_path / letter) for state, letter in zip(states, "ab", strict=True)]
    merge = Merge.plan(sources, infos_of(states[0]), [WeightSchedule.constant(weight) for weight in WEIGHTS])
    layout = ShardLayout.of(merge.infos, 1000)
    (tmp_path / "out").mkdir()
    ranks, exchanged = 3, {}
    meeting = threading.Barrier(ranks)

    def work(rank):
        def gather(value):
            exchanged[rank] = value
            meeting.wait()
            return [exchanged[other] for other in range(ranks)]

        with ShardFiles(tmp_path / "out", layout) as files:
            counted = Counting(files)
            merge_streamed(merge, counted, workers=Workers(1, rank, ranks, gather))
        bytes_of[rank] = counted.bytes

    bytes_of = {}
    ShardFiles(tmp_path / "out", layout).create()
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(bytes_of.values()) == sum(info.nbytes for info in merge.infos.values())
    assert all(bytes_of.values())
    found = {name: tensor for path in (tmp_path / "out").iterdir() for name, tensor in load_file(path).items()}
    assert_same(found, dict(merge.tensors()))


class Counting:
    """A sink that passes bytes on and counts them."""

    def __init__(self, sink):
        self.sink = sink
        self.bytes = 0

    def put(self, name, start, data):
        self.bytes += len(data)
        return self.sink.put(name, start, data)

    def note(self, written):
        self.sink.note(written)


class Nowhere:
    def put(self, name, start, data):
        pass

    def note(self, written):
        pass


@pytest.mark.parametrize(
    ("limit", "most"),
    [
        (0, 1),  # one is always read
        (2 * 2 * 64 * 4, 1),  # not quite two tensors of two models, each counted twice
        (10**9, 4),
    ],
)
def test_whole_tensors_keep_to_the_budget(limit, most):
    state = {f"layers.{place}.weight": torch.ones(64) for place in range(8)}
    inside, peak, lock = set(), 0, threading.Lock()
    full = threading.Barrier(most) if most > 1 else None

    def read(name):
        nonlocal peak
        with lock:
            inside.add(name)
            peak = max(peak, len(inside))
        if full is not None:
            full.wait(timeout=10)
        return state[name]

    class Leaving(Nowhere):
        def put(self, name, start, data):
            with lock:
                inside.discard(name)

    merge = Merge([Source("a", read)], infos_of(state), dict.fromkeys(state, (0.5,)))
    merge_streamed(merge, Leaving(), workers=Workers(4), memory=limit if most > 1 else min(limit, 2 * 64 * 4))
    assert peak == most


@pytest.mark.skipif(not can_fork(), reason="the system's libraries do not stand a fork")
@pytest.mark.parametrize("limit", [0, 2 * 2 * 64 * 4])
def test_copies_keep_to_one_budget(limit, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "FORKED", 0)
    state = {f"layers.{place}.weight": torch.ones(64) for place in range(8)}

    def read(name):
        (tmp_path / name).touch()
        time.sleep(0.02)
        return state[name]

    class Leaving(Nowhere):
        def put(self, name, start, data):
            (tmp_path / "peaks").mkdir(exist_ok=True)
            inside = len(list(tmp_path.iterdir())) - 1
            (tmp_path / "peaks" / f"{name} {inside}").touch()
            (tmp_path / name).unlink()

    merge = Merge([Source("a", read)], infos_of(state), dict.fromkeys(state, (0.5,)))
    merge_streamed(merge, Leaving(), workers=Workers(4), memory=limit)
    peaks = [int(path.name.split()[1]) for path in (tmp_path / "peaks").iterdir()]
    assert len(peaks) == 8 and max(peaks) == (1 if limit == 0 else 2)


BY_METHOD = [
    ("nearswap", 1, {"t": 0.3}),
    ("ram", 2, {}),
    ("slerp", 1, {"t": 0.3}),
    ("nuslerp", 2, {"weight": 0.5, "nuslerp_flatten": False}),
    ("nuslerp", 2, {"weight": 0.5, "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("model_stock", 2, {"filter_wise": True}),
    ("ramplus_tl", 2, {}),
    ("sce", 2, {"select_topk": 0.5}),
    ("ties", 2, {"weight": 0.5, "density": 0.5}),
    ("breadcrumbs", 2, {"weight": 0.5, "density": 0.5, "gamma": 0.1}),
    ("dare_ties", 2, {"weight": 0.5, "density": 0.5}),
    ("della", 2, {"weight": 0.5, "density": 0.5}),
    ("arcee_fusion", 1, {}),
    ("tsv_m", 2, {}),
    ("wudi", 2, {}),
]


def by_method(name, states, values, sources, base):
    """A merge of every tensor by a method."""
    method, infos = find_method(name), infos_of(states[0])
    settings = {tensor: method.settings(values, models=len(sources), tensor=tensor) for tensor in infos}
    return Merge(sources, infos, {}, base, method, settings)


@pytest.mark.parametrize(("name", "count", "values"), BY_METHOD, ids=str)
def test_methods_read_files_in_parts_and_make_the_whole(name, count, values, generator, tmp_path, workers, monkeypatch):
    monkeypatch.setattr(streaming, "PART", 3 * METHOD_PART)
    common = {
        "wide": torch.randn(37, 5000, generator=generator),
        "kernel": torch.randn(9, 6, 2, 2, generator=generator),
        "vector": torch.randn(300, generator=generator),
        "one": torch.randn((), generator=generator),
        "nothing": torch.empty(0, 4),
        "position_ids": torch.arange(9)[None],
    }
    states = [
        {
            tensor: value + 0.1 * torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
            for tensor, value in common.items()
        }
        for _ in range(count + 1)
    ]
    files = [from_file(state, tmp_path / str(index), str(index)) for index, state in enumerate(states)]
    has_base = find_method(name).base is not Base.NONE and name != "nuslerp"
    sources, base = (files[1:], files[0]) if has_base else (files[:count], None)
    in_parts = [Source(each.label, only_whole_numbers(each), each.span) for each in sources]
    of_base = None if base is None else Source(base.label, only_whole_numbers(base), base.span)
    found = written(by_method(name, states, values, in_parts, of_base), tmp_path / "out", workers=workers)
    expected = by_method(name, states, values, sources, base)
    assert_same(found, dict(expected.tensors()))


def only_whole_numbers(source):
    """Reads tensors as wholes that no method merges, and no others."""

    def read(tensor):
        assert tensor == "position_ids", f"{tensor} was read as a whole"
        return source.read(tensor)

    return read


@pytest.mark.parametrize("place", [0, 100_000])
@pytest.mark.parametrize("name", ["ram", "ties", "iso_c"])
def test_a_number_that_a_method_would_hide_is_named(name, place, generator, tmp_path, workers):
    states = [{"w": torch.randn(400, 300, generator=generator)} for _ in range(2)]
    states[1]["w"].view(-1)[place] = float("nan")
    base, model = (from_file(state, tmp_path / letter, letter) for state, letter in zip(states, "ab", strict=True))
    values = {"weight": 1.0, "density": 0.1} if name == "ties" else {}
    with pytest.raises(CheckpointError, match=rf"w of b: 1 of 120000 elements .* flat index {place};"):
        merge_streamed(by_method(name, states, values, [model], base), Nowhere(), workers=workers)


def test_what_a_method_makes_beyond_the_range_is_named(tmp_path):
    state = {"w": torch.full((200,), 6e4, dtype=torch.float16)}
    merge = by_method("passthrough", [state], {"scale": 2.0}, [from_file(state, tmp_path / "a")], None)
    with pytest.raises(CheckpointError, match=r"w: what passthrough computes is beyond the range of float16"):
        merge_streamed(merge, Nowhere())


@pytest.mark.parametrize("place", [0, 150, 406])
def test_a_number_that_is_not_finite_is_named_as_in_the_whole_tensor(generator, tmp_path, place, workers):
    states = [network(generator), network(generator)]
    states[1]["embed.weight"].view(-1)[place] = float("inf")
    sources = [from_file(state, tmp_path / letter, f"org/{letter}") for state, letter in zip(states, "ab", strict=True)]
    merge = Merge.plan(sources, infos_of(states[0]), [WeightSchedule.constant(weight) for weight in WEIGHTS])
    with pytest.raises(CheckpointError, match=rf"embed\.weight of org/b: 1 of 407 .* flat index {place};"):
        merge_streamed(merge, Nowhere(), workers=workers)


def test_a_sum_beyond_the_range_is_named(tmp_path):
    state = {"w": torch.full((200,), 6e4, dtype=torch.float16)}
    sources = [from_file(state, tmp_path / letter) for letter in "ab"]
    merge = Merge(sources, infos_of(state), {"w": (1.0, 1.0)})
    with pytest.raises(CheckpointError, match=r"w: a merged value of 120000 is beyond the range of float16"):
        merge_streamed(merge, Nowhere())


def test_shapes_that_differ_are_refused(generator, tmp_path):
    a, b = {"w": torch.ones(200)}, {"w": torch.ones(100)}
    merge = Merge([from_file(a, tmp_path / "a"), from_file(b, tmp_path / "b")], infos_of(a), {"w": WEIGHTS})
    with pytest.raises(CheckpointError, match=r"w: file has shape \(100,\)"):
        merge_streamed(merge, Nowhere())


def test_a_file_that_is_cut_off_meanwhile_is_one_error(tmp_path):
    state = {"w": torch.ones(400)}
    source = from_file(state, tmp_path / "a")
    source.span("w")
    path = tmp_path / "a" / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)
    merge = Merge([source], infos_of(state), {"w": (0.5,)})
    with pytest.raises(CheckpointError, match="the file was cut off while it was read: of tensor w"):
        merge_streamed(merge, Nowhere())


def test_progress_ends_at_the_end(generator, tmp_path, workers):
    state = network(generator)
    told = []
    merge = Merge([from_memory(state)], infos_of(state), dict.fromkeys(state, (1.0,)))
    merge_streamed(merge, Nowhere(), workers=workers, on_bytes=lambda done, total: told.append((done, total)))
    dones, totals = zip(*told, strict=True)
    assert list(dones) == sorted(dones) and len(set(totals)) == 1 and dones[-1] == totals[-1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_what_is_not_finite_is_refused_of_a_copy_with_its_place(value, generator, tmp_path, workers):
    state = network(generator)
    state["embed.weight"][30, 3] = value
    merge = Merge.copy(from_file(state, tmp_path / "a", "org/a"), infos_of(state))
    with pytest.raises(CheckpointError, match=r"embed\.weight of org/a: 1 of 407 .* the first at flat index 333"):
        written(merge, tmp_path / "out", workers=workers)
