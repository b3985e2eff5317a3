"""From sections to one HTML file: template, style, script and charting library inside, nothing from anywhere else.

Charts are Vega-Lite: a chart is data, not code, so that what the warehouse says is what is drawn; it draws SVG, which
prints, takes the page's colours and can be read aloud; its whole library is 0.9 MB, and comes with vl-convert, so no
copy of it lies in the repository and none is fetched.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2

from flows.pages.section import Section
from storage.errors import StorageError
from storage.files import write_whole


@lru_cache(maxsize=1)
def _library() -> str:
    """Vega, Vega-Lite and vega-embed as one script that sets window.vegaEmbed."""
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("flows.pages"),
        autoescape=True,  # names and paths come from users
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def page(title: str, sections: list[Section], **about: Any) -> str:
    """The whole page. about: what the head shows, see templates/page.html."""
    template = _environment().get_template("page.html")
    return template.render(title=title, sections=sections, library=_library(), **about)


def write(file: Path, text: str) -> Path:
    """Put the page where it belongs, whole or not at all. Raises StorageError."""
    try:
        write_whole(file, text)
    except OSError as error:
        raise StorageError(f"cannot write {file}: {error.strerror}") from error
    return file
