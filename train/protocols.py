"""Published class splits of open-set recognition, as data: which classes are known, which are not.

A protocol is a data set and a way of cutting it; a family is one of the published sets of five
lists for it. **Figures of different families must not stand in one column**: the same code gets
far lower figures on B than on A. The lists themselves are in `protocols.json`; standard library
only.

Sources: A = ARPL (Chen et al., 2021) and Vaze et al. (2022), identical lists; B-cac = CAC (Miller
et al., 2021); B-dias = DIAS (Moon et al., 2022), equal to B-cac but for Tiny-ImageNet and
CIFAR+50; C = CSSR (Huang et al., 2022); F = the macro-F1 lists of DIAS; OpenOOD = the Tiny-ImageNet
lists of OpenOOD v1.5, which are the numbers of A counted in the order of wnids.txt instead of the
sorted one: other classes, another problem. (Its CIFAR-10 lists are those of A.)

Class numbers: CIFAR in the official label order, SVHN by digit (the digit 0 is class 0), Tiny-
ImageNet by the position in the sorted list of the 200 WordNet ids.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Split:
    """One list of one family: the known classes in label order, and the unknown ones."""

    protocol: str
    family: str
    number: int
    """Number of the list in its family, 0..4, in the published order."""
    known: tuple[int, ...]
    """Class numbers; the label of a class is its position here (as written by the authors of A, B
    and F; ascending in C)."""
    unknown: tuple[int, ...]
    """Class numbers, in the data set that `unknown_source` names."""
    unknown_source: Literal["same", "cifar100"]
    """same: the unknown classes are the other classes of the same data set. cifar100: classes of
    CIFAR-100 (its fine labels)."""
    classes: int
    """Classes of the data set that the known ones belong to."""

    @property
    def name(self) -> str:
        """The list as it is quoted: family and number, `A0`."""
        return f"{self.family}{self.number}"


def split(protocol: str, family: str, number: int) -> Split:
    """Return list `number` of a family.

    Raises:
        ValueError: where no such list was published; the message says what there is.

    >>> split("cifar10", "A", 0).known, split("cifar10", "A", 0).unknown
    ((0, 6, 4, 9, 1, 7), (2, 3, 5, 8))
    """
    lists = _lists(protocol, family)
    if not 0 <= number < len(lists["known"]):
        last = len(lists["known"]) - 1
        raise ValueError(f"{protocol} family {family} has the lists 0..{last}, not {number}")
    classes = _table()[protocol]["classes"]
    known = tuple(lists["known"][number])
    foreign = "unknown" in lists
    return Split(
        protocol=protocol,
        family=family,
        number=number,
        known=known,
        unknown=tuple(lists["unknown"][number])
        if foreign
        else tuple(c for c in range(classes) if c not in known),
        unknown_source="cifar100" if foreign else "same",
        classes=classes,
    )


def splits(protocol: str, family: str) -> list[Split]:
    """Return all lists of a family, in the published order."""
    return [
        split(protocol, family, number) for number in range(len(_lists(protocol, family)["known"]))
    ]


def families(protocol: str) -> tuple[str, ...]:
    """Return the families that were published for a protocol.

    >>> families("cifar+50")
    ('A', 'B-cac', 'B-dias', 'F')
    """
    table = _table()
    if protocol not in table:
        raise ValueError(f"no protocol {protocol!r}; there are {', '.join(table)}")
    return tuple(table[protocol]["families"])


def repeats(one: Split) -> int | None:
    """Return the number of the first earlier list of the family that poses the same problem.

    Same known and same unknown classes, in any order. Some families hold such repeats, and a mean
    over five lists weighs that problem twice; published means do, so ours does, but the mean over
    the distinct lists belongs beside it.

    >>> repeats(split("cifar10", "A", 1)), repeats(split("cifar10", "A", 2))
    (0, None)
    """
    for earlier in splits(one.protocol, one.family)[: one.number]:
        if set(earlier.known) == set(one.known) and set(earlier.unknown) == set(one.unknown):
            return earlier.number
    return None


@cache
def _table() -> dict:
    return json.loads(Path(__file__).with_name("protocols.json").read_text(encoding="utf-8"))


def _lists(protocol: str, family: str) -> dict:
    published = families(protocol)
    if family not in published:
        raise ValueError(
            f"{protocol} has no lists of family {family!r}; there are {', '.join(published)}"
        )
    return _table()[protocol]["families"][family]
