"""One picture of a run: a figure with its words, drawn as SVG for pages and files or as PNG."""

import io
import re
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#1d2733"
MUTED = "#5d6b7a"
# one scale for all pictures of a page, so that their letters are of one size
PIXELS_PER_POINT = 1.5
STYLE: Any = {  # matplotlib types its settings by a literal of every name
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "text.color": INK,
    "text.parse_math": False,  # a dollar in a strategy's options is a dollar
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
    """One figure with its words.

    Args:
        name: file stem.
        title: heading.
        caption: how to read it.
        alternative: what it shows, for those who do not see it.
        figure: the drawing.
    """

    name: str
    title: str
    caption: str
    alternative: str
    figure: "Figure"

    def svg(self) -> str:
        """Draw as SVG text; the same result gives the same bytes."""
        content = io.StringIO()
        self._save(content, "svg", {"Date": None, "Creator": None})
        return re.sub(r"[ \t]+$", "", content.getvalue(), flags=re.MULTILINE)

    def inline_svg(self) -> str:
        """Draw as an <svg> element for a page.

        Ids are unique to this picture, nothing is fetched.
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
        """Draw as PNG at 160 dots per inch."""
        content = io.BytesIO()
        self._save(content, "png", {"Software": None})
        return content.getvalue()

    def _save(self, target: io.StringIO | io.BytesIO, kind: str, metadata: dict[str, None]) -> None:
        from matplotlib import rc_context

        with rc_context({**STYLE, "svg.hashsalt": self.name}):
            self.figure.savefig(target, format=kind, metadata=metadata, dpi=160)


def _opening(svg: str, alternative: str) -> str:
    """Return the opening tag for a page.

    As wide as the page at most, named for those who do not see it.
    """
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box is not None, "matplotlib writes a viewBox"
    size = (
        f'viewBox="{box[1]}" style="max-width: {float(box[1].split()[2]) * PIXELS_PER_POINT:.0f}px"'
    )
    return f'<svg role="img" aria-label="{escape(alternative)}" {size}>'
