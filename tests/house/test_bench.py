"""Kernels come with a test, a bench case and shipped launches; generated tables are current."""

from pathlib import Path

import pytest

from bench import plot

ROOT = Path(__file__).resolve().parents[2]
DOORS = sorted(
    path.stem
    for path in (ROOT / "kernels").glob("*.py")
    if f"def {path.stem}_meaning(" in path.read_text()
)
ROWS = plot.newest(ROOT / "bench" / "results")


def test_there_are_doors() -> None:
    assert {"mix_background", "update_cam_bank"} <= set(DOORS)


@pytest.mark.parametrize("name", DOORS)
def test_a_kernel_has_a_test_file_a_bench_case_and_shipped_launches(name: str) -> None:
    from backmix.kernels.shipped import SHIPPED

    assert (ROOT / "tests" / "kernels" / f"test_{name}.py").exists()
    assert f'"{name}"' in (ROOT / "bench" / "cases.py").read_text()
    assert name in SHIPPED
    assert any(headline.kernel == name for headline in plot.HEADLINES)


@pytest.mark.parametrize("page", plot.PAGES, ids=lambda page: page.name)
def test_the_tables_of_a_page_are_current(page: Path) -> None:
    text = page.read_text()
    current = plot.with_tables(text, ROWS) == text
    assert current, f"{page.name} is behind its rows: python bench/plot.py --write"
    assert text.count("<!-- table:") == text.count("<!-- end table -->")


def test_every_table_stands_somewhere() -> None:
    found = {name for page in plot.PAGES for _, name, _ in plot.MARKED.findall(page.read_text())}
    stored = {path.name.removesuffix(".table.json") for path in plot.RESULTS.glob("*.table.json")}
    assert found == {*plot.TABLES, *stored}
