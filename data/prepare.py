"""
Text to tokens. Each data set is a short function below; add one to DATASETS and train.py knows its
name too.

    python data/prepare.py stdlib               # Python's source, characters
    python data/prepare.py shakespeare_char     # nanoGPT's text, by characters
    python data/prepare.py shakespeare          # the same in GPT-2's tokens
    python data/prepare.py fineweb --shards=9   # 100 million tokens each
    python data/prepare.py PATH... --name=mine  # text, .jsonl, .gz of either

Writes data/NAME/ with train.bin and val.bin (the tokens, raw uint16, as in
nanoGPT) and meta.json (the tokenizer). FineWeb's shards keep llm.c's format.
"""
import contextlib
import difflib
import gzip
import json
import os
import re
import shutil
import sys
import sysconfig
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np

if not __package__:                              # run as a script: the folder above holds `data`
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from data import DATA
from data.cli import Progress, UsageError, UserError, flag, parse_flags, run_main
from data.download import download, hub_download
from data.tokenizer import CharTokenizer, GPT2Tokenizer, code_points, replace_surrogates

# --------------------------------------------------------------------------------------------------
# The data sets: each function writes one folder


def stdlib(folder, source=None):
    """The running Python's standard library: no download, and a model of it writes Python."""
    root = source or sysconfig.get_paths()["stdlib"]
    skipped = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test",
               "encodings", "pydoc_data"}
    paths = []
    for where, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in skipped)
        paths += [os.path.join(where, name) for name in sorted(files) if name.endswith(".py")]
    ascii_only = [path for path in paths if is_ascii(path)]      # about 100 different characters

    def read(path, f):
        yield Document(os.path.relpath(path, root), read_pieces(f))
    write_tokens(folder, ascii_only, read, "char")


def is_ascii(path):
    with open(path, "rb") as f:
        return f.read().isascii()


def shakespeare_char(folder, source=None, tokenizer="char"):
    path = source or os.path.join(DATA, "downloads", "tinyshakespeare.txt")
    if not os.path.exists(path):
        download("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
                 "input.txt", path,
                 sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")

    def read(path, f):
        text = f.read()
        cut = int(len(text) * 0.9)                               # nanoGPT's split
        yield Document("train", [text[:cut]], split="train")
        yield Document("val", [text[cut:]], split="val")
    write_tokens(folder, [os.fspath(path)], read, tokenizer)


def shakespeare(folder, source=None):
    shakespeare_char(folder, source, tokenizer="gpt2")


def fineweb(folder, shards=103):
    """The 10 billion tokens of llm.c's GPT-2 124M: the first `shards`, and the one to validate on."""
    from data.loader import open_tokens                          # imports torch
    names = ["fineweb_val_000000.bin"]
    names += [f"fineweb_train_{i:06}.bin" for i in range(1, shards + 1)]
    progress = Progress("fineweb")
    tokens = []
    bytes_done = 0

    def show(have, size):                                        # assumes that later files are as large
        total = size and bytes_done + size * (len(names) - len(tokens))
        progress.show(bytes_done + have, total)
    for name in names:
        path = os.path.join(folder, name)
        progress.name = f"fineweb, file {len(tokens) + 1} of {len(names)}"
        try:
            count = len(open_tokens(path))
        except (FileNotFoundError, ValueError):                  # not downloaded yet, or damaged
            hub_download("datasets/kjj0/fineweb10B-gpt2", name, path, show)
            count = len(open_tokens(path))
        tokens.append(count)
        bytes_done += os.path.getsize(path)
    report(folder, {"train": sum(tokens[1:]), "val": tokens[0]}, GPT2Tokenizer(),
           f" in {shards} shards")


DATASETS = {f.__name__: f for f in (stdlib, shakespeare_char, shakespeare, fineweb)}


def own(folder, paths, tokenizer="gpt2", val_frac=0.1, field="text"):
    """Any files and folders. Each file is a document, and so is each line of a .jsonl file (the text
    in its `field`)."""
    files = find_files(paths)
    binary = [path for path in files if is_binary(path)]
    if binary:
        print(f"{len(binary)} files that are not text are left out, the first: {binary[0]}")

    def read(path, f):
        if path.removesuffix(".gz").endswith(".jsonl"):
            yield from json_lines(path, f, field)
        else:
            yield Document(path, read_pieces(f))
    texts = [path for path in files if path not in set(binary)]
    write_tokens(folder, texts, read, tokenizer, val_frac)


def find_files(paths):
    """All files in `paths` and in the folders among them, without those whose name starts with a
    dot."""
    files = []
    for path in paths:
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path!r} is not a file, a folder or a data set "
                                    f"({', '.join(DATASETS)})")
        if not os.path.isdir(path):
            files.append(path)
            continue
        for where, folders, names in os.walk(path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            names = sorted(name for name in names if not name.startswith("."))
            files += [os.path.join(where, name) for name in names]
    return files


# --------------------------------------------------------------------------------------------------
# Reading text

PORTION = 1 << 18                                # characters that are read or encoded at a time
CUT = re.compile(r".*\S(?=[ \t\r\n])", re.DOTALL)


@dataclass
class Document:
    name: str                                    # decides the split
    pieces: object                               # its text, an iterable of pieces
    split: str | None = None                     # "train" or "val" if it is known


@dataclass
class Piece:
    """A part of a document's text."""
    document: Document
    first: bool                                  # whether it begins the document
    text: str
    position: int                                # bytes of all files read so far


@contextlib.contextmanager
def open_text(path, mode="rt"):
    """Open a file that may be a .gz. UserError if it turns out to be damaged, or not UTF-8."""
    opener = gzip.open if path.endswith(".gz") else open
    options = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        with opener(path, mode, **options) as f:
            yield f
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}): repair it, convert it to UTF-8, or leave "
                        "it out") from None


def is_binary(path):
    with contextlib.suppress(UserError), open_text(path, "rb") as f:
        return b"\0" in f.read(1 << 16)
    return False                                 # damaged: `read_all` reports it


def read_pieces(f):
    """A file's text in pieces of about PORTION characters. A piece ends before white space that
    follows something else: GPT-2's tokenizer cuts there anyway, so the tokens are the same."""
    rest = ""
    while more := f.read(PORTION):
        rest += more
        cut = CUT.match(rest)
        if cut:
            yield rest[:cut.end()]
            rest = rest[cut.end():]
    if rest:
        yield rest


def json_lines(path, f, field):
    for number, line in enumerate(f, 1):
        line = line.removeprefix("\ufeff")                       # a byte order mark
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            raise UserError(f"{path}, line {number}: no JSON object with a text {field!r}: fix the "
                            "line, or name the field with --field")
        yield Document(f"{path}:{number}", [replace_surrogates(record[field])])


def read_all(files, read):
    """The text of all files as Pieces. read(path, open file) -> Documents."""
    before = 0
    for path in files:
        with open_text(path) as f:
            source = getattr(f.buffer, "fileobj", f.buffer)      # the .gz itself, if it is one
            for document in read(path, f):
                first = True
                for text in document.pieces:
                    yield Piece(document, first, text, before + source.tell())
                    first = False
        before += os.path.getsize(path)


# --------------------------------------------------------------------------------------------------
# Writing tokens


def write_tokens(folder, files, read, tokenizer, val_frac=0.1):
    """Write a data set: the Documents of read(path, open file) for each file, as tokens.

    All text is read once before it is encoded, for the table of characters, for the split, and to
    report a bad line now and not after hours. The data set is written to folder.part, which is
    renamed when it is complete. tokenizer: "gpt2" or "char".
    """
    check_folder(folder)
    survey = Survey(files, read, os.path.basename(folder))
    if survey.characters == 0:
        raise UserError(f"{os.path.basename(folder)}: there is no text in the files given")
    if tokenizer == "char":
        tokenizer = survey.char_tokenizer()
    else:
        tokenizer = GPT2Tokenizer()
    splitter = survey.splitter(val_frac)
    part = folder.rstrip("/\\") + ".part"
    shutil.rmtree(part, ignore_errors=True)
    os.makedirs(part)
    tokens = {"train": 0, "val": 0}
    progress = Progress(os.path.basename(folder))
    progress.show(0, survey.bytes)

    def encode(batch):
        return encode_batch(batch, tokenizer), batch[-1][1].position
    with (open(os.path.join(part, "train.bin"), "wb") as train,
          open(os.path.join(part, "val.bin"), "wb") as val):
        outputs = {"train": train, "val": val}
        pieces = splitter.split(read_all(files, read))
        for encoded, position in map_in_threads(encode, in_batches(pieces)):
            for split, ids in encoded.items():
                if not tokens[split] and ids[0] == tokenizer.end_of_text:
                    ids = ids[1:]                                # none before the first document
                ids.astype("<u2").tofile(outputs[split])
                tokens[split] += len(ids)
            progress.show(position, survey.bytes)
    with open(os.path.join(part, "meta.json"), "w", encoding="utf-8") as f:
        json.dump({**tokenizer.to_json(), "tokens": tokens}, f)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
    report(folder, tokens, tokenizer)


def check_folder(folder):
    """UserError if writing the data set would remove a file that is not part of one."""
    if os.path.exists(folder):
        others = set(os.listdir(folder)) - {"train.bin", "val.bin", "meta.json"}
        if others:
            raise UserError(f"{folder} also holds {min(others)!r}, which would be lost: choose "
                            "another --name, or move it away")


class Survey:
    """What reading all text once tells."""

    def __init__(self, files, read, name):
        self.bytes = sum(map(os.path.getsize, files))
        self.characters = 0
        self.documents = 0
        self.seen = np.zeros(0x110000, dtype=bool)               # by code point
        self.sizes = {}                                          # of each document's text
        progress = Progress(f"check {name}")
        for piece in read_all(files, read):
            self.seen[code_points(piece.text)] = True
            self.characters += len(piece.text)
            if piece.document.split is None:
                self.documents += piece.first
                share = hash_share(piece.document)
                self.sizes[share] = self.sizes.get(share, 0) + len(piece.text)
            progress.show(piece.position, self.bytes)

    def char_tokenizer(self):
        characters = "".join(map(chr, np.flatnonzero(self.seen)))
        return CharTokenizer(characters, len(characters) if self.documents > 1 else None)

    def splitter(self, val_frac):
        """By a hash of each document's name, or, where that gives a fraction far from val_frac
        because the documents are few or unequal, the last part of the whole text."""
        hashed = sum(size for share, size in self.sizes.items() if share < val_frac)
        total = sum(self.sizes.values())
        if total == 0 or 0.25 <= hashed / total / val_frac <= 4 and 0 < hashed < total or val_frac == 1:
            return Splitter(val_frac)
        return Splitter(val_frac, cut=int(total * (1 - val_frac)))


def hash_share(document):
    """A number from 0 to 1 that depends on the document's name alone."""
    key = document.name.replace(os.sep, "/").encode("utf-8", "replace")
    return zlib.crc32(key) / 2**32


class Splitter:
    """Assigns text to "train" or "val"."""

    def __init__(self, val_frac, cut=None):
        """cut: the character at which validation begins; None goes by the hash of the names."""
        self.val_frac = val_frac
        self.cut = cut

    def split(self, pieces):
        """-> (split, Piece); the piece at the cut is divided."""
        at = 0
        for piece in pieces:
            if piece.document.split is not None:
                yield piece.document.split, piece
                continue
            if self.cut is None:
                yield "val" if hash_share(piece.document) < self.val_frac else "train", piece
                continue
            room = self.cut - at
            at += len(piece.text)
            if room >= len(piece.text):
                yield "train", piece
            elif room <= 0:
                yield "val", piece
            else:
                document = piece.document
                yield "train", Piece(document, piece.first, piece.text[:room], piece.position)
                yield "val", Piece(document, False, piece.text[room:], piece.position)


def in_batches(pieces):
    """Lists of (split, Piece) with about PORTION characters."""
    batch = []
    size = 0
    for split, piece in pieces:
        batch.append((split, piece))
        size += len(piece.text)
        if size >= PORTION:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


def encode_batch(batch, tokenizer):
    """-> {split: ids}. The end-of-text token stands before each document."""
    ids = {}
    for split, piece in batch:
        if piece.first and tokenizer.end_of_text is not None:
            ids.setdefault(split, []).append(np.array([tokenizer.end_of_text], dtype=np.uint16))
        if piece.text:
            ids.setdefault(split, []).append(tokenizer.encode(piece.text))
    return {split: np.concatenate(arrays) for split, arrays in ids.items()}


def map_in_threads(work, items):
    """Yield work(item) in the order of the items, computed by one thread per core. At most two items
    per core are read ahead, so that memory is bounded."""
    cores = os.cpu_count() or 1
    pending = deque()
    with ThreadPoolExecutor(cores) as pool:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > 2 * cores:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def report(folder, tokens, tokenizer, where=""):
    print(f"{folder}: {tokens['train']:,} tokens to train on{where}, {tokens['val']:,} to validate, "
          f"vocabulary {tokenizer.vocab_size} ({tokenizer.name})")


# --------------------------------------------------------------------------------------------------
# Command line


@dataclass
class Options:
    name: str = flag(None, "name for your own data: train.py --dataset=NAME")
    tokenizer: str = flag(None, "for your own data: gpt2 or char [gpt2]", choices=("gpt2", "char"))
    val_frac: float = flag(None, "fraction of your own data kept for validation, 1 = all [0.1]",
                           above=0, at_most=1)
    field: str = flag(None, "field with the text in the lines of your .jsonl files [text]")
    source: str = flag(None, "file that was downloaded before, for stdlib and shakespeare")
    shards: int = flag(None, "shards of fineweb, 1 to 103 [103]", at_least=1, at_most=103)


def main():
    run_main(prepare, "Prepare less text at a time")


def prepare():
    typed, what = parse_flags(__doc__, {f.name: f for f in fields(Options)},
                              "the name of a data set, or files and folders of your own")
    if not what:
        raise UsageError(f"say what to prepare: {', '.join(DATASETS)}, or files and folders of your "
                         "own")
    if len(what) == 1 and what[0] in DATASETS:
        prepare_named(what[0], typed)
    else:
        prepare_own(what, typed)


def prepare_named(name, typed):
    used = "shards" if name == "fineweb" else "source"
    for other in sorted(typed.keys() - {used}):
        raise UsageError(f"--{other} has no effect on {name}")
    if "source" in typed and not os.path.exists(typed["source"]):
        raise UsageError(f"--source={typed['source']} was not found")
    DATASETS[name](os.path.join(DATA, name), **typed)


def prepare_own(paths, typed):
    for other in sorted(typed.keys() & {"source", "shards"}):
        raise UsageError(f"--{other} has no effect on your own files")
    named = [path for path in paths if path in DATASETS]
    if named:
        raise UsageError(f"{named[0]} is a data set of its own: prepare it alone")
    missing = [path for path in paths if not os.path.exists(path)]
    if "name" not in typed and missing:
        near = difflib.get_close_matches(missing[0], DATASETS, 1)
        hint = f": did you mean {near[0]}?" if near else ""
        raise UsageError(f"{missing[0]!r} is not a data set ({', '.join(DATASETS)}), a file or a "
                         f"folder{hint}")
    if "name" not in typed:
        raise UsageError("give your data a name: --name=NAME")
    if typed["name"] in DATASETS:
        raise UsageError(f"--name={typed['name']} is the name of a data set: choose another")
    own(os.path.join(DATA, typed.pop("name")), paths, **typed)


if __name__ == "__main__":
    main()
