"""
What the scripts share on the command line: flags made from dataclass fields, errors that a user can
fix, and a progress line.
"""
import argparse
import ast
import builtins
import contextlib
import difflib
import math
import operator
import os
import shutil
import signal
import sys
import time
import typing
from dataclasses import field


class UserError(Exception):
    """An error that the user can fix. `run_main` prints its message as one line."""
    code = 1                                                     # the exit code


class UsageError(UserError):
    """An error in the command line."""
    code = 2


@contextlib.contextmanager
def usage_errors():
    """Turn a ValueError into a UsageError, where the values come from the command line."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from None


# --------------------------------------------------------------------------------------------------
# Flags

LIMITS = {"at_least": (operator.ge, "at least"), "above": (operator.gt, "above"),
          "at_most": (operator.le, "at most"), "below": (operator.lt, "below")}


# What other programs call our flags
SYNONYMS = {"prompt": "start", "lr": "learning_rate"}


def flag(default, text, **metadata):
    """Return a dataclass field that is also a flag of the command line; `text` is its help.

    Limits of the value: at_least, above, at_most, below (numbers), choices (a list of texts).
    if_bare: the value if the flag is typed without one.
    """
    return field(default=default, metadata={"help": text, **metadata})


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(message)


def parse_flags(description, flags, positional=None, argv=None, defaults=None):
    """Parse --name=value for every dataclass field in `flags` {name: field}.

    Returns ({name: value} of the flags that were typed, [positional arguments]). Booleans take
    --flag, --flag=True, --flag=False and --no-flag. `positional` is the help text of the positional
    arguments, None if there are none; `defaults` {name: value} are shown by --help in place of the
    fields' own. Raises UsageError for an unknown flag or a wrong value.
    """
    parser = Parser(usage="%(prog)s [--flag=value ...]", description=description,
                    allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, f in flags.items():
        add_flag(parser, name, f, (defaults or {}).get(name, f.default))
    if positional:
        parser.add_argument("arguments", nargs="*", help=positional)
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        refuse_unknown(unknown[0], flags)
    typed = vars(known)
    arguments = typed.pop("arguments", [])
    for name, value in typed.items():
        check_limits(name, value, flags[name].metadata)
    return typed, arguments


def add_flag(parser, name, f, default):
    kind = kind_of(f)
    text = f.metadata["help"]
    if default is not None:
        text += f" [{default}]"
    options = {"default": argparse.SUPPRESS, "metavar": kind.__name__, "type": kind,
               "help": text.replace("%", "%%")}
    if kind is bool:
        options.update(type=boolean, nargs="?", const=True)
        parser.add_argument(f"--no-{name}", dest=name, action="store_false",
                            default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    elif "if_bare" in f.metadata:
        options.update(nargs="?", const=f.metadata["if_bare"])
    parser.add_argument(f"--{name}", **options)


def flags_in_source(path, name):
    """{name: field} of the dataclass `name` in a Python file, from its text: to import the file may
    take seconds. Its fields must be made by `flag` from literals."""
    with open(path, encoding="utf-8") as f:
        tree = ast.parse(f.read())
    flags = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == name:
            for line in node.body:
                if isinstance(line, ast.AnnAssign):
                    default, text = map(ast.literal_eval, line.value.args)
                    kind = ast.unparse(line.annotation).split()[0]
                    flags[line.target.id] = flag(default, text)
                    flags[line.target.id].type = getattr(builtins, kind)
    return flags


def kind_of(f):
    """bool, int, float or str: the type of a field, which may be `int | None`."""
    kinds = typing.get_args(f.type) or (f.type,)
    return kinds[0]


def boolean(text):
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() in ("true", "1")


def refuse_unknown(argument, flags):
    name = argument.split("=")[0]
    if not name.startswith("-"):
        raise UsageError(f"unknown argument {argument!r}: values are given as --name=value; config "
                         "files are not run, type their lines as flags")
    bare = name.lstrip("-").removeprefix("no-").replace("-", "_")
    near = [SYNONYMS[bare]] if SYNONYMS.get(bare) in flags else []
    near = near or difflib.get_close_matches(bare, flags, 1)
    hint = f": did you mean --{near[0]}?" if near else ""
    raise UsageError(f"there is no flag {name}{hint}")


def refuse(typed, names, why):
    """Raise UsageError if one of the flags `names` was typed. why: the rest of the message."""
    for name in sorted(typed.keys() & set(names)):
        raise UsageError(f"--{name} {why}")


def check_limits(name, value, limits):
    """Raise UsageError if the value of a flag is outside the limits in its field's metadata."""
    shown = f"--{name}={value!s:.50}"
    if value == "" and limits.get("if_bare") != "":
        raise UsageError(f"--{name} is empty: give it a value, or leave it out")
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{shown} must be a finite number")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise UsageError(f"{shown} must be below 2^63")
    if value not in limits.get("choices", (value,)):
        raise UsageError(f"{shown} is not one of {', '.join(limits['choices'])}")
    for limit, (holds, words) in LIMITS.items():
        if limit in limits and not holds(value, limits[limit]):
            raise UsageError(f"{shown} must be {words} {limits[limit]}")


# --------------------------------------------------------------------------------------------------
# Errors


def run_main(main, memory_advice, report=None):
    """Call main() and exit with the code that it returns (None: 0).

    An error that the user can fix is passed to `report` (default: `print_error`) as one line, and
    the exit code is 2 for a UsageError, else 1. memory_advice: what to do when memory runs out.
    """
    repair_output()
    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:    # the script set it, see there
            signal.signal(signal.SIGINT, signal.default_int_handler)
        code = main() or 0
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:                                    # the reader (`head`) closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)             # or Python complains as it flushes
        code = 141
    except (UserError, ValueError, OSError, MemoryError, RuntimeError) as error:
        message = str(error) or type(error).__name__
        code = getattr(error, "code", 1)
        if is_out_of_memory(error):
            message = f"out of memory. {memory_advice}"
        elif isinstance(error, RuntimeError):                    # not an error that a user can fix
            raise
        if code == 2:
            message += " (--help lists the flags)"
        (report or print_error)(message)
    sys.exit(code)


def repair_output():
    """Make print() safe where stdout or stderr are closed, or lack a character."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    if hasattr(sys.stdout, "reconfigure"):                  # a notebook's stdout has no such method
        sys.stdout.reconfigure(errors="replace")


def lock(path):
    """Open a file to append bytes to it, and keep other runs out as long as it is open: until this
    process ends, however it ends."""
    f = open(path, "ab")
    try:
        import fcntl
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another run is writing to {path.removesuffix('/.lock')}: wait until it "
                        "ends, or choose another folder") from None
    except (ImportError, OSError):                               # Windows, or a disk without locks
        pass
    return f


def print_error(message):
    print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)


def is_out_of_memory(error):
    """Whether this is how Python, CUDA, MPS or a CPU reports that memory ran out."""
    words = str(error)
    return (type(error).__name__ in ("OutOfMemoryError", "MemoryError")
            or "out of memory" in words or "allocate memory" in words)


# --------------------------------------------------------------------------------------------------
# Progress


class Progress:
    """A line on stderr with what is done, the rate and the time left. In a terminal each line
    overwrites the last one; a log file gets one every ten seconds. Quick work prints nothing."""

    def __init__(self, name, unit="MB", scale=1e6):
        """scale: how many of what `show` counts make one unit (1e6 bytes: 1 MB)."""
        self.name = name
        self.unit = unit
        self.scale = scale
        self.started = None
        self.finished = False

    def show(self, done, size=None):
        """done: the amount so far; size: the final one or None. The first call sets the start."""
        now = time.monotonic()
        pause = 10.0
        terminal = sys.stderr.isatty()
        if terminal:
            pause = 0.2
        if self.started is None:
            self.started = self.printed = now
            self.first = done
        last = done == size and self.printed > self.started      # completes a line printed before
        if self.finished or not last and now - self.printed <= pause:
            return
        self.printed = now
        self.finished = done == size
        rate = max(done - self.first, 1) / max(now - self.started, 1e-9)
        line = f"{self.name[:30]}  {self.number(done)}"
        if size is not None:
            line += f" of {self.number(size)}"
        line += f" {self.unit}  {self.number(rate)} {self.unit}/s"
        if size and not self.finished:
            line += f"  {done / size:4.0%}  {(size - done) / rate:,.0f} s left"
        end = "\r" if terminal and not self.finished else "\n"
        if terminal:
            width = min(shutil.get_terminal_size().columns, 80) - 1      # a full line would wrap
            line = line[:width].ljust(width)
        print(line, end=end, file=sys.stderr, flush=True)

    def number(self, count):
        digits = 1 if self.scale > 1 else 0
        return f"{count / self.scale:,.{digits}f}"
