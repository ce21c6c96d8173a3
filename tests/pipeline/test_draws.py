"""Draws: published test vectors, torchvision's crops, and what a mix may and may not draw."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from backmix.pipeline import draws

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_vectors(counter, key, expected):
    words = [
        np.array([int(word, 16) for word in text.split()]) for text in (counter, key, expected)
    ]
    assert draws.philox(words[0].astype(np.uint32), tuple(words[1].tolist())).tolist() == (
        words[2].tolist()
    )


def philox_of_integers(counter: list[int], key: list[int]) -> list[int]:
    """The generator once more, on Python integers and one counter."""
    x, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [
            second >> 32 ^ x[1] ^ k[0],
            second & 0xFFFFFFFF,
            first >> 32 ^ x[3] ^ k[1],
            first & 0xFFFFFFFF,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return x


@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**56 - 1),
    st.sampled_from(list(draws.STREAMS)),
    st.integers(0, 2**32 - 1),
)
def test_a_block_is_philox_of_the_stated_counter(seed, epoch, index, stream, number):
    counter = [index & 0xFFFFFFFF, index >> 32 | draws.STREAMS[stream] << 24, epoch, number]
    expected = philox_of_integers(counter, [seed & 0xFFFFFFFF, seed >> 32])
    assert draws.block(seed, epoch, np.array([index]), stream, number)[0].tolist() == expected
    assert draws.words(seed, epoch, np.array([index]), stream, number).tolist() == [
        expected[0] + (expected[1] << 32)
    ]


def test_the_words_of_many_samples_are_those_of_each():
    index = np.arange(10**6, 10**6 + 2 * 8192 + 3)  # more than are computed together
    x = draws.block(5, 6, index, "order", 1).astype(np.uint64)
    expected = x[:, 0] | x[:, 1] << np.uint64(32)
    assert np.array_equal(draws.words(5, 6, index, "order", 1), expected)


def test_the_stream_numbers_never_change():
    assert list(draws.STREAMS) == (
        "order crop flip shift donor patch tie apply replacement holdout proportion strong".split()
    )
    assert list(draws.STREAMS.values()) == list(range(12))


def test_a_seed_outside_64_bits_is_refused():
    for seed in (-1, 1 << 64):
        with pytest.raises(ValueError, match="seed"):
            draws.block(seed, 0, np.arange(2), "crop")


def test_uniform_and_below_reach_their_ends_and_not_beyond():
    x = np.array([0, 255, 256, 0xFFFFFFFF], np.uint32)
    assert draws.uniform(x).tolist() == [0, 0, 2.0**-24, 1 - 2.0**-24]
    assert draws.below(x, 7).tolist() == [0, 0, 0, 6]
    assert draws.below(x, 2**31 - 1).tolist() == [0, 127, 127, 2**31 - 2]
    assert draws.below(x, np.array([0, 1, 2, 3])).tolist() == [0, 0, 0, 2]


# --- crops ----------------------------------------------------------------------------------------


def torchvision_rule(uniforms: list[list[float]], words: list[list[int]], height: int, width: int):
    """torchvision's RandomResizedCrop.get_params in plain Python, from given uniform numbers."""
    for u, x in zip(uniforms, words, strict=True):
        area = height * width * (SCALE[0] + (SCALE[1] - SCALE[0]) * u[0])
        low, high = math.log(RATIO[0]), math.log(RATIO[1])
        shape = math.exp(low + (high - low) * u[1])
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            return [x[2] * (height - h + 1) >> 32, x[3] * (width - w + 1) >> 32, h, w]
    h, w = height, width
    if width / height < RATIO[0]:
        h = round(width / RATIO[0])
    elif width / height > RATIO[1]:
        w = round(height * RATIO[1])
    return [(height - h) // 2, (width - w) // 2, h, w]


def test_crops_follow_torchvisions_rule_step_by_step():
    generator = np.random.default_rng(3)
    sizes = generator.integers(1, 300, (400, 2))
    sizes[:100, 0] = generator.integers(1, 8, 100)  # very wide: most of them fall back
    index = generator.integers(0, 2**40, 400)
    tries = np.stack([draws.block(7, 5, index, "crop", k) for k in range(10)], axis=1)
    expected = [
        torchvision_rule(draws.uniform(x).tolist(), x.tolist(), h, w)
        for x, (h, w) in zip(tries, sizes.tolist(), strict=True)
    ]
    assert draws.crop_boxes(7, 5, index, sizes, SCALE, RATIO).tolist() == expected


def alike(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two samples may come from one distribution (Kolmogorov and Smirnov's test)."""
    result: Any = stats.ks_2samp(a, b)
    return result.pvalue > 1e-3


@pytest.mark.slow  # importing torchvision takes most of the time
@pytest.mark.parametrize("size", [(300, 400), (97, 31), (40, 260), (64, 64)])
def test_crops_are_distributed_as_torchvisions(size, torchvision):
    import torch

    n = 3000
    image = torch.empty(3, *size)
    torch.manual_seed(1)
    draw = torchvision.transforms.RandomResizedCrop.get_params
    theirs = np.array([draw(image, list(SCALE), list(RATIO)) for _ in range(n)])
    ours = draws.crop_boxes(1, 0, np.arange(n), np.tile(size, (n, 1)), SCALE, RATIO)
    for side in range(4):
        assert alike(ours[:, side], theirs[:, side])
    # The dependence of the four: the share of the area, and where the box's centre lies.
    (a, b), (c, d) = (
        (boxes[:, 2] * boxes[:, 3], boxes[:, 0] * 2 + boxes[:, 2] + boxes[:, 1])
        for boxes in (ours, theirs)
    )
    assert alike(a, c) and alike(b, d)


def cells(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Sort boxes into cells of share of the area x shape, and of place in y x place in x."""
    height, width = size
    y0, x0, h, w = boxes.astype(float).T
    share = np.minimum(h * w / (height * width) * 5, 4).astype(int)
    shape = np.clip((np.log(w / h) / np.log(4 / 3) + 1) * 2.5, 0, 4).astype(int)
    y, x = y0 / np.maximum(height - h, 1), x0 / np.maximum(width - w, 1)
    place = np.minimum(y * 4, 3).astype(int) * 4 + np.minimum(x * 4, 3).astype(int)
    return np.stack([share * 5 + shape, place])


def same_cells(a: np.ndarray, b: np.ndarray) -> float:
    """The p-value of the chi-square test that two samples of cells have one distribution."""
    counts = np.stack([np.bincount(sample, minlength=25) for sample in (a, b)])
    common = counts.sum(axis=0) >= 20
    table = counts[:, common]
    if (rest := counts[:, ~common].sum(axis=1)).sum() >= 20:
        table = np.column_stack([table, rest])
    return float(stats.chi2_contingency(table).pvalue)  # pyright: ignore


@pytest.mark.slow  # importing torchvision takes most of the time
@pytest.mark.parametrize("size", [(300, 400), (500, 375), (97, 31), (40, 260), (64, 64), (7, 9)])
def test_crops_fill_the_cells_of_torchvisions(size, torchvision):
    """Area and shape together, and both places together; another ratio would be noticed."""
    import torch

    n = 20_000
    image = torch.empty(1, *size)
    torch.manual_seed(2)
    draw = torchvision.transforms.RandomResizedCrop.get_params
    theirs = cells(np.array([draw(image, list(SCALE), list(RATIO)) for _ in range(n)]), size)

    def ours(ratio: tuple[float, float]) -> np.ndarray:
        sizes = np.tile(size, (n, 1))
        return cells(draws.crop_boxes(3, 1, np.arange(n), sizes, SCALE, ratio), size)

    for mine, other in zip(ours(RATIO), theirs, strict=True):
        assert same_cells(mine, other) > 1e-3
    if min(size) > 31:  # else most boxes are the fallback
        assert same_cells(ours((0.8, 4 / 3))[0], theirs[0]) < 1e-6


def test_the_fallback_is_centred_and_at_the_limit_of_the_ratio():
    sizes = np.array([[10, 1000], [1000, 10], [30, 31]])
    # No box of four times the image's area fits, so every image falls back.
    boxes = draws.crop_boxes(0, 0, np.arange(3), sizes, (4.0, 4.0), RATIO)
    assert boxes.tolist() == [[0, 493, 10, 13], [493, 0, 13, 10], [0, 0, 30, 31]]


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(0, 2**56 - 1))
def test_every_crop_lies_in_its_image(height, width, index):
    sizes = np.array([[height, width]], np.int32)
    y0, x0, h, w = draws.crop_boxes(0, 0, np.array([index]), sizes, SCALE, RATIO)[0].tolist()
    assert 0 <= y0 and y0 + h <= height and 0 <= x0 and x0 + w <= width and h > 0 and w > 0


def test_centre_and_whole_boxes():
    sizes = np.array([[375, 500], [256, 256], [1, 9]], np.int32)
    # 0.875 * 375 = 328.125; (375 - 328) // 2 = 23; (500 - 328) // 2 = 86
    assert draws.centre_boxes(sizes, 0.875).tolist() == [
        [23, 86, 328, 328],
        [16, 16, 224, 224],
        [0, 4, 1, 1],
    ]
    assert draws.whole_boxes(sizes).tolist() == [[0, 0, 375, 500], [0, 0, 256, 256], [0, 0, 1, 9]]
    for boxes in (draws.centre_boxes(sizes, 1.0), draws.whole_boxes(sizes)):
        assert boxes.dtype == np.int32


# --- mixing ---------------------------------------------------------------------------------------


def mix(n: int, **changes) -> draws.MixDraws:
    arguments = {
        "rows": np.arange(n),
        "pool_rows": n,
        "group": 0,
        "size": (5, 6),
        "patch": 3,
    } | changes
    index = arguments.pop("index", np.arange(n) + 1000)
    return draws.mix_draws(arguments.pop("seed", 1), 2, index, **arguments)


def even(counts: np.ndarray) -> bool:
    return stats.chisquare(counts).pvalue > 1e-4


def test_patches_reach_the_last_row_and_column_of_both_views_evenly():
    patch = mix(6000).patch
    for corner, places in ((0, 3), (1, 4), (2, 3), (3, 4)):
        counts = np.bincount(patch[:, corner])
        assert len(counts) == places and even(counts)
    assert (patch[:, 4:] == 3).all() and patch.dtype == np.int32
    # The four corners are independent: all 144 combinations occur.
    assert len(np.unique(patch, axis=0)) == 144


def test_a_patch_of_the_view_s_size_covers_it():
    assert (mix(50, size=(4, 4), patch=4).patch == [0, 0, 0, 0, 4, 4]).all()


def test_clipped_patches_are_cut_windows_around_an_even_centre():
    height, width, side = 5, 6, 4
    patch = mix(6000, position="clipped", patch=side).patch
    centres = []
    for ty, tx, dy, dx, ph, pw in np.unique(patch, axis=0).tolist():
        # The window around centre c is [c - 2, c + 2), cut to the view.
        rows = [c for c in range(height) if (max(c - 2, 0), min(c + 2, height)) == (ty, ty + ph)]
        columns = [c for c in range(width) if (max(c - 2, 0), min(c + 2, width)) == (tx, tx + pw)]
        assert len(rows) == len(columns) == 1
        centres.append((rows[0], columns[0]))
        assert 0 <= dy <= height - ph and 0 <= dx <= width - pw
    assert len(set(centres)) == height * width
    by_row = np.unique(patch[:, [0, 4]], axis=0, return_counts=True)[1]
    assert len(by_row) == height and even(by_row)


def test_flip_is_even_and_can_be_turned_off():
    assert even(np.bincount(mix(4000).flip)) and not mix(50, flip=False).flip.any()


def test_shifts_are_even_over_the_whole_pad_and_absent_without():
    shift = mix(6000, pad=2).shift
    assert shift is not None and mix(5).shift is None
    for axis in (0, 1):
        counts = np.bincount(shift[:, axis] + 2)
        assert len(counts) == 5 and even(counts)


def test_probability_is_the_share_that_gets_a_patch_and_changes_no_other_draw():
    always, some, never = mix(4000), mix(4000, probability=0.3), mix(4000, probability=0.0)
    pasted = some.patch[:, 4] > 0
    assert abs(pasted.mean() - 0.3) < 0.03 and not never.patch.any() and always.patch[:, 4].all()
    assert (some.patch[pasted] == always.patch[pasted]).all() and not some.patch[~pasted].any()
    assert (some.donor == always.donor).all() and (some.flip == always.flip).all()


def allowed(own: int, group: int, n: int, labels: np.ndarray, donor_class: str) -> list[int]:
    """Who may give to image `own`, by the rule's words."""
    members = range(n) if group == 0 else range(own // group * group, own // group * group + group)
    return [
        other
        for other in members
        if other < n
        and other != own
        and (
            donor_class == "any" or (labels[other] == labels[own]) == (donor_class == "same")
        )
    ]  # fmt: skip


@given(
    st.integers(0, 20),
    st.integers(0, 7),
    st.sampled_from(["any", "other", "same"]),
    st.integers(1, 4),
    st.integers(0, 1000),
)
def test_donors_come_from_the_own_group_and_are_never_the_image_itself(
    n, group, donor_class, classes, seed
):
    labels = np.random.default_rng(seed).integers(-1, classes - 1, n)
    drawn = mix(n, group=group, donor_class=donor_class, labels=labels, seed=seed)
    for own in range(n):
        candidates = allowed(own, group, n, labels, donor_class)
        if candidates:
            assert drawn.donor[own] in candidates and drawn.patch[own, 4] == 3
        else:  # nobody else: nothing is pasted
            assert drawn.donor[own] == own and not drawn.patch[own].any()


@pytest.mark.parametrize("group", [0, 4])
@pytest.mark.parametrize("donor_class", ["any", "other", "same"])
def test_every_possible_donor_is_as_likely(group, donor_class):
    n, repeats = 11, 300
    labels = np.array([0, 1, 0, 0, 2, 2, 1, 2, 0, 1, 0])
    counts = np.zeros((n, n), int)
    for k in range(repeats):
        drawn = mix(n, group=group, donor_class=donor_class, labels=labels, seed=k)
        counts[np.arange(n), drawn.donor] += 1
    for own in range(n):
        candidates = allowed(own, group, n, labels, donor_class)
        if candidates:
            assert counts[own, candidates].sum() == repeats
            assert len(candidates) == 1 or even(counts[own, candidates])


def test_a_resident_donor_may_be_any_row_of_the_pool():
    rows = np.array([7, 2])
    seen = [
        mix(2, rows=rows, pool_rows=9, seed=k, index=np.array([70, 20])).donor for k in range(400)
    ]
    assert set(np.array(seen)[:, 0].tolist()) == set(range(9)) - {7}
    assert set(np.array(seen)[:, 1].tolist()) == set(range(9)) - {2}


def test_draws_of_an_image_do_not_depend_on_its_batch():
    whole = mix(40, pad=3, labels=np.arange(40) % 3, donor_class="other")
    part = np.array([31, 4, 17])
    alone = mix(
        3,
        index=part + 1000,
        rows=part,
        pool_rows=40,
        pad=3,
        labels=np.arange(40) % 3,
        donor_class="other",
    )
    for name in ("flip", "shift", "donor", "patch", "tie"):
        assert (getattr(whole, name)[part] == getattr(alone, name)).all()


def test_groups_do_not_know_of_each_other():
    both, second = mix(12, group=8), mix(4, group=8, index=np.arange(8, 12) + 1000)
    assert (both.donor[8:] - 8 == second.donor).all() and (both.patch[8:] == second.patch).all()


def test_what_cannot_be_mixed_is_refused():
    with pytest.raises(ValueError, match="patch side"):
        mix(3, patch=6)
    with pytest.raises(ValueError, match="labels"):
        mix(3, donor_class="same")
    with pytest.raises(ValueError, match="inside, clipped; got 'outside'"):
        mix(3, position="outside")
    with pytest.raises(ValueError, match="any, other, same; got 'none'"):
        mix(3, donor_class="none")
    for probability in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="probability"):
            mix(3, probability=probability)
