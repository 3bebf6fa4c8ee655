"""The public surface: every name resolves, is documented and hinted, and is known to editors."""

import ast
import inspect
from pathlib import Path

import pytest

import alchemy


def test_editors_see_the_names_that_are_loaded_lazily():
    tree = ast.parse(Path(alchemy.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    hints = {}
    for node in block.body:
        hints |= {alias.name: node.module for alias in node.names}
    assert hints == alchemy.EXPORTS and sorted(dir(alchemy)) == sorted(alchemy.EXPORTS)
    assert (Path(alchemy.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize("name", alchemy.EXPORTS)
def test_a_public_name_has_a_docstring_and_type_hints(name):
    value = getattr(alchemy, name)
    assert value.__doc__
    if alchemy.EXPORTS[name].startswith(("formats.", "extras.")) or name == "SDXL":
        return
    for parameter in inspect.signature(value).parameters.values():
        untyped = parameter.annotation is inspect.Parameter.empty
        assert not untyped or parameter.name == "sdxl", f"{name}: {parameter}"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        alchemy.lode  # noqa: B018
