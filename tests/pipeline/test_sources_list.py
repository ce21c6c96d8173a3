"""Lists of images: how lines are read, what labels mean, what is refused."""

from pathlib import Path

import pytest

from backmix.pipeline.sources.open import open_source
from backmix.pipeline.sources.source import Source
from tests.images import write_files


def written(root: Path, text: str, name: str = "list.txt") -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def pairs(source: Source) -> list[tuple[str, int]]:
    return [(item.name, item.label) for item in source.items]


def test_a_line_is_a_path_that_may_have_spaces_and_a_label(tmp_path: Path) -> None:
    path = written(tmp_path, "a b/1 2.jpg 3\n\n./x//y.png\t0\r\nz.jpg 10  \n")
    source = open_source(f"list:{path}")
    assert pairs(source) == [("a b/1 2.jpg", 3), ("x/y.png", 0), ("z.jpg", 10)]
    assert source.classes == [str(k) for k in range(11)], "numbers count, none is left out"
    assert source.items[0].path == f"{tmp_path}/a b/1 2.jpg"
    assert any("class without images" in note for note in source.notes)


def test_a_byte_order_mark_and_a_strange_space_belong_to_no_path(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffa.jpg 0\nb\u2028c.jpg 1\n".encode())
    assert pairs(open_source(f"list:{path}")) == [("a.jpg", 0), ("b\u2028c.jpg", 1)]


def test_a_tab_ends_the_path_so_that_a_class_may_have_a_space(tmp_path: Path) -> None:
    path = written(tmp_path, "1.jpg\tpolar bear\n2.jpg\tant\n")
    source = open_source(f"list:{path}")
    assert source.classes == ["ant", "polar bear"]
    assert pairs(source) == [("1.jpg", 1), ("2.jpg", 0)]
    assert pairs(open_source(f"list:{path}", ["polar bear", "ant"])) == [("1.jpg", 0), ("2.jpg", 1)]


def test_the_paths_count_from_the_folder_of_the_list_or_from_a_stated_root(tmp_path: Path) -> None:
    write_files(tmp_path, {"images/cifar10/1.png": b"one"})
    path = written(tmp_path / "lists", "cifar10/1.png 0\n")
    (item,) = open_source(f"list:{path}//{tmp_path}/images").items
    assert item.read() == b"one"
    (item,) = open_source(f"list:{path}").items
    with pytest.raises(FileNotFoundError, match=r"lists/cifar10/1\.png"):
        item.read()
    absolute = written(tmp_path, f"{tmp_path}/images/cifar10/1.png 0\n", "absolute.txt")
    (item,) = open_source(f"list:{absolute}//{tmp_path}/images/").items
    assert (item.name, item.read()) == ("cifar10/1.png", b"one")
    assert open_source(f"list:{absolute}///").items[0].read() == b"one"
    with pytest.raises(ValueError, match=r"line 1: .* does not lie below .*/lists; name the fold"):
        open_source(f"list:{absolute}//{tmp_path}/lists")


def test_numbers_get_the_names_of_a_class_list(tmp_path: Path) -> None:
    path = written(tmp_path, "1.jpg 1\n2.jpg 0\n")
    source = open_source(f"list:{path}", ["cat", "dog", "emu"])
    assert source.classes == ["cat", "dog", "emu"]
    assert pairs(source) == [("1.jpg", 1), ("2.jpg", 0)]
    assert source.notes == ["class without images, 1: 'emu'"]
    with pytest.raises(ValueError, match=r"line 1: label 1, but the class list names 1"):
        open_source(f"list:{path}", ["cat"])


def test_images_without_a_class_are_of_one_class_of_their_own(tmp_path: Path) -> None:
    path = written(tmp_path, "1.jpg -1\n2.jpg -1\n")
    source = open_source(f"list:{path}")
    assert (source.classes, pairs(source)) == (["unknown"], [("1.jpg", 0), ("2.jpg", 0)])
    path.write_text("1.jpg 0\n2.jpg -1\n")
    with pytest.raises(ValueError, match="line 2: label -1 beside others"):
        open_source(f"list:{path}")


def test_an_image_listed_twice_is_told_and_two_labels_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "1.jpg 0\n./1.jpg 0\n")
    source = open_source(f"list:{path}")
    assert pairs(source) == [("1.jpg", 0), ("1.jpg", 0)]
    assert source.notes == ["image listed more than once and stored as often, 1: '1.jpg'"]
    path.write_text("1.jpg 0\n\n1.jpg 1\n")
    with pytest.raises(ValueError, match=r"line 3: 1\.jpg has the label 1, but 0 in line 1"):
        open_source(f"list:{path}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n\n", "names no image"),
        ("1.jpg 0\nword\n", "line 2: expected a path"),
        ("../secret 0\n", r"line 1: '\.\./secret' is no path below"),
        ("a/../../b 0\n", "line 1: .* is no path below"),
        (". 0\n", "is no path below"),
        ("a\0b 0\n", "is no path below"),
        (f"{5000 * 'x'} 0\n", "line 1: a path of more than 4096 bytes"),
        ("a.jpg 1000000\n", "line 1: label 1000000, but at most 1,000,000 classes"),
        ("a.jpg 0\nb.jpg \x07\n", "line 2: the class name .* do not print"),
    ],
)
def test_a_line_that_cannot_be_meant_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(f"list:{written(tmp_path, text)}")


def test_a_list_that_is_none_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a file"):
        open_source(f"list:{tmp_path}/no.txt")
    (tmp_path / "latin").write_bytes(b"caf\xe9.jpg 0\n")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        open_source(f"list:{tmp_path}/latin")
    with pytest.raises(ValueError, match="is not a folder; list:FILE//ROOT"):
        open_source(f"list:{written(tmp_path, 'a 0')}//nowhere")


def test_a_word_among_numbers_is_a_slip_and_named(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a.jpg 1\nb.jpg 2\nc.jpg 10\nd.jpg 1O\n")
    with pytest.raises(ValueError, match=r"line 4: the label '1O' is no class number, but most"):
        open_source(f"list:{tmp_path}/list.txt")
