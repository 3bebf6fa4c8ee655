"""--inspect, of all three scripts: its flags, and where the page goes. Imports no torch."""

from pathlib import Path

from .. import cli


def add_flags(p):
    g = p.add_argument_group("a look inside")
    g.add_argument(
        "--inspect",
        metavar="DIR",
        help="write a page that shows every step, and sheets, into this folder (of several pictures, into one each below it), or the next of its name that is new or empty",
    )
    g.add_argument(
        "--inspect-full",
        action="store_true",
        help="with --inspect: all arrays too, as safetensors beside the page",
    )


def page_folder(args, out):
    """A free folder for the page of --inspect, proved writable; None where none is wanted. out: the folder of the results."""
    if args.inspect_full and not args.inspect:
        raise ValueError("--inspect-full goes with --inspect DIR, which says where")
    return None if args.inspect is None else free_folder(args.inspect, "--inspect", out)


def free_folder(wanted, flag, *taken):
    """The folder wanted, or the next of its name that is new or empty and not among those taken; made, and proved writable."""
    path, number = Path(wanted), 0
    try:
        if not str(wanted) or path.exists() and not path.is_dir():
            raise ValueError(f"{flag} {str(wanted)!r} is no folder; name one")
        taken = [Path(folder).resolve() for folder in taken]
        while (
            path.resolve() in taken
            or path.exists()
            and not (path.is_dir() and not any(path.iterdir()))
        ):
            number += 1
            path = Path(wanted).with_name(f"{Path(wanted).resolve().name}-{number}")
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise ValueError(
            f"{flag} {wanted}: cannot write there ({error.strerror}); name another folder"
        ) from None
    return cli.folder(path, flag)


def take_back(page):
    """Where every picture is there already."""
    page.rmdir()
    cli.say("all pictures are there already: none is drawn, there is no page")
