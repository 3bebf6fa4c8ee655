"""Write alchemy/CLI.md, the table of all flags, from the parsers of the three scripts.

python tests/helpers/flags.py
"""

import argparse
import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CLI_MD = ROOT / "alchemy" / "CLI.md"
SCRIPTS = ("train", "sample", "insert")
HEAD = """# Command line

All flags of the three scripts, as `--help` prints them, and
[the flags of other tools](#flags-of-other-tools). Written by `python tests/helpers/flags.py`.
"""
OTHER = """## Flags of other tools

A flag or value of diffusers, kohya's scripts, A1111 or ComfyUI is refused with its name here.
Dashes and underscores are the same.
"""


def row(action: argparse.Action) -> str:
    """One flag as a row of a Markdown table."""
    names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.dest}`"
    value = action.metavar or ("" if action.nargs == 0 else action.dest.upper())
    if action.choices and not action.metavar:
        value = " \\| ".join(map(str, action.choices))
    value = value.replace("|", "\\|") if action.metavar else value
    text = (action.help or "").replace("%%", "%").replace("|", "\\|")
    return f"| {names} | {value} | {text} |"


def table(parser: argparse.ArgumentParser) -> str:
    """The flags of a parser, a table for each of its groups."""
    parts = []
    for group in parser._action_groups:  # argparse has no public way to list them
        actions = [
            a for a in group._group_actions if a.help != argparse.SUPPRESS and a.dest != "help"
        ]
        if not actions:
            continue
        title = {"options": "General", "positional arguments": "Arguments"}.get(group.title)
        parts.append(f"\n### {title or group.title.capitalize()}\n")
        parts.append("| flag | value | meaning |\n|---|---|---|")
        parts += [row(action) for action in actions]
    return "\n".join(parts)


def other_tools() -> str:
    """What the flags and values of other tools are called here."""
    from alchemy.extras.other_tools import FLAGS, VALUES

    parts = ["| flags there | here |", "|---|---|"]
    for answer, names in FLAGS.items():
        there = ", ".join(f"`--{name}`" for name in names)
        parts.append(f"| {there} | {answer} |")
    parts += ["", "| values there | here |", "|---|---|"]
    for answer, names in VALUES.items():
        parts.append(f"| {', '.join(names)} | {answer} |")
    return "\n".join(parts)


def document() -> str:
    sys.path.insert(0, str(ROOT))
    parts = [HEAD]
    for script in SCRIPTS:
        parser = importlib.import_module(script).parser()
        parts.append(f"## {script}.py\n{table(parser)}\n")
    parts.append(f"{OTHER}\n{other_tools()}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    CLI_MD.write_text(document(), encoding="utf-8")
