"""The loaders: one plan, the stated pixels, exact places, and what becomes of damaged images."""

import dataclasses
import gc
import io
import os
import threading
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from backmix.pipeline import draws, order, resident
from backmix.pipeline.batch import Batch, Place
from backmix.pipeline.beton import JPG, RAW, open_set
from backmix.pipeline.loader import Loader, open_loader
from backmix.pipeline.options import LoaderOptions
from backmix.pipeline.plan import Plan
from backmix.pipeline.subset import Subset, select
from backmix.pipeline.turbo import Turbo
from tests.pipeline.photos import (
    damage,
    open_descriptors,
    record,
    warning_record,
    write_photos,
    write_records,
)

N = 37
FIELDS = [field.name for field in dataclasses.fields(Batch)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """37 samples, every third raw, sides of 30 to 90 px, three classes."""
    return write_photos(tmp_path_factory.mktemp("photos") / "photos.beton", N)


def installed() -> bool:
    """Whether regions can be decoded here."""
    return find_spec("nvidia") is not None and find_spec("nvidia.nvimgcodec") is not None


def options(loader="turbo", **changes) -> LoaderOptions:
    return LoaderOptions(**{"loader": loader, "batch": 8, "size": 24, "threads": 2} | changes)


def read(loader: Loader, place: Place) -> list[Batch]:
    return list(loader.batches(place))


def shown(batch: Batch) -> np.ndarray:
    """The pixels of a batch's images, wherever its pool is."""
    return batch.pool[batch.rows].cpu().numpy()


def joined(batches: list[Batch], name: str) -> np.ndarray:
    parts = [shown(b) if name == "pixels" else getattr(b, name).cpu().numpy() for b in batches]
    return np.concatenate(parts)


def assert_same(batches: list[Batch], others: list[Batch], *, pixels: bool = True) -> None:
    """Assert that two loaders delivered the same batches."""
    assert [batch.place for batch in batches] == [batch.place for batch in others]
    assert [len(batch) for batch in batches] == [len(batch) for batch in others]
    for name in ["index", "labels", "boxes", "sizes", "status"] + ["pixels"] * pixels:
        assert np.array_equal(joined(batches, name), joined(others, name)), name


# --- what is delivered ----------------------------------------------------------------------------


@pytest.mark.parametrize("crop", ["whole", "random"])
def test_a_training_batch_is_the_next_part_of_the_order(photos, crop):
    with open_set(photos) as data, open_loader(photos, options(crop=crop)) as loader:
        assert loader.samples == N and not loader.resident
        batches = read(loader, Place(7, 3))
        expected = order.order(7, 3, N)
        assert [len(batch) for batch in batches] == [8, 8, 8, 8, 5]
        assert [batch.place for batch in batches] == [Place(7, 3, k) for k in (8, 16, 24, 32, 37)]
        assert joined(batches, "index").tolist() == expected.tolist()
        assert (joined(batches, "labels") == data.labels[expected]).all()
        assert (joined(batches, "sizes") == data.sizes[expected]).all()
        boxes = draws.whole_boxes(data.sizes[expected])
        if crop == "random":
            boxes = draws.crop_boxes(
                7, 3, expected, data.sizes[expected], (0.08, 1), (3 / 4, 4 / 3)
            )
        assert (joined(batches, "boxes") == boxes).all()
        for batch in batches:
            n = len(batch)
            assert batch.pool.shape == (n, 24, 24, 3) and batch.pool.is_contiguous()
            assert batch.rows.tolist() == list(range(n)) and batch.group == 8
            assert batch.pool_index.tolist() == batch.index.tolist()
            assert not batch.status.any()
            kinds = [getattr(batch, name).dtype for name in FIELDS[:8]]
            int64, int32, uint8 = torch.int64, torch.int32, torch.uint8
            assert kinds == [uint8, int64, int64, int64, int64, int32, int32, uint8]


def test_pixels_are_those_of_pillow_within_one_level(photos):
    """Pillow decodes with the same DCT and resizes a crop with the same filter, rounding aside."""
    with open_set(photos) as data, open_loader(photos, options(crop="random", size=40)) as loader:
        batches = read(loader, Place(1))
        worst, total = 0, 0.0
        for pixels, index, box in zip(
            joined(batches, "pixels"),
            joined(batches, "index"),
            joined(batches, "boxes"),
            strict=True,
        ):
            stored = data.region(int(index))
            if data.modes[index] == JPG:
                image = Image.open(io.BytesIO(stored.tobytes()))
            else:
                image = Image.fromarray(stored.reshape(*data.sizes[index], 3))
            y0, x0, h, w = box.tolist()
            part = image.crop((x0, y0, x0 + w, y0 + h)).resize((40, 40), Image.Resampling.BILINEAR)
            distance = np.abs(np.asarray(part).astype(int) - pixels)
            worst, total = max(worst, int(distance.max())), total + distance.mean()
        assert worst <= 1 and total / N < 0.05


def test_an_image_of_the_view_s_size_is_copied_bit_for_bit(tmp_path):
    records = [record(k, RAW if k % 2 else JPG, (24, 24)) for k in range(6)]
    path = write_records(tmp_path / "x.beton", records)
    for loader in ("turbo", "resident"):
        with open_loader(path, options(loader), split="eval") as opened:
            (batch,) = read(opened, Place(0))
        for k, one in enumerate(records):
            whole = one.data if one.mode == RAW else simplejpeg.decode_jpeg(one.data)
            assert np.array_equal(shown(batch)[k], whole)


def test_resident_delivers_what_turbo_delivers(photos):
    with (
        open_loader(photos, options("turbo")) as turbo,
        open_loader(photos, options("resident")) as whole,
    ):
        assert whole.resident and whole.samples == N
        for place in (Place(3), Place(3, 5), Place(3, 5, 19)):
            assert_same(read(turbo, place), read(whole, place))
        batches = read(whole, Place(3))
        pool = batches[0].pool
        assert all(batch.pool is pool and batch.group == 0 for batch in batches)
        assert pool.shape == (N, 24, 24, 3)
        for batch in batches:
            assert (batch.pool_index[batch.rows] == batch.index).all()
            assert (whole.subset.index[batch.rows.numpy()] == batch.index.numpy()).all()


@pytest.mark.parametrize("loader", ["turbo", "resident"])
def test_evaluation_takes_the_stored_order_whatever_the_epoch(photos, loader):
    with (
        open_set(photos) as data,
        open_loader(photos, options(loader, crop="random", eval_crop=0.8), split="eval") as opened,
    ):
        batches = read(opened, Place(5, 2))
        assert joined(batches, "index").tolist() == list(range(N))
        assert (joined(batches, "boxes") == draws.centre_boxes(data.sizes, 0.8)).all()
        assert_same(batches, [dataclasses.replace(b, place=dataclasses.replace(b.place, epoch=2))
                              for b in read(opened, Place(5, 9))])  # fmt: skip


@pytest.mark.parametrize("loader", ["turbo", "resident"])
def test_a_subset_delivers_its_samples_with_its_labels(photos, loader):
    with open_set(photos) as data:
        subset = select(data.labels, [2, 0])
    with open_loader(photos, options(loader), subset=subset) as opened:
        batches = read(opened, Place(0))
        label_of = dict(zip(subset.index.tolist(), subset.labels.tolist(), strict=True))
        index = joined(batches, "index").tolist()
        assert sorted(index) == subset.index.tolist()
        assert joined(batches, "labels").tolist() == [label_of[i] for i in index]
        assert opened.samples == len(subset)


def test_several_files_are_one_data_set(photos, tmp_path):
    parts = [write_photos(tmp_path / "a.beton", 20), write_photos(tmp_path / "b.beton", 17, 20)]
    with (
        open_loader(photos, options(crop="random")) as one,
        open_loader(parts, options(crop="random")) as several,
    ):
        assert_same(read(one, Place(2)), read(several, Place(2)))


def test_windowed_order_follows_the_pages(tmp_path):
    side = 700  # 1.47 MB each, so that a page of 2 MiB holds one
    path = write_records(tmp_path / "x.beton", [record(k, RAW, (side, side)) for k in range(7)])
    with open_set(path) as data, open_loader(path, options(order="windowed", window=2)) as loader:
        assert len(np.unique(data.pages)) == 7
        expected = order.windowed_order(4, 1, data.pages, 2)
        assert joined(read(loader, Place(4, 1)), "index").tolist() == expected.tolist()


def test_growing_views_have_the_size_of_their_epoch_and_else_change_nothing(photos):
    growing = options(crop="random", size=64, grow_from=24, grow=(0, 4))
    with open_loader(photos, growing) as loader:
        for epoch, side in [(0, 24), (1, 32), (2, 32), (3, 64), (4, 64), (0, 24)]:
            batches = read(loader, Place(5, epoch, 3))
            assert {batch.pool.shape[1:] for batch in batches} == {(side, side, 3)}
            with open_loader(photos, options(crop="random", size=side)) as fixed:
                assert_same(batches, read(fixed, Place(5, epoch, 3)))
    with open_loader(photos, growing, split="eval") as evaluation:
        assert next(evaluation.batches(Place(5))).pool.shape == (8, 64, 64, 3)


def test_a_resident_pool_does_not_grow_and_auto_knows(photos):
    growing = {"size": 32, "grow_from": 16, "grow": (1, 2)}
    with pytest.raises(ValueError, match=r"cannot grow: choose --loader.loader turbo"):
        open_loader(photos, options("resident", **growing))
    with open_loader(photos, options("auto", **growing)) as loader:
        assert isinstance(loader.engine, Turbo)
    with open_loader(photos, options("resident", **growing), split="eval") as evaluation:
        assert next(evaluation.batches(Place(0))).pool.shape == (N, 32, 32, 3)


# --- places, ranks, threads -----------------------------------------------------------------------


@pytest.mark.parametrize("loader", ["turbo", "resident"])
def test_any_place_continues_with_exactly_the_rest(photos, loader):
    crop = "random" if loader == "turbo" else "whole"
    with open_loader(photos, options(loader, crop=crop)) as opened:
        whole = read(opened, Place(6, 1))
        for consumed in range(N + 1):
            rest = read(opened, Place(6, 1, consumed))
            if consumed == N:
                assert rest == []
                continue
            for name in ("index", "labels", "boxes", "sizes", "status", "pixels"):
                assert np.array_equal(joined(rest, name), joined(whole, name)[consumed:]), name
            # From the next whole step on, the batches are the same, too.
            steps = -(-consumed // 8)
            assert [b.place for b in rest[-(5 - steps) or len(rest) :]] == [
                b.place for b in whole[steps:]
            ]


def test_the_order_of_the_next_epoch_is_computed_beside_this_one(photos, monkeypatch):
    computed = []
    real = Plan.sequence

    def sequence(plan, place):
        computed.append((place.epoch, threading.current_thread() is threading.main_thread()))
        return real(plan, place)

    monkeypatch.setattr(Plan, "sequence", sequence)
    with open_loader(photos, options(order="windowed", window=1)) as loader:
        following = [read(loader, Place(3, epoch)) for epoch in (0, 1, 2, 7, 8)]
    # Of the seventh nobody knew that it would come, and the last one is asked for in vain.
    here, beside = True, False
    assert computed == [
        *[(0, here), (1, beside), (2, beside), (3, beside)],
        *[(7, here), (8, beside), (9, beside)],
    ]
    for epoch, batches in zip((0, 1, 2, 7, 8), following, strict=True):
        with open_loader(photos, options(order="windowed", window=1)) as loader:
            assert_same(batches, read(loader, Place(3, epoch)))
    with open_loader(photos, options()) as loader:
        read(loader, Place(3, 0))
        ahead = read(loader, Place(4, 1))  # another seed: what was computed is of no use
    with open_loader(photos, options()) as loader:
        assert_same(ahead, read(loader, Place(4, 1)))


def test_a_place_of_other_data_is_refused(photos):
    with open_loader(photos, options()) as loader:
        for place in (Place(0, 0, N + 1), Place(0, 0, -1), Place(0, -1)):
            with pytest.raises(ValueError, match="no place in a set of 37 samples"):
                read(loader, place)


@pytest.mark.parametrize("changes", [{"threads": 1}, {"threads": 5}, {"prefetch": 0},
                                     {"prefetch": 50}])  # fmt: skip
def test_threads_and_prefetch_change_nothing(photos, changes):
    with (
        open_loader(photos, options(crop="random", batch=16)) as one,
        open_loader(photos, options(crop="random", batch=16, **changes)) as other,
    ):
        assert_same(read(one, Place(0, 2)), read(other, Place(0, 2)))


@given(
    n=st.integers(1, 200),
    groups=st.integers(1, 8),
    group=st.integers(1, 9),
    world=st.integers(1, 9),
    consumed=st.integers(0, 200),
    training=st.booleans(),
)
def test_the_ranks_share_every_step_in_whole_groups(
    photos, n, groups, group, world, consumed, training
):
    chosen = LoaderOptions(batch=groups * group, group=group)
    consumed = min(consumed, n)
    with open_set(photos) as data:
        subset = Subset(np.arange(n), np.zeros(n, np.int64))
        plans = [Plan(data, subset, chosen, training, rank, world) for rank in range(world)]
        single = list(Plan(data, subset, chosen, training).parts(Place(1, 2, consumed)))
        shares = [list(plan.parts(Place(1, 2, consumed))) for plan in plans]
    assert sum(len(part.positions) for part in single) == n - consumed
    for step, whole in enumerate(single):
        parts = [share[step] for share in shares]
        assert all(part.place == whole.place for part in parts)
        # In the order of the ranks they are the step: contiguous, nothing twice, nothing missing.
        assert np.concatenate([p.positions for p in parts]).tolist() == whole.positions.tolist()
        sizes = [len(part.positions) for part in parts]
        if training:
            filled = [size for size in sizes if size]
            assert all(size % group == 0 for size in filled[:-1])
            if -(-len(whole.positions) // group) >= world:
                assert all(sizes)
        else:
            assert max(sizes) - min(sizes) <= 1


@given(
    n=st.integers(1, 150),
    before=st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(1, 6)),
    after=st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(1, 6)),
    steps=st.integers(0, 60),
    shuffle=st.sampled_from(["full", "windowed"]),
    training=st.booleans(),
)
def test_a_place_continues_on_other_ranks_and_batches(
    photos, n, before, after, steps, shuffle, training
):
    """Every sample once, in the epoch's order, with the draws that it has without a break.

    `before` and `after`: groups per batch, images per group, ranks.
    """
    place, whole = Place(3, 4), []
    with open_set(photos) as data:
        generator = np.random.default_rng(n)
        # More samples than the file has, so that the pages can be many, too.
        many = dataclasses.replace(
            data,
            sizes=generator.integers(1, 500, (n, 2)).astype(np.int32),
            pages=np.sort(generator.integers(0, 12, n)),
        )

        def plans(groups: int, group: int, world: int) -> list[Plan]:
            chosen = LoaderOptions(
                batch=groups * group, group=group, crop="random", order=shuffle, window=3
            )
            subset = Subset(np.arange(n), np.zeros(n, np.int64))
            return [Plan(many, subset, chosen, training, rank, world) for rank in range(world)]

        def delivered(ranks: list[Plan], place: Place, most: int) -> tuple[np.ndarray, Place]:
            shares = [list(plan.parts(place))[:most] for plan in ranks]
            parts = [part for step in zip(*shares, strict=True) for part in step]
            positions = [part.positions for part in parts]
            return np.concatenate([np.empty(0, np.int64), *positions]), (
                parts[-1].place if parts else place
            )

        (alone,) = plans(1, 1, 1)
        whole, _ = delivered([alone], place, n)
        first, between = delivered(plans(*before), place, steps)
        rest, end = delivered(plans(*after), between, n)
        assert between.consumed == len(first)
        assert np.concatenate([first, rest]).tolist() == whole.tolist()
        assert sorted(whole.tolist()) == list(range(n)) and end.consumed == n
        boxes = alone.boxes(place, whole)
        later = plans(*after)[-1].boxes(between, rest)
        assert np.array_equal(later, boxes[len(first) :])


def test_a_rank_without_a_group_gets_empty_batches(photos):
    with open_loader(photos, options(group=8), rank=0, world=2) as loader:
        batches = read(loader, Place(0))
        assert [len(batch) for batch in batches] == [0] * 5
        assert batches[0].pool.shape == (0, 24, 24, 3) and batches[-1].place.consumed == N


def test_two_ranks_deliver_the_pixels_of_one(photos):
    chosen = options(crop="random", group=4)
    with open_loader(photos, chosen) as alone:
        whole = read(alone, Place(3, 1))
    shares = []
    for rank in (0, 1):
        with open_loader(photos, chosen, rank=rank, world=2) as loader:
            shares.append(read(loader, Place(3, 1)))
    for step, batch in enumerate(whole):
        halves = [share[step] for share in shares]
        assert np.array_equal(joined(halves, "pixels"), shown(batch))
        assert np.array_equal(joined(halves, "boxes"), batch.boxes.numpy())


def resident_memory() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("kind", ["turbo", "turbo with regions", "resident"])
def test_leaving_early_a_thousand_times_leaks_nothing(photos, tmp_path, kind):
    """No thread, no file, no memory: a batch that stayed behind each time would be 49 MB."""
    changes = {"batch": 4, "size": 64, "prefetch": 1}
    if kind == "turbo with regions":
        if not installed():
            pytest.skip("nvImageCodec is not installed: not tested")
        photos = write_photos(tmp_path / "checked.beton", N, check="scaled")
        changes |= {"crop": "random", "decoder": "region"}
    with open_loader(photos, options(kind.split()[0], **changes)) as loader:
        for epoch in range(200):  # until threads and their memory are there
            next(loader.batches(Place(0, epoch)))
        gc.collect()
        before = threading.active_count(), open_descriptors()
        memory = resident_memory()
        for epoch in range(1000):
            for _ in loader.batches(Place(0, epoch)):
                break
        assert (threading.active_count(), open_descriptors()) == before
        assert resident_memory() - memory < 25e6
        assert [len(b) for b in read(loader, Place(0))] == [4] * 9 + [1]


def test_closing_joins_the_threads_and_closes_the_files(photos):
    before = threading.active_count(), open_descriptors()
    for _ in range(20):
        loader = open_loader(photos, options(threads=3))
        next(loader.batches(Place(0)))
        loader.close()
        assert (threading.active_count(), open_descriptors()) == before
        with pytest.raises(ValueError, match="closed"):
            read(loader, Place(0))


def test_a_batch_stays_valid_after_the_next_and_after_closing(photos):
    with open_loader(photos, options()) as loader:
        batches = read(loader, Place(0))
    with open_loader(photos, options()) as loader:
        for kept, batch in zip(batches, loader.batches(Place(0)), strict=True):
            assert torch.equal(kept.pool, batch.pool)


def test_closing_in_the_middle_of_an_epoch_ends_it_with_a_message(photos):
    loader = open_loader(photos, options(prefetch=1))
    batches = loader.batches(Place(0))
    next(batches)
    loader.close()
    with pytest.raises(ValueError, match="closed"):
        list(batches)


def test_decoding_threads_use_one_torch_thread_and_leave_training_its_own(photos):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        loader = open_loader(photos, options(threads=4))
        assert isinstance(loader.engine, Turbo)
        with loader:
            seen = [
                loader.engine._threads.submit(torch.get_num_threads).result() for _ in range(16)
            ]
            assert set(seen) == {1} and torch.get_num_threads() == 3
            later = []
            new = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
            new.start()
            new.join()
            assert later == [3]
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
@pytest.mark.parametrize("loader", ["turbo", "resident"])
def test_batches_on_the_gpu_are_those_of_the_cpu(photos, loader):
    with (
        open_loader(photos, options(loader)) as host,
        open_loader(photos, options(loader), device="cuda") as device,
    ):
        batches = read(device, Place(1, 1))
        assert_same(read(host, Place(1, 1)), batches)
        tensors = [name for name in FIELDS if isinstance(getattr(batches[0], name), torch.Tensor)]
        assert all(getattr(b, name).is_cuda for b in batches for name in tensors)


# --- damaged images -------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path) -> Path:
    """37 samples of which 5 (JPEG) and 9 (raw) do not match their checksums."""
    path = write_photos(tmp_path / "damaged.beton", N)
    damage(path, 5)
    damage(path, 9)
    return path


@pytest.mark.parametrize("loader", ["turbo", "resident"])
def test_a_damaged_image_is_replaced_in_training(damaged, loader):
    crop = "random" if loader == "turbo" else "whole"
    with (
        open_set(damaged) as data,
        open_loader(damaged, options(loader, crop=crop, max_bad=0.1)) as opened,
    ):
        seen = set()
        for epoch in range(4):
            batches = read(opened, Place(2, epoch))
            index, status = joined(batches, "index"), joined(batches, "status")
            expected = order.order(2, epoch, N)
            bad = np.isin(expected, [5, 9])
            assert (status == np.where(bad, 2, 0)).all()
            assert (index[~bad] == expected[~bad]).all()
            assert not np.isin(index, [5, 9]).any()
            # The replacement comes with its own label, size and box.
            assert (joined(batches, "labels") == data.labels[index]).all()
            assert (joined(batches, "sizes") == data.sizes[index]).all()
            boxes = draws.whole_boxes(data.sizes[index])
            if crop == "random":
                boxes = draws.crop_boxes(
                    2, epoch, index, data.sizes[index], (0.08, 1), (3 / 4, 4 / 3)
                )
            assert (joined(batches, "boxes") == boxes).all()
            seen |= set(index[bad].tolist())
            if loader == "resident":
                batch = batches[0]
                assert not np.isin(batch.pool_index.numpy(), [5, 9]).any()
                assert (batch.pool_index[batch.rows] == batch.index).all()
        assert len(seen) > 4  # drawn anew in every epoch
        assert sorted(opened.bad) == sorted([data.name(5), data.name(9)])


def test_replacements_are_the_same_on_both_loaders(damaged):
    with (
        open_loader(damaged, options("turbo", max_bad=0.1)) as turbo,
        open_loader(damaged, options("resident", max_bad=0.1)) as whole,
    ):
        for epoch in range(3):
            assert_same(read(turbo, Place(8, epoch)), read(whole, Place(8, epoch)))


def test_a_row_of_a_bad_image_shows_its_substitute(damaged):
    with open_loader(damaged, options("resident", max_bad=0.1)) as loader:
        batch = next(loader.batches(Place(0)))
        for row in (5, 9):
            shown_sample = int(batch.pool_index[row])
            assert shown_sample not in (5, 9)
            assert torch.equal(batch.pool[row], batch.pool[shown_sample])


@pytest.mark.parametrize("loader", ["turbo", "resident"])
def test_evaluation_leaves_damaged_images_out(damaged, loader):
    with open_set(damaged) as data, open_loader(damaged, options(loader), split="eval") as opened:
        for _ in range(2):
            batches = read(opened, Place(0))
            expected = [i for i in range(N) if i not in (5, 9)]
            assert joined(batches, "index").tolist() == expected
            assert [b.place.consumed for b in batches] == [8, 16, 24, 32, 37]
        assert opened.bad == [data.name(5), data.name(9)]


def test_a_damaged_image_can_stop_the_run_with_its_name(damaged):
    with open_loader(damaged, options(on_bad="error")) as loader:
        with pytest.raises(ValueError, match=r"damaged\.beton: sample [59] .* at byte \d+ "):
            read(loader, Place(0))
    with pytest.raises(ValueError, match=r"sample [59] .*checksum"):
        open_loader(damaged, options("resident", on_bad="error"))


@pytest.mark.parametrize("threads", [1, 4])
def test_too_many_damaged_images_stop_the_run(damaged, threads):
    """Two of 37 are bad, one is allowed: the step that meets the second stops."""
    with open_loader(damaged, options(threads=threads)) as loader:
        met = [k for k, i in enumerate(order.order(1, 0, N)) if i in (5, 9)]
        delivered = 0
        with pytest.raises(ValueError, match=r"2 images of this epoch are bad, 1 of 37 .* sample"):
            for batch in loader.batches(Place(1)):
                delivered += len(batch)
        assert delivered == met[1] // 8 * 8
    with pytest.raises(ValueError, match="2 images of this epoch are bad"):
        open_loader(damaged, options("resident"))


def test_without_checksums_damage_is_found_by_decoding(tmp_path):
    """A truncated scan, a destroyed header, and a header that says another size."""
    records = [record(k, JPG, (60, 60)) for k in range(12)]
    cut = dataclasses.replace(records[3], data=records[3].data[: len(records[3].data) // 2])
    other = dataclasses.replace(records[7], height=61)
    path = write_records(
        tmp_path / "x.beton", [*records[:3], cut, *records[4:7], other, *records[8:]]
    )
    damage(path, 5, at=0)
    with open_loader(path, options(verify=False), split="eval") as loader:
        index = joined(read(loader, Place(0)), "index").tolist()
        assert index == [0, 1, 2, 4, 6, 8, 9, 10, 11]
        assert len(loader.bad) == 3


@pytest.mark.parametrize("loader", ["turbo", "resident"])
def test_an_expected_warning_is_delivered_and_an_unexpected_one_is_damage(tmp_path, loader):
    records = [record(k, JPG, (50, 40)) for k in range(6)]
    path = write_records(
        tmp_path / "x.beton", [*records, warning_record(6), warning_record(7, flags=0)]
    )
    with pytest.raises(ValueError):
        simplejpeg.decode_jpeg(warning_record(6).data, strict=True)
    with open_loader(path, options(loader), split="eval") as opened:
        (batch,) = read(opened, Place(0))
        assert batch.index.tolist() == [0, 1, 2, 3, 4, 5, 6]
        assert batch.status.tolist() == [0] * 6 + [1]
        assert opened.bad == [warning_record(7).name]
        good = write_records(tmp_path / "good.beton", [*records, record(6, JPG)])
        with open_loader(good, options(loader), split="eval") as other:
            assert np.array_equal(shown(batch), shown(read(other, Place(0))[0]))


def test_a_set_without_a_good_image_ends_with_a_message(tmp_path):
    path = write_photos(tmp_path / "x.beton", 3)
    for sample in range(3):
        damage(path, sample)
    for loader in ("turbo", "resident"):
        with pytest.raises(ValueError, match=r"no good sample was found|images of this epoch"):
            with open_loader(path, options(loader, max_bad=1.0)) as opened:
                read(opened, Place(0))
        with open_loader(path, options(loader), split="eval") as opened:
            assert [len(batch) for batch in read(opened, Place(0))] == [0]


# --- what cannot be opened ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "--loader.batch must be at least 1"),
        ({"size": 0}, "--loader.size"),
        ({"size": 1_000_000}, "--loader.size must be 1 to 16384 pixels"),
        (
            {"loader": "tar"},
            "--loader.loader must be auto, resident, turbo, ffcv, dali, fastest; not 'tar'",
        ),
        ({"decoder": "half"}, "--loader.decoder must be auto, full, region; not 'half'"),
        ({"grow_from": 25, "grow": (0, 1)}, "--loader.grow-from must be 0 to 24 pixels"),
        ({"grow_from": -1, "grow": (0, 1)}, "--loader.grow-from"),
        ({"grow_from": 16}, "--loader.grow FIRST LAST"),
        ({"grow": (1, 2)}, "need --loader.grow-from"),
        ({"grow_from": 16, "grow": (3, 2)}, "0 <= FIRST <= LAST"),
        ({"crop": "center"}, "--loader.crop must be"),
        ({"order": "none"}, "--loader.order must be"),
        ({"on_bad": "skip"}, "--loader.on-bad must be"),
        ({"ratio": (0.5, float("inf"))}, "--loader.ratio"),
        ({"ratio": (1e-9, 1.0)}, "--loader.ratio"),
        ({"threads": 20_000}, "--loader.threads must be 0 to 1024"),
        ({"scale": (0.0, 1.0)}, "--loader.scale"),
        ({"scale": (0.5, 0.2)}, "--loader.scale"),
        ({"ratio": (0.0, 1.0)}, "--loader.ratio"),
        ({"eval_crop": 1.5}, "--loader.eval-crop"),
        ({"window": 0}, "--loader.window"),
        ({"threads": -1}, "--loader.threads"),
        ({"prefetch": -1}, "--loader.prefetch"),
        ({"max_bad": 2.0}, "--loader.max-bad"),
        ({"group": -1}, "--loader.group"),
        ({"batch": 100, "group": 0}, "not made of whole mix groups of 64 .* --loader.group 50"),
        ({"batch": 10, "group": 4}, "whole mix groups of 4"),
        ({"loader": "resident", "crop": "random"}, "resident loader .* --loader.loader turbo"),
    ],
)
def test_options_that_cannot_be_served_are_refused(photos, changes, message):
    gc.collect()  # maps that the tracebacks of earlier tests still held
    before = threading.active_count(), open_descriptors()
    with pytest.raises(ValueError, match=message):
        open_loader(photos, options(**changes))
    assert (threading.active_count(), open_descriptors()) == before


def test_ranks_seeds_and_splits_outside_their_range_are_refused(photos):
    with pytest.raises(ValueError, match=r"rank .* 0 \.\. 1, got 2"):
        open_loader(photos, options(), rank=2, world=2)
    with pytest.raises(ValueError, match="seed"):
        open_loader(photos, options(), seed=-1)
    with pytest.raises(ValueError, match="split"):
        open_loader(photos, options(), split="test")  # pyright: ignore[reportArgumentType]


def test_a_missing_file_and_a_foreign_subset_are_refused(photos, tmp_path):
    with pytest.raises(OSError, match=r"nothing\.beton"):
        open_loader(tmp_path / "nothing.beton", options())
    with pytest.raises(ValueError, match="holds no samples"):
        open_loader(photos, options(), subset=select(np.array([0]), [1]))
    with pytest.raises(ValueError, match="sample 40, the data has samples 0 to 36"):
        open_loader(photos, options(), subset=Subset(np.array([2, 40]), np.zeros(2, int)))


def test_a_pool_that_does_not_fit_is_refused_politely(photos, monkeypatch):
    monkeypatch.setattr(resident, "_free_memory", lambda device: 90_000)
    with pytest.raises(ValueError, match=r"37 images of 24 x 24 .*--loader.loader turbo"):
        open_loader(photos, options("resident"))
    monkeypatch.setattr(resident, "_free_memory", lambda device: 92_000)  # 63,936 is 69 % of it
    open_loader(photos, options("resident")).close()


def test_the_free_memory_of_this_machine_is_known():
    free = resident._free_memory(torch.device("cpu"))
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert free is not None and 0 < free < installed


def test_a_container_s_page_cache_counts_as_free(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 100000\ninactive_file 700000\nfile 800000\n")
    monkeypatch.setattr(resident, "CGROUP", tmp_path)
    assert resident._free_memory(torch.device("cpu")) == 800_000


@pytest.mark.parametrize(("loader", "function"), [("turbo", "empty"), ("resident", "zeros")])
def test_memory_that_torch_does_not_get_is_told_in_a_sentence(
    photos, loader, function, monkeypatch
):
    def refuse(*shape, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(ValueError, match=r"images of 24 x 24 pixels do not fit .*--loader.size"):
        monkeypatch.setattr(torch, function, refuse)
        with open_loader(photos, options(loader)) as opened:
            read(opened, Place(0))


def test_threads_that_cannot_start_are_told_in_a_sentence(photos, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(OSError, match=r"cannot start 2 threads .*--loader.threads"):
        open_loader(photos, options())


def test_auto_is_resident_for_small_whole_images_in_training_and_else_turbo(photos):
    with open_loader(photos, options("auto")) as loader:
        assert loader.resident
    with open_loader(photos, options("auto"), split="eval") as loader:
        assert not loader.resident
    for changes in ({"crop": "random"}, {"size": 5000}):  # 37 views of 75 MB
        with open_loader(photos, options("auto", **changes)) as loader:
            assert not loader.resident


def test_decoding_a_pool_reports_its_progress(photos):
    calls = []
    open_loader(photos, options("resident"), progress=lambda *done: calls.append(done)).close()
    assert calls[-1] == (N, N)
