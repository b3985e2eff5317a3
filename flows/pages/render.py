"""From sections to one HTML file: template, style, script and charting library inside, nothing from anywhere else.

Charts are Vega-Lite: a chart is data, not code, so that what the warehouse says is what is drawn; it draws SVG, which
prints, takes the page's colours and can be read aloud; its whole library is 0.9 MB, and comes with vl-convert, so no
copy of it lies in the repository and none is fetched.
"""

import contextlib
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2

from flows.pages.section import Section
from storage.errors import StorageError
from storage.files import write_whole
from storage.hints import in_store
from storage.keys import digest


@lru_cache(maxsize=1)
def _library(store: Path) -> str:
    """Vega, Vega-Lite and vega-embed as one script that sets window.vegaEmbed; kept in the store, as it takes seconds.

    The name of the file holds the version and the digest of what is in it, so only what is whole is used.
    """
    folder, made_by = store / "pages", f"vega-{version('vl-convert-python')}"
    for file in folder.glob(f"{made_by}-*.js"):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            text = file.read_text(encoding="utf-8")
            if file.name == f"{made_by}-{digest(text)}.js":
                return text
    import vl_convert

    text = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")
    with contextlib.suppress(OSError):  # a store we cannot write to only costs making it again
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / f"{made_by}-{digest(text)}.js", text)
    return text


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("flows.pages"),
        autoescape=True,  # names and paths come from users
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def page(store: Path, title: str, sections: list[Section], **about: Any) -> str:
    """The whole page of something in a store. about: what the head shows, see templates/page.html."""
    template = _environment().get_template("page.html")
    library = _library(store)
    return template.render(title=title, sections=sections, library=library, store=in_store(store), **about)


def write(file: Path, text: str) -> Path:
    """Put the page where it belongs, whole or not at all. Raises StorageError."""
    try:
        write_whole(file, text)
    except OSError as error:
        raise StorageError(f"cannot write {file}: {error.strerror}") from error
    return file
