"""What keeps the code small enough to read: lines of the core, of a file, of a function; who may import what."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("methods", "formats", "report", "savers", "command")
PACKAGES = {"torch", "numpy", "PIL", "safetensors", "huggingface_hub", "tqdm"}
SCRIPTS = [ROOT / name for name in ("train.py", "sample.py", "insert.py") if (ROOT / name).exists()]


def tracked():
    """Every .py file of the repository; without git, those outside hidden folders."""
    found = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode == 0 and found.stdout:
        return [path for line in found.stdout.splitlines() if (path := ROOT / line).exists()]
    return [p for p in ROOT.rglob("*.py") if not any(part.startswith(".") or part == "out" for part in p.relative_to(ROOT).parts)]


FILES = tracked()
names = [str(path.relative_to(ROOT)) for path in FILES]
CORE = sorted((ROOT / "alchemy").glob("*.py"))


def lines(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def imports(path):
    """Dotted names that a file imports, anywhere in it; relative ones begin with their dots."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from (base + ("" if base.endswith(".") else ".") + alias.name for alias in node.names)


def test_the_core_is_at_most_2000_lines():
    assert sum(map(lines, CORE)) <= 2000, {path.name: lines(path) for path in CORE}


@pytest.mark.parametrize("path", FILES, ids=names)
def test_a_file_is_under_250_lines_and_a_function_under_46(path):
    assert lines(path) < 250
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno + 1 < 46, f"{path.name}:{node.lineno} {node.name}"


@pytest.mark.parametrize("path", CORE, ids=[path.name for path in CORE])
def test_the_core_imports_nothing_from_its_rooms(path):
    # The table in __init__.py names them as strings, and imports one when its name is first asked for.
    for name in imports(path):
        if name.startswith(("alchemy.", ".")):
            assert not set(name.lstrip(".").removeprefix("alchemy.").split(".")[:1]) & set(ROOMS), name


def test_nothing_is_imported_beyond_the_six_packages():
    for folder in (ROOT / "alchemy", ROOT / "weights"):
        local = {"alchemy"} | {path.stem for path in (folder.glob("*.py") if folder.name == "weights" else ())}
        for path in [p for p in FILES if folder in p.parents] + SCRIPTS:
            used = {name.split(".")[0] for name in imports(path) if not name.startswith(".")}
            assert not used - PACKAGES - local - sys.stdlib_module_names, path.relative_to(ROOT)


def test_importing_alchemy_imports_no_torch():
    code = "import sys, alchemy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
