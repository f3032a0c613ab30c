"""
Text to tokens. Each data set is a short function below; add one to DATASETS and
train.py knows its name too.

    python data/prepare.py stdlib               # Python's source, characters
    python data/prepare.py shakespeare_char     # nanoGPT's text, by characters
    python data/prepare.py shakespeare          # the same in GPT-2's tokens
    python data/prepare.py tinystories          # stories in a child's words
    python data/prepare.py fineweb --shards=9   # 100 million tokens each
    python data/prepare.py fineweb_edu          # its more instructive pages
    python data/prepare.py PATH... --name=mine  # text, .jsonl, .gz of either

Writes data/NAME/ with train.bin and val.bin (the tokens, raw uint16, as in
nanoGPT) and meta.json (the tokenizer). FineWeb's shards keep llm.c's format.
"""
import contextlib
import dataclasses
import glob
import gzip
import inspect
import itertools
import json
import os
import re
import shutil
import sys
import sysconfig
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

try:
    import fcntl
except ImportError:                              # Windows
    fcntl = None

import numpy as np

if not __package__:                              # run as a script: the folder above holds `data`
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from data import DATA
from data.flags import flag_parser, one_line, progress
from data.hub import download, hub_download
from data.tokenizer import CharTokenizer, GPT2Tokenizer, code_points, replace_surrogates

# --------------------------------------------------------------------------------------------------
# The data sets: each function writes one folder. `write_tokens` takes the files and a function that
# yields the documents of a file: (split, its text in pieces). The split is None where the number of
# the document decides.


def stdlib(folder, source=None):
    """The running Python's standard library: no download, and a model of it writes Python."""
    root = source or sysconfig.get_paths()["stdlib"]
    skipped = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test",
               "encodings", "pydoc_data"}
    # ASCII files only, so that there are about 100 different characters.
    paths = [path for path in walk(root, skipped)
             if path.endswith(".py") and Path(path).read_bytes().isascii()]
    write_tokens(folder, paths, read_text, "char")


def shakespeare_char(folder, source=None):
    write_tokens(folder, [source or tiny_shakespeare()], read_shakespeare, "char")


def shakespeare(folder, source=None):
    write_tokens(folder, [source or tiny_shakespeare()], read_shakespeare, "gpt2")


def tiny_shakespeare():
    path = f"{DATA}/downloads/tinyshakespeare.txt"
    if not os.path.exists(path):
        download("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
                 "input.txt", path,
                 sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")
    return path


def read_shakespeare(path):
    text = "".join(read_pieces(path))
    cut = int(len(text) * 0.9)                                   # nanoGPT's split
    yield "train", [text[:cut]]
    yield "val", [text[cut:]]


def tinystories(folder, source=None):
    """Short stories in words that small children know, by GPT-4 (R. Eldan, Y. Li, 2023:
    arXiv:2305.07759): a small model learns to write whole ones."""
    paths = []
    for name in ("TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt"):
        paths.append(f"{source or f'{DATA}/downloads'}/{name}")
        if not source and not os.path.exists(paths[-1]):
            hub_download("datasets/roneneldan/TinyStories", name, paths[-1])
    write_tokens(folder, paths, read_stories, "gpt2")


def read_stories(path):
    split = "train"
    if path.endswith("-valid.txt"):
        split = "val"
    with open_text(path) as f:
        for end, lines in itertools.groupby(f, is_end_of_text):
            story = "".join(lines).strip()
            if story and not end:
                yield split, [story]


def is_end_of_text(line):
    return line.strip() == "<|endoftext|>"


def fineweb(folder, shards=103):
    """The 10 billion tokens of llm.c's GPT-2 124M: the first `shards`, and one to validate on."""
    token_shards(folder, "kjj0/fineweb10B-gpt2", "fineweb", shards, 103)


def fineweb_edu(folder, shards=100):
    """FineWeb's more instructive pages: the first `shards` of the 1,001 of llm.c's GPT-2 1.5B."""
    token_shards(folder, "karpathy/fineweb-edu-100B-gpt2-token-shards", "edu_fineweb", shards, 1001)


def token_shards(folder, repo, name, shards, most):
    """Download shards of llm.c's format, 100 million tokens each."""
    from data.loader import open_tokens  # imports torch
    if not 0 < shards <= most:
        sys.exit(f"--shards={shards} must be from 1 to {most}")
    files = [f"{name}_val_000000.bin"]
    files += [f"{name}_train_{i:06}.bin" for i in range(1, shards + 1)]
    tokens = {"train": 0, "val": 0}
    for file in files:
        path = f"{folder}/{file}"
        try:
            open_tokens(path)
        except (FileNotFoundError, ValueError):                  # not downloaded yet, or damaged
            hub_download(f"datasets/{repo}", file, path)
        tokens["val" if "_val_" in file else "train"] += len(open_tokens(path))
    report(folder, tokens, GPT2Tokenizer())


DATASETS = {f.__name__: f for f in (stdlib, shakespeare_char, shakespeare, tinystories, fineweb,
                                    fineweb_edu)}
LARGE = ("tinystories", "fineweb", "fineweb_edu")        # train.py does not prepare these by itself


def prepare(name):
    """Prepare a data set, unless it is there."""
    folder = f"{DATA}/{name}"
    if not glob.glob(f"{glob.escape(folder)}/*.bin"):
        DATASETS[name](folder)


def own(folder, paths, tokenizer="gpt2", val_frac=0.1, field="text", pairs=None):
    """Any files and folders. Each file is a document, and so is each line of a .jsonl file: the
    text in its `field`, or in the two fields `pairs`, of which only the second counts in the loss.
    """
    files = []
    for path in paths:
        files += walk(path) if os.path.isdir(path) else [path]
    texts = [path for path in files if is_text(path)]
    left_out = sorted(set(files) - set(texts))
    if left_out:
        print(f"{len(left_out)} files are not text and are left out: {', '.join(left_out[:3])}")
    names = [field]
    if pairs:
        names = pairs.split(",")
        others = [path for path in texts if not is_json_lines(path)]
        if others:
            sys.exit(f"--pairs reads .jsonl files, which {others[0]} is not")
    write_tokens(folder, texts, partial(read_own, names), tokenizer, val_frac, bool(pairs))


def read_own(names, path):
    """The documents of a file; of a .jsonl file with these fields."""
    if not is_json_lines(path):
        yield None, read_pieces(path)
        return
    with open_text(path) as f:
        for number, line in enumerate(f, 1):
            line = line.removeprefix("\ufeff")                   # a byte order mark
            if line.strip():
                try:
                    record = json.loads(line)
                    texts = [replace_surrogates(record[name]) for name in names]
                except (ValueError, LookupError, TypeError, AttributeError):
                    sys.exit(f"{path}, line {number}: no JSON object with a text "
                             f"{' and a text '.join(names)}. Fix the line, or name other fields "
                             "with --field or --pairs")
                yield None, texts


# --------------------------------------------------------------------------------------------------
# Reading files

PORTION = 1 << 18                                # characters that are read or encoded at a time
CUT = re.compile(r".*\S(?=[ \t\r\n])", re.DOTALL)
UNREADABLE = (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error)


def walk(root, skipped=()):
    """The paths of all files below `root`, in order, without hidden ones and `skipped` folders.
    Links to folders are followed, each folder once."""
    visited = set()
    for where, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if name[0] != "." and name not in skipped)
        if os.path.realpath(where) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(where))
        for name in sorted(files):
            if name[0] != "." and os.path.isfile(f"{where}/{name}"):     # no FIFO, no device
                yield f"{where}/{name}"


def is_json_lines(path):
    return path.removesuffix(".gz").endswith(".jsonl")


def is_text(path):
    """Whether a file can be read to its end as text."""
    try:
        with open_text(path) as f:
            binary = "\0" in f.read(PORTION)
            while f.read(PORTION):
                pass
    except UNREADABLE:
        return False
    return not binary


def open_text(path):
    opener = gzip.open if path.endswith(".gz") else open
    return opener(path, "rt", encoding="utf-8-sig", newline="")


def read_text(path):
    """A file that is one document."""
    yield None, read_pieces(path)


def read_pieces(path):
    """A file's text in pieces of about PORTION characters. A piece ends before white space that
    follows something else: GPT-2's tokenizer cuts there anyway, so the tokens are the same."""
    parts = []
    with open_text(path) as f:
        while more := f.read(PORTION):
            cut = CUT.match(more)
            if cut:
                yield "".join([*parts, cut[0]])
                parts = []
                more = more[cut.end():]
            parts.append(more)
    if any(parts):
        yield "".join(parts)


# --------------------------------------------------------------------------------------------------
# Writing tokens


@dataclass
class Piece:
    """A part of a document's text, or the token between two documents."""
    split: str                                   # "train" or "val"
    predicted: bool                              # whether the model is to predict it
    text: str | None                             # None: the end-of-text token


def write_tokens(folder, paths, read, tokenizer, val_frac=0.1, masked=False):
    """Write a data set. tokenizer: "gpt2" or "char". read(path) yields the documents of a file.

    masked: a document's first piece is a prompt, which the model is not to predict. So says a file
    train.mask beside train.bin, with a byte for each token.
    """
    name = os.path.basename(folder)
    check_folder(folder)
    with new_folder(folder) as part:
        if tokenizer == "gpt2":
            tokenizer = GPT2Tokenizer()
            tokenizer.encode("")                 # fails now if its files cannot be downloaded
        else:
            tokenizer = count_characters(split_pieces(paths, read, val_frac))
        encoded = encode_in_threads(split_pieces(paths, read, val_frac), tokenizer)
        size = sum(map(os.path.getsize, paths))
        encoded = progress(encoded, 1 + size // PORTION, name)
        tokens, boundary = write_files(part, encoded, masked)
        if not tokens["val"] and tokens["train"]:                # few documents
            end = start = int(tokens["train"] * (1 - val_frac))
            if masked:                                           # no pair is cut
                end = boundary
                start = boundary + 1
            move_tail(part, end, start)
            tokens = {"train": end, "val": tokens["train"] - start}
        if not tokens["val"] or masked and not tokens["train"] and val_frac < 1:
            sys.exit(f"{name}: there is too little text in the files given: add some")
        meta = {**tokenizer.to_json(), "tokens": tokens}
        Path(part, "meta.json").write_text(json.dumps(meta))
    report(folder, tokens, tokenizer)


def split_pieces(paths, read, val_frac):
    """Yield the text of all documents as Pieces. With val_frac=0.1 every tenth document is for
    validation."""
    number = 0
    for path in paths:
        for split, texts in read(path):
            if split is None:
                split = "train"
                if int((number + 1) * val_frac) > int(number * val_frac):
                    split = "val"
                number += 1
            for i, text in enumerate(texts):
                if i == 0:
                    yield Piece(split, True, None)
                yield Piece(split, i > 0, text)


def count_characters(pieces):
    """The tokenizer of all characters in the text. It has a token between documents if one of the
    splits has several."""
    seen = np.zeros(0x110000, dtype=bool)
    documents = {"train": 0, "val": 0}
    for piece in pieces:
        documents[piece.split] += piece.text is None
        seen[code_points(piece.text or "")] = True
    characters = "".join(map(chr, np.flatnonzero(seen)))
    if not characters:
        sys.exit("there is no text in the files given")
    several = max(documents.values()) > 1
    return CharTokenizer(characters, len(characters) if several else None)


def encode_in_threads(pieces, tokenizer):
    """Yield [(piece, ids)] for about PORTION characters at a time, in order, encoded by a thread
    for each core. At most two portions for each core are read ahead, so memory is bounded."""
    cores = os.cpu_count() or 1
    pending = deque()
    with ThreadPoolExecutor(cores) as pool:
        for portion in portions(pieces):
            pending.append(pool.submit(encode, portion, tokenizer))
            if len(pending) > 2 * cores:
                yield pending.popleft().result()
        for future in pending:
            yield future.result()


def portions(pieces):
    portion = []
    size = 0
    for piece in pieces:
        portion.append(piece)
        size += len(piece.text or "")
        if size >= PORTION:
            yield portion
            portion = []
            size = 0
    yield portion


def encode(portion, tokenizer):
    between = np.array([i for i in [tokenizer.end_of_text] if i is not None], dtype=np.uint16)
    return [(piece, between if piece.text is None else tokenizer.encode(piece.text))
            for piece in portion]


def write_files(folder, encoded, masked):
    """Write train.bin and val.bin, and masks. -> ({split: tokens}, the last boundary between two
    documents in train.bin)"""
    tokens = {"train": 0, "val": 0}
    boundary = 0
    suffixes = ("bin", "mask") if masked else ("bin",)
    with contextlib.ExitStack() as stack:
        files = {}
        for split, suffix in itertools.product(tokens, suffixes):
            file = open(f"{folder}/{split}.{suffix}", "wb")
            files[split, suffix] = stack.enter_context(file)
        for piece, ids in itertools.chain.from_iterable(encoded):
            split = piece.split
            if piece.text is None and not tokens[split]:         # before the first document
                continue
            if piece.text is None and split == "train":
                boundary = tokens[split]
            files[split, "bin"].write(ids.astype("<u2").tobytes())
            if masked:
                files[split, "mask"].write(bytes([piece.predicted]) * len(ids))
            tokens[split] += len(ids)
    return tokens, boundary


def move_tail(folder, end, start):
    """Move the tokens from `start` of train.bin to val.bin, and their masks. train.bin ends at
    `end`."""
    for suffix, width in (("bin", 2), ("mask", 1)):
        path = f"{folder}/train.{suffix}"
        if os.path.exists(path):
            with open(path, "r+b") as train, open(f"{folder}/val.{suffix}", "wb") as val:
                train.seek(start * width)
                shutil.copyfileobj(train, val)
                train.truncate(end * width)


FILES = {"train.bin", "val.bin", "train.mask", "val.mask", "meta.json", ".lock"}


def check_folder(folder):
    """Refuse to replace a folder that holds other files than those of a data set."""
    if os.path.exists(folder):
        others = set(os.listdir(folder)) - FILES
        if others:
            sys.exit(f"{folder} also holds {min(others)!r}, which would be lost. Choose another "
                     "--name, or move it away")


@contextlib.contextmanager
def new_folder(folder):
    """Yield folder.part, to write to. At the end it replaces `folder`; after an error it is
    removed."""
    folder = os.path.realpath(folder)            # a link may lead to another disk
    part = f"{folder}.part"
    old = f"{folder}.{os.getpid()}.old"
    os.makedirs(part, exist_ok=True)
    with lock(f"{part}/.lock"):
        for name in FILES.intersection(os.listdir(part)) - {".lock"}:
            os.remove(f"{part}/{name}")          # of a preparation that was killed
        try:
            yield part
            if os.path.exists(folder):
                os.rename(folder, old)
            os.rename(part, folder)
        except OSError as error:
            if error.filename or isinstance(error, ConnectionError):
                raise
            raise OSError(f"{part} cannot be written: {error}") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.remove(f"{folder}/.lock")


@contextlib.contextmanager
def lock(path):
    """Keep other preparations out until this one ends, however it ends."""
    if fcntl is None:                            # Windows
        yield
        return
    with open(path, "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"another process prepares this data set: it holds {path}. Wait until it ends")
        yield


def report(folder, tokens, tokenizer):
    print(f"{folder}: {tokens['train']:,} tokens to train on, {tokens['val']:,} to validate, "
          f"vocabulary {tokenizer.vocab_size} ({tokenizer.name})")


# --------------------------------------------------------------------------------------------------
# Command line


@dataclass
class Options:
    name: str = None            # name for your own data: train.py --dataset=NAME
    tokenizer: str = dataclasses.field(default=None, metadata={"choices": ("gpt2", "char")})
                                # for your own data: gpt2 or char [gpt2]
    val_frac: float = None      # fraction of your own documents for validation, 1 = all [0.1]
    field: str = None           # field with the text in the lines of your .jsonl files [text]
    pairs: str = dataclasses.field(default=None, metadata={"bare": "prompt,completion"})
                                # your .jsonl files hold pairs: the fields of prompt and completion,
                                # which alone counts in the loss [prompt,completion]
    source: str = None          # file of shakespeare, folder of stdlib or tinystories, in place of
                                # a download
    shards: int = None          # shards of fineweb, up to 103 [103], or fineweb_edu, up to 1,001
                                # [100]


def main():
    parser = flag_parser(__doc__, Options)
    parser.add_argument("what", nargs="*", help="a data set, or files and folders of your own")
    options = vars(parser.parse_args())
    what = options.pop("what", [])
    if not what:
        parser.error(f"say what to prepare: {', '.join(DATASETS)}, or files and folders")
    function = own
    arguments = [what]
    if len(what) == 1 and what[0] in DATASETS:
        function = DATASETS[what[0]]
        arguments = []
        name = what[0]
    else:
        name = check_own(parser, what, options)
    useless = options.keys() - inspect.signature(function).parameters.keys()
    if useless:
        parser.error(f"--{min(useless)} has no effect on {what[0]}: leave it out")
    with one_line(OSError):
        function(f"{DATA}/{name}", *arguments, **options)


def check_own(parser, paths, options):
    """Refuse what makes other data than the user believes. -> the name, taken out of `options`."""
    name = options.pop("name", "")
    pairs = options.get("pairs")
    for path in paths:
        if not os.path.isfile(path) and not os.path.isdir(path):
            parser.error(f"{path!r} is no file, no folder and none of {', '.join(DATASETS)}, which "
                         "are prepared one at a time")
    if not name:
        parser.error("give your data a name: --name=NAME")
    if name in DATASETS or name in (".", "..") or name != os.path.basename(name):
        parser.error(f"--name={name} must be the name of a new folder, and not of a data set")
    if not 0 < options.get("val_frac", 0.1) <= 1:
        parser.error(f"--val_frac={options['val_frac']} must be above 0 and at most 1")
    if pairs and pairs.count(",") != 1:
        parser.error(f"--pairs={pairs} must be two names: --pairs=PROMPT,COMPLETION")
    return name


if __name__ == "__main__":
    main()
