"""Self-contained pages from templates: everything escaped but what is marked safe, no network."""

import json
from pathlib import Path
from typing import Any

from backmix.train.checkpoint import write_atomically


def check_page(out: Path, what: str) -> None:
    """Refuse a page that cannot be written, before the work for it.

    Args:
        out: the HTML file.
        what: it is, such as `report`, for messages.

    Raises:
        ValueError: no name, no folder, or the packages of the extra `report` are not installed.
    """
    if not out.name or out.is_dir():
        raise ValueError("the page needs a name: -o FILE.html")
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"the {what} needs the package {error.name}: pip install 'backmix[report]'"
        ) from error
    if not out.parent.is_dir():
        raise ValueError(f"{out} cannot be written: there is no folder {out.parent}")


def write_page(out: Path, template: str, values: dict[str, Any]) -> None:
    """Write a page, whole or not at all.

    Args:
        out: the HTML file; replaced if it exists.
        template: its file below `train/`.
        values: what the template needs, by name.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(values)
    write_atomically(out, page.encode())


def embedded(value: Any) -> str:
    """Return JSON that may stand inside a script element: nothing in it can end the element."""
    text = json.dumps(value)
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text
