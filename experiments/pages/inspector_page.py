"""What routing does, as one self-contained HTML page: no network, it opens from disk.

What can be read without a script (words, tables, small charts: `inspector_tables`) is in the page as text; the rest is
drawn by inspector.js from arrays that stand in it (`inspector_data`). Documents may hold anything: their text reaches
the page as JSON in which no tag can stand, is only ever set as text, and the page's policy lets no script run but its
own.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from experiments.pages.inspector_data import packed
from experiments.pages.inspector_tables import Look, side_by_side, words
from experiments.pages.packed import Pack

HERE = Path(__file__).parent


def render(looks: Sequence[Look]) -> str:
    """The page of one look, or of several side by side."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    pack = Pack()
    data = {"runs": [packed(pack, i, look) for i, look in enumerate(looks)]}
    script = (HERE / "inspector.js").read_text(encoding="utf-8")
    return environment.from_string((HERE / "inspector.html").read_text(encoding="utf-8")).render(
        looks=[words(look) for look in looks],
        together=side_by_side(looks) if len(looks) > 1 else None,
        data=as_json(data | {"arrays": pack.directory}),
        block=pack.text(),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def as_json(tree: Any) -> str:
    """JSON in which no tag and no comment can begin or end."""
    text = json.dumps(tree, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
