"""The class lists: sizes, disjointness, and the facts that are known of them."""

import pytest

from backmix.train.protocols import families, repeats, split, splits

EVERY = [
    one
    for protocol in ("cifar10", "svhn", "cifar+10", "cifar+50", "tiny-imagenet")
    for family in families(protocol)
    for one in splits(protocol, family)
]
SIZES = {  # known, unknown classes
    "cifar10": (6, 4),
    "svhn": (6, 4),
    "cifar+10": (4, 10),
    "cifar+50": (4, 50),
    "tiny-imagenet": (20, 180),
}
# Test images of the digits 0..9, 26,032 in all.
SVHN_TEST = (1744, 5099, 4149, 2882, 2523, 2384, 1977, 2019, 1660, 1595)


@pytest.mark.parametrize("one", EVERY, ids=lambda one: f"{one.protocol}-{one.name}")
def test_every_list_is_whole(one) -> None:
    assert (len(one.known), len(one.unknown)) == SIZES[one.protocol]
    assert len(set(one.known)) == len(one.known)
    assert len(set(one.unknown)) == len(one.unknown)
    assert all(0 <= c < one.classes for c in one.known)
    if one.unknown_source == "same":
        assert sorted([*one.known, *one.unknown]) == list(range(one.classes))
    else:
        assert one.classes == 10
        assert all(0 <= c < 100 for c in one.unknown)


def test_the_families_are_those_that_were_published() -> None:
    every = ("A", "B-cac", "B-dias", "C", "F")
    assert families("cifar10") == families("svhn") == every
    assert families("tiny-imagenet") == (*every, "OpenOOD")
    assert families("cifar+10") == families("cifar+50") == ("A", "B-cac", "B-dias", "F")
    assert len(EVERY) == 5 * (5 + 5 + 6 + 4 + 4)


def test_labels_follow_the_written_order_and_ascend_in_family_c() -> None:
    assert split("cifar10", "A", 2).known == (1, 5, 7, 3, 9, 4)
    assert split("tiny-imagenet", "A", 4).known[:5] == (95, 6, 145, 153, 0)
    for one in EVERY:
        if one.family == "C":
            assert one.known == tuple(sorted(one.known))


def test_the_known_repeats_are_found_and_no_others() -> None:
    found = {(s.protocol, s.family, s.number): repeats(s) for s in EVERY if repeats(s) is not None}
    assert found == {
        ("cifar10", "A", 1): 0,
        ("svhn", "A", 1): 0,
        **{("cifar+50", "B-cac", number): 0 for number in (1, 2, 3, 4)},
    }


def test_cifar_plus_n_of_family_a_repeats_its_known_classes_only() -> None:
    for protocol in ("cifar+10", "cifar+50"):
        one, two = split(protocol, "A", 1), split(protocol, "A", 2)
        assert set(one.known) == set(two.known)
        assert set(one.unknown) != set(two.unknown)


def test_only_list_four_of_family_a_knows_the_four_vehicles() -> None:
    vehicles = {0, 1, 8, 9}
    assert [set(s.known) == vehicles for s in splits("cifar+10", "A")] == [False] * 4 + [True]
    for family in ("B-cac", "B-dias", "F"):
        assert all(s.known == (0, 1, 8, 9) for s in splits("cifar+10", family))


def test_the_fifty_of_family_f_begin_with_the_ten() -> None:
    for number in range(5):
        fifty, ten = split("cifar+50", "F", number), split("cifar+10", "F", number)
        assert fifty.unknown[:10] == ten.unknown
        assert fifty.known == ten.known


def test_openoods_tiny_imagenet_lists_are_those_of_a_counted_in_another_order() -> None:
    # A class that is in several lists has one number in either order.
    pairs = {
        pair
        for one, two in zip(
            splits("tiny-imagenet", "A"), splits("tiny-imagenet", "OpenOOD"), strict=True
        )
        for pair in zip(one.known, two.known, strict=True)
    }
    assert len(pairs) < 100  # of 5 x 20, some classes being in several
    for side in (0, 1):
        assert len({pair[side] for pair in pairs}) == len(pairs)
    assert not any(a == b for a, b in pairs)


def test_the_fifty_of_list_a_end_in_the_ten() -> None:
    for number in range(5):
        fifty, ten = split("cifar+50", "A", number), split("cifar+10", "A", number)
        assert fifty.unknown[-10:] == ten.unknown
        assert fifty.known == ten.known


def test_b_agrees_with_itself_but_on_tiny_imagenet_and_plus_fifty() -> None:
    for protocol in ("cifar10", "svhn", "cifar+10"):
        for one, two in zip(splits(protocol, "B-cac"), splits(protocol, "B-dias"), strict=True):
            assert (one.known, one.unknown) == (two.known, two.unknown)
    tiny = zip(splits("tiny-imagenet", "B-dias"), splits("tiny-imagenet", "F"), strict=True)
    assert all(dias.known == f.known for dias, f in tiny)
    assert len({s.unknown for s in splits("cifar+50", "B-dias")}) == 5


@pytest.mark.parametrize(
    ("family", "sums"),
    [
        ("A", [15071, 15071, 17045, 14796, 17129]),
        ("B-cac", [17494, 12284, 14883, 13063, 17553]),
        ("C", [15934, 17427, 13170, 14598, 15155]),
    ],
)
def test_svhn_test_sizes(family: str, sums: list[int]) -> None:
    assert [sum(SVHN_TEST[c] for c in s.known) for s in splits("svhn", family)] == sums


def test_errors_list_what_exists() -> None:
    with pytest.raises(
        ValueError, match=r"no protocol 'cifar'; there are cifar10, svhn, cifar\+10"
    ):
        split("cifar", "A", 0)
    with pytest.raises(
        ValueError, match=r"cifar\+50 has no lists of family 'C'; there are A, B-cac, B-dias, F"
    ):
        split("cifar+50", "C", 0)
    with pytest.raises(ValueError, match=r"cifar10 family A has the lists 0\.\.4, not 5"):
        split("cifar10", "A", 5)
    with pytest.raises(ValueError, match=r"has the lists 0\.\.4, not -1"):
        split("cifar10", "A", -1)
