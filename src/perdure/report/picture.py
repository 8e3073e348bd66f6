"""A picture of a run: a figure with its texts, drawn as SVG or as PNG."""

import io
import re
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#1d2733"
MUTED = "#5d6b7a"
# one scale for all pictures of a page, so that their text has the same size
PIXELS_PER_POINT = 1.5
STYLE: Any = {  # Any, because matplotlib's type of settings is a literal of all names
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a strategy's options is not mathematics
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8.5,
    "axes.edgecolor": "#b7c0ca",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "figure.facecolor": "white",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.fonttype": "none",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """Figure of a run with its texts.

    Args:
        name: stem of the file name.
        title: heading.
        caption: explanation of the figure.
        alternative: description of the figure for people who cannot see it.
        figure: figure of matplotlib.
    """

    name: str
    title: str
    caption: str
    alternative: str
    figure: "Figure"

    def svg(self) -> str:
        """Draw the picture as SVG text; the same result gives the same bytes."""
        return self._svg

    @cached_property
    def _svg(self) -> str:
        content = io.StringIO()
        self._save(content, "svg", {"Date": None, "Creator": None})
        return re.sub(r"[ \t]+$", "", content.getvalue(), flags=re.MULTILINE)

    def inline_svg(self) -> str:
        """Draw the picture as an <svg> element for an HTML page.

        Ids are unique to this picture, and no file is loaded.
        """
        svg = self.svg()
        body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
        body = re.sub(r"^.*?<svg[^>]*>", "", body, count=1, flags=re.DOTALL)
        body = re.sub(r'\bid="', f'id="{self.name}-', body)
        body = re.sub(r'(?:xlink:)?href="#', f'href="#{self.name}-', body).replace(
            "xlink:href", "href"
        )
        return _opening(svg, self.alternative) + body.replace("url(#", f"url(#{self.name}-")

    def png(self) -> bytes:
        """Draw the picture as PNG at 160 dots per inch."""
        content = io.BytesIO()
        self._save(content, "png", {"Software": None})
        return content.getvalue()

    def _save(self, target: io.StringIO | io.BytesIO, kind: str, metadata: dict[str, None]) -> None:
        from matplotlib import rc_context

        with rc_context({**STYLE, "svg.hashsalt": self.name}):
            # with an engine, matplotlib would lay out the figure twice for every file
            engine = self.figure.get_layout_engine()
            if engine is not None:
                engine.execute(self.figure)
                self.figure.set_layout_engine(None)
            self.figure.savefig(target, format=kind, metadata=metadata, dpi=160)


def _opening(svg: str, alternative: str) -> str:
    """Return the opening tag of an <svg> element for an HTML page.

    It limits the width to the page, and has the description for people who cannot see it.
    """
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box is not None, "matplotlib writes a viewBox"
    size = (
        f'viewBox="{box[1]}" style="max-width: {float(box[1].split()[2]) * PIXELS_PER_POINT:.0f}px"'
    )
    return f'<svg role="img" aria-label="{escape(alternative)}" {size}>'
