"""--inspect, of all three scripts: its flags, and where the page goes. Imports no torch."""
from pathlib import Path

from .. import command


def add_flags(p):
    g = p.add_argument_group("a look inside")
    g.add_argument("--inspect", metavar="DIR",            help="write a page that shows every step, and sheets, into this folder or the next free one of its name")
    g.add_argument("--inspect-full", action="store_true", help="with --inspect: all arrays too, as safetensors beside the page")


def page_folder(args):
    """A free folder for the page of --inspect, proved writable; None where none is wanted."""
    if args.inspect_full and not args.inspect:
        raise ValueError("--inspect-full goes with --inspect DIR, which says where")
    if not args.inspect:
        return None
    path, number = Path(args.inspect), 0
    while (path / "index.html").exists():
        number += 1
        path = Path(args.inspect).with_name(f"{Path(args.inspect).name}-{number}")
    return command.folder(path, "--inspect")
