"""The walkthrough notebook runs, and its stored images are there."""

import json

from helpers.notebook import NOTEBOOK, run


def test_every_cell_of_the_notebook_runs_and_each_section_ends_in_an_image():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    images = [image for _, _, image in run(notebook) if image is not None]
    sections = [c for c in notebook["cells"] if "".join(c["source"]).startswith("## ")]
    assert len(sections) == 7
    assert len(images) >= 7


def test_the_notebook_is_stored_with_the_image_of_each_section():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    stored = 0
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            stored += "image/png" in output.get("data", {})
    assert stored >= 7
