"""
Text to tokens. Each data set is a short function below; add one and it has a name here and in train.py --dataset=NAME.

    python data/prepare.py stdlib                 # the source of this Python's standard library, by characters
    python data/prepare.py shakespeare_char       # nanoGPT's text, by characters
    python data/prepare.py shakespeare            # the same in GPT-2's tokens
    python data/prepare.py PATH... --name=mine    # your own files and folders: text, .jsonl, and .gz of either

Writes data/NAME/ with train.bin and val.bin (the tokens, raw uint16, as nanoGPT has them) and meta.json (the tokenizer).
"""
import argparse
import codecs
import contextlib
import difflib
import functools
import gzip
import hashlib
import json
import os
import re
import shutil
import sys
import sysconfig
import time
import zlib

import numpy as np

DATA = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(DATA))
from model import download  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer


class Tokenizer:
    """GPT-2's byte pairs ("gpt2", by tiktoken), or a table of characters. Saved as meta.json beside tokens and
    checkpoints: {"tokenizer": "gpt2"} or {"tokenizer": "char", "characters": "...", "end_of_text": id or null}."""

    def __init__(self, name, characters=None, end_of_text=None):
        self.name = name
        if name == "gpt2":
            self.vocab_size, self.end_of_text = 50257, 50256
        elif name == "char":
            if not isinstance(characters, str) or not characters or len(set(characters)) != len(characters):
                raise ValueError("a character tokenizer needs its table of characters, each once")
            if end_of_text not in (None, len(characters)):
                raise ValueError(f"end_of_text={end_of_text!r} must be {len(characters)}, one past the characters, or null")
            self.characters, self.end_of_text = characters, end_of_text
            self.vocab_size = len(characters) + (end_of_text is not None)
            if self.vocab_size > UNKNOWN:
                raise ValueError(f"{self.vocab_size} different characters do not fit uint16: use --tokenizer=gpt2")
            self.ids = np.full(0x110000, UNKNOWN, dtype=np.uint16)         # code point -> id
            self.ids[codes(characters)] = np.arange(len(characters))
        else:
            raise ValueError(f"tokenizer {name!r} is not known: use gpt2 or char")

    def encode(self, text):
        """-> uint16 array. ValueError for a character that is not in the table. "<|endoftext|>" in a text is just text."""
        if self.name == "gpt2":
            return np.array(gpt2_bpe().encode_ordinary(text), dtype=np.uint16)
        ids = self.ids[codes(text)]
        if (bad := np.flatnonzero(ids == UNKNOWN)).size:
            raise ValueError(f"the character {text[bad[0]]!r} is not among the {len(self.characters)} that the model was "
                             f"trained on: {''.join(sorted(self.characters))[:120]!r}")
        return ids

    def decode_bytes(self, ids):
        """-> UTF-8. A GPT-2 token can be a part of a character, so only whole texts are sure to be whole UTF-8."""
        if self.name == "gpt2":
            return gpt2_bpe().decode_bytes([i for i in ids if i < self.vocab_size])
        return "".join("<|endoftext|>" if i == self.end_of_text else self.characters[i] for i in ids).encode()

    def decode(self, ids):
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def to_json(self):
        return {"tokenizer": "gpt2"} if self.name == "gpt2" else {
            "tokenizer": "char", "characters": self.characters, "end_of_text": self.end_of_text}

    @classmethod
    def load(cls, folder, missing="gpt2"):
        """From folder/meta.json; where there is none, the tokenizer named `missing`."""
        path = os.path.join(folder, "meta.json")
        if not os.path.exists(path):
            if os.path.exists(os.path.join(folder, "meta.pkl")):
                raise ValueError(f"{folder} has a meta.pkl, a pickle, which could run code and is not read: "
                                 "prepare the data anew with data/prepare.py, which writes meta.json")
            return cls(missing)
        with open(path, encoding="utf-8") as f:
            try:
                meta = json.load(f)
                return cls(meta["tokenizer"], meta.get("characters"), meta.get("end_of_text"))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
                raise ValueError(f"{path} is damaged: {e!s:.200}") from None


UNKNOWN = 65535


def codes(text):
    """The code points of a text, as an array."""
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)


@functools.cache
def gpt2_bpe():
    import requests
    import tiktoken
    # By default tiktoken keeps its files where a reboot loses them.
    if not {"TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"} & os.environ.keys():
        os.environ["TIKTOKEN_CACHE_DIR"] = os.path.join(os.path.expanduser("~"), ".cache", "tiktoken")
    try:
        return tiktoken.get_encoding("gpt2")
    except (requests.RequestException, OSError, ValueError) as e:
        url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
        names = "; ".join(f"{url}{f} as {hashlib.sha1((url + f).encode()).hexdigest()}" for f in ("vocab.bpe", "encoder.json"))
        raise ConnectionError(f"GPT-2's tokenizer files cannot be fetched ({type(e).__name__}). To work offline, set "
                              f"TIKTOKEN_CACHE_DIR to a folder that holds two files: {names}") from None


# ---------------------------------------------------------------------------------------------------------------------
# The data sets: each writes one folder


def stdlib(folder, source=None):
    """The running Python's standard library: no download, and a model of it writes what looks like Python."""
    root = source or sysconfig.get_paths()["stdlib"]
    skip = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data"}
    paths = []
    for where, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in skip)
        paths += [os.path.join(where, name) for name in sorted(files) if name.endswith(".py")]
    plain = [path for path in paths if open(path, "rb").read().isascii()]  # keeps the table at some 100 characters
    write_tokens(folder, lambda: ((os.path.relpath(p, root), None, read_pieces(p)) for p in plain), "char",
                 sum(map(os.path.getsize, plain)))


def shakespeare_char(folder, source=None, tokenizer="char"):
    path = source or os.path.join(DATA, "downloads", "tinyshakespeare.txt")
    if not os.path.exists(path):
        download("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt", path,
                 sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")
    with open(path, encoding="utf-8", newline="") as f:
        text = f.read()
    cut = int(len(text) * 0.9)                                             # nanoGPT's split
    write_tokens(folder, lambda: [("train", "train", [text[:cut]]), ("val", "val", [text[cut:]])], tokenizer, len(text))


def shakespeare(folder, source=None):
    shakespeare_char(folder, source, tokenizer="gpt2")


DATASETS = {f.__name__: f for f in (stdlib, shakespeare_char, shakespeare)}


def own(folder, paths, tokenizer="gpt2", val_frac=0.1, field="text"):
    """Any files and folders. Each file is a document, each line of a .jsonl file another (its `field`)."""
    files = []
    for path in paths:
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path!r} is neither a file, a folder nor a data set: the data sets are {', '.join(DATASETS)}")
        if os.path.isdir(path):
            for where, folders, names in os.walk(path):
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                files += [os.path.join(where, name) for name in sorted(names) if not name.startswith(".")]
        else:
            files.append(path)
    binary = dict.fromkeys(path for path in files if is_binary(path))
    files = [path for path in files if path not in binary]
    if binary:
        print(f"{len(binary)} files that are not text are left out, the first: {next(iter(binary))}")

    def documents():
        for path in files:
            if path.removesuffix(".gz").endswith(".jsonl"):
                yield from json_lines(path, field)
            else:
                yield path, None, read_pieces(path)
    write_tokens(folder, documents, tokenizer, sum(map(os.path.getsize, files)), val_frac)


# ---------------------------------------------------------------------------------------------------------------------
# Reading and writing


@contextlib.contextmanager
def open_text(path, mode="rt"):
    """Opens a file that may be a .gz. ValueError where it turns out not to be UTF-8, or damaged."""
    opener = gzip.open if path.endswith(".gz") else open
    try:
        with opener(path, mode, **({} if "b" in mode else dict(encoding="utf-8", newline=""))) as f:
            yield f
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise ValueError(f"{path} cannot be read ({e}): mend it, convert it to UTF-8, or leave it out") from None


def is_binary(path):
    try:
        with open_text(path, "rb") as f:
            head = f.read(1 << 16)
        codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < 1 << 16)  # the cut may be in a character
        return b"\0" in head
    except ValueError:
        return True


CUT = re.compile(r".*\S(?=[ \t\r\n])", re.DOTALL)


def read_pieces(path, size=1 << 20):
    """A file's text in pieces of about `size` characters. A piece ends before white space that follows something else:
    there GPT-2's tokenizer cuts anyway, so the tokens are those of the whole text."""
    rest = ""
    with open_text(path) as f:
        while more := f.read(size):
            rest += more
            if cut := CUT.match(rest):
                yield rest[:cut.end()]
                rest = rest[cut.end():]
    if rest:
        yield rest


def json_lines(path, field):
    with open_text(path) as f:
        for number, line in enumerate(f, 1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict) or not isinstance(record.get(field), str):
                raise ValueError(f"{path}, line {number}: no JSON object with a text {field!r}: name the field with --field")
            yield f"{path}:{number}", None, [record[field]]


def write_tokens(folder, documents, tokenizer, size, val_frac=0.1):
    """documents() -> (name, "train" | "val" | None, pieces of text)... None: a hash of the name decides, and where that
    leaves nothing for validation, the tail of all tokens is taken. `size`: bytes in all, for the progress line.
    All is written beside `folder` and moved into place whole."""
    if os.path.exists(folder) and (others := set(os.listdir(folder)) - {"train.bin", "val.bin", "meta.json"}):
        raise ValueError(f"{folder} holds {min(others)!r} too, which would be lost: choose another --name, or move it away")
    part = folder.rstrip("/\\") + ".part"
    shutil.rmtree(part, ignore_errors=True)
    os.makedirs(part)
    progress = Progress(os.path.basename(folder), size)
    if tokenizer == "char":
        characters, count = set(), 0
        for _, _, pieces in documents():
            count += 1
            for text in pieces:
                characters.update(text)
        characters = "".join(sorted(characters))
        several = any(split is None for _, split, _ in documents()) and count > 1
        tokenizer = Tokenizer("char", characters, len(characters) if several else None) if characters else None
    else:
        tokenizer = Tokenizer(tokenizer)
    tokens = {"train": 0, "val": 0}
    paths = {split: os.path.join(part, f"{split}.bin") for split in tokens}
    with open(paths["train"], "wb") as train, open(paths["val"], "wb") as val:
        files = {"train": train, "val": val}
        for name, split, pieces in documents():
            split = split or ("val" if zlib.crc32(name.encode("utf-8", "replace")) < val_frac * 2**32 else "train")
            for i, text in enumerate(pieces):
                ids = tokenizer.encode(text)
                if i == 0 and tokens[split] and tokenizer.end_of_text is not None:
                    ids = np.concatenate((np.array([tokenizer.end_of_text], np.uint16), ids))
                ids.astype("<u2").tofile(files[split])
                tokens[split] += len(ids)
                progress.add(len(text))
    if not tokens["train"] + tokens["val"]:
        shutil.rmtree(part)
        raise ValueError(f"{os.path.basename(folder)}: there is no text in what was given")
    if not (tokens["val"] and tokens["train"]) and val_frac > 0:
        everything = np.memmap(paths["train" if tokens["train"] else "val"], dtype="<u2", mode="r")
        cut = int(len(everything) * (1 - val_frac))
        tokens = {"train": cut, "val": len(everything) - cut}
        for split, ids in (("train", everything[:cut]), ("val", everything[cut:])):
            ids.tofile(paths[split] + ".cut")
        del everything
        for path in paths.values():
            os.replace(path + ".cut", path)
    with open(os.path.join(part, "meta.json"), "w", encoding="utf-8") as f:
        json.dump({**tokenizer.to_json(), "tokens": tokens}, f)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
    progress.done()
    print(f"{folder}: {tokens['train']:,} tokens to train on, {tokens['val']:,} to validate, "
          f"vocabulary {tokenizer.vocab_size} ({tokenizer.name})")


class Progress:
    """One line that renews itself in a terminal, and stays silent in a log file."""

    def __init__(self, name, size):
        self.name, self.size, self.seen, self.began, self.shown = name, max(size, 1), 0, time.time(), 0.0

    def add(self, amount):
        self.seen += amount
        now = time.time()
        if sys.stderr.isatty() and now - self.shown > 0.2:
            self.shown, rate = now, self.seen / max(now - self.began, 1e-9)
            print(f"\r{self.name}  {self.seen / 1e6:,.1f} of {self.size / 1e6:,.1f} MB  {rate / 1e6:.1f} MB/s   ",
                  end="", file=sys.stderr, flush=True)

    def done(self):
        if self.shown:
            print("\r" + " " * 70, end="\r", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Command line, shared by the three scripts


def command_line(description, options, positional=None, argv=None):
    """Parses --name=value for `options` {name: (type, default, help)} -> ({name: value given}, [positionals]).
    Booleans take --flag, --flag=True, --flag=False and --no-flag. A mistake ends with one line and exit code 2."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            refuse(message)
    parser = Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (kind, default, text) in options.items():
        shown = f"{text} [{default}]" if default not in (None, "") else text
        how = dict(default=argparse.SUPPRESS, help=shown.replace("%", "%%"), metavar=kind.__name__)
        if kind is bool:
            parser.add_argument("--" + name, nargs="?", const=True, type=boolean, **how)
            parser.add_argument("--no-" + name, dest=name, action="store_false", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        elif default == "":                                                # a text that may be left out
            parser.add_argument("--" + name, nargs="?", const="", type=kind, **how)
        else:
            parser.add_argument("--" + name, type=kind, **how)
    if positional:
        parser.add_argument("positional", nargs="*", help=positional)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        if not name.startswith("-"):
            refuse(f"{unknown[0]!r} is not understood here: values are given as --name=value"
                   + (" (config files are not run: give their lines as flags)" if name.endswith(".py") else ""))
        near = difflib.get_close_matches(name.lstrip("-").removeprefix("no-").replace("-", "_"), options, 1, 0.5)
        refuse(f"there is no flag {name}" + (f": did you mean --{near[0]}?" if near else ""))
    given = vars(given)
    return given, given.pop("positional", [])


def boolean(text):
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() in ("true", "1")


def refuse(message):
    """A bad command line: one line, exit code 2."""
    if os.environ.get("RANK", "0") == "0":                                 # the other processes have the same to say
        print(f"{os.path.basename(sys.argv[0])}: {message} (--help lists the flags)", file=sys.stderr)
    sys.exit(2)


def guarded(main):
    """Runs main(); what a user can mend ends with one line and exit code 1, not with a traceback."""
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"{os.path.basename(sys.argv[0])}: {e}")


def main():
    options = {
        "name": (str, None, "what to call your own data: train.py --dataset=NAME"),
        "tokenizer": (str, None, "gpt2 or char, for your own data [gpt2]"),
        "val_frac": (float, None, "part of your own data that is kept for validation [0.1]"),
        "field": (str, None, "the text's name in the objects of your .jsonl files [text]"),
        "source": (str, None, "a download that is already on the machine, for a named data set"),
    }
    given, what = command_line(__doc__, options, "the name of a data set, or files and folders of your own")
    if not what:
        refuse(f"say what to prepare: {', '.join(DATASETS)}, or files and folders of your own")
    if len(what) == 1 and what[0] in DATASETS:
        if wrong := given.keys() - {"source"}:
            refuse(f"--{min(wrong)} has no effect on {what[0]}: it is for your own files")
        if "source" in given and not os.path.exists(given["source"]):
            refuse(f"--source={given['source']} is not there")
        return DATASETS[what[0]](os.path.join(DATA, what[0]), **given)
    if "source" in given:
        refuse("--source has no effect on your own files: name them as they are")
    if not given.get("name"):
        missing = [path for path in what if not os.path.exists(path)]
        near = difflib.get_close_matches(what[0], DATASETS, 1)
        refuse(f"{missing[0]!r} is neither a data set ({', '.join(DATASETS)}) nor a file or folder"
               + (f": did you mean {near[0]}?" if near else "") if missing else "give your data a name: --name=NAME")
    if given["name"] in DATASETS:
        refuse(f"--name={given['name']} is the name of a data set: choose another")
    if not 0 < given.get("val_frac", 0.1) < 1:
        refuse(f"--val_frac={given['val_frac']} must be between 0 and 1")
    if given.get("tokenizer", "gpt2") not in ("gpt2", "char"):
        refuse(f"--tokenizer={given['tokenizer']} is not known: use gpt2 or char")
    own(os.path.join(DATA, given.pop("name")), what, **given)


if __name__ == "__main__":
    guarded(main)
