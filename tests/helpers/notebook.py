"""Run alchemy/walkthrough.ipynb cell by cell, without Jupyter.

python tests/helpers/notebook.py    run it and store the outputs in the file
"""

import ast
import base64
import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "alchemy" / "walkthrough.ipynb"


def run_cell(source: str, namespace: dict) -> tuple[str, Image.Image | None]:
    """Execute a cell as Jupyter does: its printed text and the image of its last expression."""
    body = ast.parse(source).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    image = None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(ast.Module(body, []), "cell", "exec"), namespace)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), namespace)
            image = value if isinstance(value, Image.Image) else None
    return printed.getvalue(), image


def run(notebook: dict) -> Iterator[tuple[dict, str, Image.Image | None]]:
    """Run the code cells in one namespace, in the folder of the notebook: (cell, text, image)."""
    namespace: dict = {}
    before = Path.cwd()
    os.chdir(NOTEBOOK.parent)
    sys.path.insert(0, str(ROOT))
    try:
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                yield cell, *run_cell("".join(cell["source"]), namespace)
    finally:
        os.chdir(before)
        sys.path.remove(str(ROOT))


def outputs(text: str, image: Image.Image | None, count: int) -> list[dict]:
    """The outputs of a cell as the notebook format (nbformat 4.5) stores them."""
    stored = []
    if text:
        lines = text.splitlines(keepends=True)
        stored.append({"output_type": "stream", "name": "stdout", "text": lines})
    if image is not None:
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)
        data = {"image/png": base64.b64encode(buffer.getvalue()).decode()}
        result = {"output_type": "execute_result", "execution_count": count}
        stored.append(result | {"metadata": {}, "data": data})
    return stored


def main() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    for count, (cell, text, image) in enumerate(run(notebook), 1):
        cell["execution_count"] = count
        cell["outputs"] = outputs(text, image, count)
        print(f"cell {count}: {len(text)} characters, image: {image and image.size}")
    text = json.dumps(notebook, indent=1, ensure_ascii=False)
    NOTEBOOK.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
