"""What the site does beyond Markdown: it runs notebooks, and turns formulas into MathML, which browsers draw."""

import base64
import html
import re
from collections.abc import Iterator
from typing import Any

import jupytext
from latex2mathml.converter import convert
from nbclient import NotebookClient


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Run the cells of a page that is a jupytext notebook, and put what they show below each."""
    if "jupyter" not in page.meta:
        return markdown
    notebook = jupytext.reads(markdown, fmt="md")
    NotebookClient(notebook, kernel_name="python3", timeout=300, coalesce_streams=True).execute()
    return "\n\n".join(part for cell in notebook.cells for part in _parts(cell))


def _parts(cell: Any) -> Iterator[str]:
    if cell.cell_type != "code":
        yield cell.source
        return
    yield f"```python\n{cell.source}\n```"
    for output in cell.outputs:
        data = output.get("data", {})
        if "image/png" in data:
            yield f"![{cell.metadata.get('alt', '')}](data:image/png;base64,{data['image/png'].strip()})"
        elif "image/svg+xml" in data:
            svg = base64.b64encode(data["image/svg+xml"].encode()).decode()
            yield f"![{cell.metadata.get('alt', '')}](data:image/svg+xml;base64,{svg})"
        else:
            text = output.get("text") or data["text/plain"]
            yield f"```{{ .text .output }}\n{text.rstrip()}\n```"


def on_page_content(content: str, **_: Any) -> str:
    r"""Replace what arithmatex has marked, `\(...\)` in lines and `\[...\]` in blocks."""
    formula = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
    return formula.sub(_mathml, content)


def _mathml(match: re.Match[str]) -> str:
    tag, latex = match.groups()
    display = "block" if tag == "div" else "inline"
    mathml = convert(html.unescape(latex), display=display)
    mathml = re.sub("<mi>(log|max)</mi>", r'<mo lspace="0.17em" rspace="0.17em">\1</mo>', mathml)
    return f'<{tag} class="formula">{mathml}</{tag}>'
