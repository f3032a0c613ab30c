"""What the three scripts share: flags, errors in one line, and a progress line.

A flag is a field of a dataclass, and its help is the comment on its line:

    n_layer: int = 12           # number of transformer blocks
"""
import argparse
import contextlib
import inspect
import os
import re
import sys
import time
import typing
from argparse import SUPPRESS
from dataclasses import fields
from functools import partial


def flag_parser(description, *dataclasses, **defaults):
    """-> an argparse parser with a flag --name=value for each field. Its result holds only the
    flags that were typed. defaults: shown by --help in place of the fields' own."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--flag=value ...]", description=description, allow_abbrev=False,
        argument_default=SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    for dataclass in dataclasses:
        add_flags(parser, dataclass, **defaults)
    return parser


def add_flags(parser, dataclass, only=None, **defaults):
    """Add a flag for each field. only: just these fields, and the help leaves their defaults out.

    A field's metadata may hold "bare", the value of the flag typed without one.
    """
    source = inspect.getsource(dataclass)
    for field in fields(dataclass):
        name = field.name
        if only is not None and name not in only:
            continue
        kind = (*typing.get_args(field.type), field.type)[0]     # int, also of `int | None`
        bare = field.metadata.get("bare")
        if kind is bool:
            bare = True
            parser.add_argument(f"--no-{name}", dest=name, action="store_false", help=SUPPRESS)
        text = comment_of(name, source)
        default = defaults.get(name, field.default)
        if only is None and default is not None:
            text += f" [{default}]"
        parser.add_argument(
            f"--{name}", type=partial(read_value, kind, bare), metavar=kind.__name__,
            nargs=None if bare is None else "?", const=bare, help=text.replace("%", "%%"))


def comment_of(name, source):
    """The comment on the line of a field, and the lines of comment right below it."""
    found = re.search(rf"^    {name}:[^#]*# (.*(\n +# .*)*)", source, re.MULTILINE)
    return re.sub(r"\n +# ", " ", found[1])


def read_value(kind, bare, text):
    """The value of a flag from its text."""
    if text == "" != bare:
        raise argparse.ArgumentTypeError("the value is empty: type one, or leave the flag out")
    if kind is bool:
        kind = {"True": True, "False": False}.__getitem__
    try:
        value = kind(text)
    except (KeyError, ValueError):
        words = {int: "a whole number", float: "a number"}
        raise argparse.ArgumentTypeError(
            f"{text!r} is not {words.get(kind, 'True or False')}") from None
    if kind in (int, float) and not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is negative, too large or no number")
    return value


@contextlib.contextmanager
def one_line(*errors):
    """End the script with one line for an error that is expected here."""
    try:
        yield
    except errors as error:
        sys.exit(f"{os.path.basename(sys.argv[0])}: {error}")


def progress(iterable, total, name, size=None):
    """Yield the items, and show on stderr what part of `total` is done, once a second in a terminal
    and every 30 seconds in a log file. size: a function of an item; None counts each as 1."""
    pause = 1 if sys.stderr.isatty() else 30
    began = shown = time.monotonic()
    done = 0
    for item in iterable:
        yield item
        done += size(item) if size else 1
        now = time.monotonic()
        if now - shown > pause:
            part = min(1, done / max(total, 1))
            left = (now - began) * (1 - part) / max(part, 1e-3)
            print(f"{name}  {part:.0%}  {left:,.0f} s left", file=sys.stderr, flush=True,
                  end="   \r" if pause == 1 else "\n")
            shown = now
