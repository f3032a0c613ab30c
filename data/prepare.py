"""
Text to tokens. Each data set is a short function below; add one to DATASETS and
train.py knows its name too.

    python data/prepare.py stdlib               # Python's source, characters
    python data/prepare.py shakespeare_char     # nanoGPT's text, by characters
    python data/prepare.py shakespeare          # the same in GPT-2's tokens
    python data/prepare.py tinystories          # stories in a child's words
    python data/prepare.py fineweb --shards=9   # 100 million tokens each
    python data/prepare.py fineweb_edu          # its more instructive pages
    python data/prepare.py hellaswag            # to compare models: endings
    python data/prepare.py lambada              # to compare models: last words
    python data/prepare.py PATH... --name=mine  # text, .jsonl, .gz of either

Writes data/NAME/ with train.bin and val.bin (the tokens, raw uint16, as in
nanoGPT) and meta.json (the tokenizer). FineWeb's shards keep llm.c's format.
"""
import codecs
import contextlib
import gzip
import inspect
import itertools
import json
import math
import os
import re
import shutil
import sys
import sysconfig
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np

if not __package__:                              # run as a script: the folder above holds `data`
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from data import DATA
from data.cli import (
    Progress,
    UsageError,
    UserError,
    flag,
    lock,
    parse_flags,
    refuse,
    run_main,
)
from data.download import download, hub_download
from data.tokenizer import CharTokenizer, GPT2Tokenizer, code_points, replace_surrogates

# --------------------------------------------------------------------------------------------------
# The data sets: each function writes one folder


def stdlib(folder, source=None):
    """The running Python's standard library: no download, and a model of it writes Python."""
    root = source or sysconfig.get_paths()["stdlib"]
    skipped = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test",
               "encodings", "pydoc_data"}
    # ASCII files only, so that there are about 100 different characters.
    paths = [path for path in walk(root, skipped)
             if path.endswith(".py") and Path(path).read_bytes().isascii()]
    write_tokens(folder, paths, partial(read_source, root), "char")


def read_source(root, path, f):
    yield os.path.relpath(path, root), None, read_pieces(f)


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


def shakespeare_char(folder, source=None, tokenizer="char"):
    path = source or f"{DATA}/downloads/tinyshakespeare.txt"
    if not os.path.exists(path):
        download("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
                 "input.txt", path,
                 sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")

    def read(path, f):
        text = f.read()
        cut = int(len(text) * 0.9)                               # nanoGPT's split
        yield "train", "train", [text[:cut]]
        yield "val", "val", [text[cut:]]
    write_tokens(folder, [os.fspath(path)], read, tokenizer)


def shakespeare(folder, source=None):
    shakespeare_char(folder, source, tokenizer="gpt2")


def tinystories(folder, source=None):
    """Short stories in words that small children know, by GPT-4 (R. Eldan, Y. Li, 2023:
    arXiv:2305.07759): a small model learns to write whole ones."""
    names = ["TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt"]
    paths = [f"{source or f'{DATA}/downloads'}/{name}" for name in names]
    for name, path in zip(names, paths, strict=True):
        if not source and not os.path.exists(path):
            hub_download("datasets/roneneldan/TinyStories", name, path)
    write_tokens(folder, paths, read_stories, "gpt2")


def read_stories(path, f):
    split = "train"
    if path.endswith("-valid.txt"):
        split = "val"
    for end, lines in itertools.groupby(f, lambda line: line.strip() == "<|endoftext|>"):
        story = "".join(lines).strip()
        if story and not end:
            yield path, split, [story]


def fineweb(folder, shards=103):
    """The 10 billion tokens of llm.c's GPT-2 124M: the first `shards`, and one to validate on."""
    token_shards(folder, "kjj0/fineweb10B-gpt2", "fineweb", shards, 103)


def fineweb_edu(folder, shards=100):
    """FineWeb's more instructive pages: the first `shards` of the 1,001 of llm.c's GPT-2 1.5B."""
    token_shards(folder, "karpathy/fineweb-edu-100B-gpt2-token-shards", "edu_fineweb", shards, 1001)


def token_shards(folder, repo, name, shards, most):
    """Download shards of llm.c's format, 100 million tokens each."""
    from data.loader import open_tokens  # imports torch
    if shards > most:
        raise UsageError(f"--shards={shards}: there are {most}")
    files = [f"{name}_val_000000.bin"]
    files += [f"{name}_train_{i:06}.bin" for i in range(1, shards + 1)]
    counts = []
    for number, file in enumerate(files, 1):
        path = f"{folder}/{file}"
        progress = Progress(f"{os.path.basename(folder)}, file {number} of {len(files)}")
        try:
            open_tokens(path)
        except (FileNotFoundError, ValueError):                  # not downloaded yet, or damaged
            hub_download(f"datasets/{repo}", file, path, progress.show)
        counts.append(len(open_tokens(path)))
    report(folder, {"train": sum(counts[1:]), "val": counts[0]}, GPT2Tokenizer(),
           f" in {shards} shards")


def hellaswag(folder, source=None):
    """Which of four endings is the right one (R. Zellers and others, 2019: arXiv:1905.07830), with
    the text as in lm-evaluation-harness."""
    path = source or f"{DATA}/downloads/hellaswag_val.jsonl"
    if not os.path.exists(path):
        download("https://raw.githubusercontent.com/rowanz/hellaswag/master/data/"
                 "hellaswag_val.jsonl", path,
                 sha256="0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588")

    def clean(text):
        without = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return without.replace("  ", " ")

    def item(record):
        text = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
        return clean(text), list(map(clean, record["endings"])), int(record["label"])
    write_items(folder, path, item)


def lambada(folder, source=None):
    """The last word of a passage (D. Paperno and others, 2016: arXiv:1606.06031), in OpenAI's
    version, with the text as in lm-evaluation-harness's lambada_openai."""
    path = source or f"{DATA}/downloads/lambada_test_en.jsonl"
    if not os.path.exists(path):
        hub_download("datasets/EleutherAI/lambada_openai", "data/lambada_test_en.jsonl", path)

    def item(record):
        text, _, word = record["text"].rpartition(" ")
        return text, [word], 0
    write_items(folder, path, item)


DATASETS = {f.__name__: f for f in (stdlib, shakespeare_char, shakespeare, tinystories, fineweb,
                                    fineweb_edu, hellaswag, lambada)}
LARGE = ("tinystories", "fineweb", "fineweb_edu")        # train.py does not prepare these by itself


def own(folder, paths, tokenizer="gpt2", val_frac=0.1, field="text", pairs=None, skip_bad=False):
    """Any files and folders. Each file is a document, and so is each line of a .jsonl file: the
    text in its `field`, or those in the two fields `pairs`, of which only the second counts in the
    loss. skip_bad: leave out files that cannot be read."""
    files = []
    for path in paths:
        if not os.path.isfile(path) and not os.path.isdir(path):
            raise FileNotFoundError(f"{path!r} is not a file, a folder or a data set "
                                    f"({', '.join(DATASETS)})")
        files += walk(path) if os.path.isdir(path) else [path]
    others = [path for path in files if not is_json_lines(path)]
    if field != "text" and others == files:
        raise UsageError(f"--field={field} has no effect: there is no .jsonl file")
    if pairs and others:
        raise UsageError(f"--pairs reads .jsonl files, which {others[0]} is not: leave it out")
    names = [field]
    advice = "name the field with --field"
    if pairs:
        names = pairs.split(",")
        advice = "name both fields with --pairs=PROMPT,COMPLETION"
        if len(names) != 2:
            raise UsageError(f"--pairs={pairs} must be two names: --pairs=PROMPT,COMPLETION")
    texts = [path for path in files if not is_binary(path)]
    left_out = [path for path in files if path not in set(texts)]
    if left_out:
        print(f"{len(left_out)} files that are not text are left out, the first: {left_out[0]}")

    def read(path, f):
        if is_json_lines(path):
            yield from json_lines(path, f, names, advice)
        else:
            yield path, None, read_pieces(f)
    if skip_bad:
        texts = [path for path in texts if is_good(path, read)]
    write_tokens(folder, texts, read, tokenizer, val_frac, masked=bool(pairs))


# --------------------------------------------------------------------------------------------------
# Reading text

PORTION = 1 << 18                                # characters that are read or encoded at a time
CUT = re.compile(r".*\S(?=[ \t\r\n])", re.DOTALL)


@dataclass
class Piece:
    """A part of a document's text."""
    document: str                                # its name, which may decide the split
    split: str | None                            # "train" or "val", None if it is not known yet
    first: bool                                  # whether it begins the document
    text: str
    position: int                                # bytes of all files read so far


@contextlib.contextmanager
def open_text(path):
    """Open a file that may be a .gz. UserError if it turns out to be damaged, or not UTF-8."""
    opener = gzip.open if path.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as f:
            yield f
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}): convert it to UTF-8, or leave it "
                        "out (data/prepare.py --skip_bad leaves out all such files)") from None


def is_binary(path):
    with contextlib.suppress(UserError, OSError), open_text(path) as f:
        start = f.buffer.read(1 << 16)
        utf16 = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return b"\0" in start and not utf16
    return False                                 # damaged: `read_all` reports it


def is_good(path, read):
    """Whether all of a file can be read; if not, say why."""
    try:
        for _ in read_all([path], read):
            pass
    except (UserError, OSError) as error:
        print("left out:", error if path in str(error) else f"{path}: {error}")
        return False
    return True


def read_pieces(f):
    """A file's text in pieces of about PORTION characters. A piece ends before white space that
    follows something else: GPT-2's tokenizer cuts there anyway, so the tokens are the same."""
    parts = []
    while more := f.read(PORTION):
        cut = CUT.match(more)
        if cut:
            yield "".join([*parts, cut[0]])
            parts = [more[cut.end():]]
        else:
            parts.append(more)
    if any(parts):
        yield "".join(parts)


def is_json_lines(path):
    return path.removesuffix(".gz").endswith(".jsonl")


def json_records(path, f):
    """Yield (line number, value) of a .jsonl file, with None for a line that is no JSON."""
    for number, line in enumerate(f, 1):
        line = line.removeprefix("\ufeff")                       # a byte order mark
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError):
            yield number, None


def json_lines(path, f, names, advice):
    for number, record in json_records(path, f):
        for name in names:
            if not isinstance(record, dict) or not isinstance(record.get(name), str):
                raise UserError(f"{path}, line {number}: no JSON object with a text {name!r}: fix "
                                f"the line, or {advice}")
        yield f"{path}:{number}", None, [replace_surrogates(record[name]) for name in names]


def read_all(files, read):
    """Yield the text of all files as Pieces. read(path, open file) yields for each document its
    name, its split or None, and its text in pieces."""
    before = 0
    for path in files:
        with open_text(path) as f:
            source = getattr(f.buffer, "fileobj", f.buffer)      # the .gz itself, if it is one
            for name, split, pieces in read(path, f):
                for i, text in enumerate(pieces):
                    yield Piece(name, split, i == 0, text, before + source.tell())
        before += os.path.getsize(path)


# --------------------------------------------------------------------------------------------------
# Writing tokens


def write_tokens(folder, files, read, tokenizer, val_frac=0.1, masked=False):
    """Write a data set from files. tokenizer: "gpt2" or "char".

    read(path, open file) yields for each document its name, its split ("train", "val" or None) and
    its text, an iterable of pieces. It is called twice, and must give the same text each time.
    masked: a document's first piece is a prompt, which is not to be predicted; so says a file
    train.mask beside train.bin, a byte for each token.

    All text is read once before it is encoded, for the table of characters and for the split, and
    to report a bad line now and not after hours.
    """
    check_folder(folder)
    if tokenizer == "gpt2":
        GPT2Tokenizer().encode("")               # fails now if its files cannot be downloaded
    name = os.path.basename(folder)
    total = sum(map(os.path.getsize, files))
    seen, sizes = survey(read_all(files, read), Progress(f"check {name}"), total, tokenizer)
    if not seen.any():
        raise UserError(f"{name}: there is no text in the files given")
    if tokenizer == "char":
        characters = "".join(map(chr, np.flatnonzero(seen)))
        tokenizer = CharTokenizer(characters, len(characters) if len(sizes) > 1 else None)
    else:
        tokenizer = GPT2Tokenizer()
    pieces = assign_splits(read_all(files, read), sizes, val_frac, whole=masked)
    tokens = {"train": 0, "val": 0}
    progress = Progress(name)
    with new_folder(folder) as part, contextlib.ExitStack() as files:
        outputs = {}
        for file in ("train.bin", "val.bin", *(("train.mask", "val.mask") if masked else ())):
            outputs[file] = files.enter_context(open(f"{part}/{file}", "wb"))
        for encoded, position in encode_in_threads(pieces, tokenizer):
            for split, (ids, counted) in encoded.items():
                if not tokens[split]:                            # no end of text before any text
                    begun = np.cumsum(ids != tokenizer.end_of_text) > 0
                    ids = ids[begun]
                    counted = counted[begun]
                outputs[f"{split}.bin"].write(ids.astype("<u2").data)
                if masked:
                    outputs[f"{split}.mask"].write(counted.data)
                tokens[split] += len(ids)
            progress.show(position, total)
        write_meta(part, tokens, tokenizer)
    report(folder, tokens, tokenizer)


def write_meta(folder, tokens, tokenizer):
    Path(folder, "meta.json").write_text(json.dumps({**tokenizer.to_json(), "tokens": tokens}))


FILES = {"train.bin", "val.bin", "train.mask", "val.mask", "items.json", "meta.json"}


@contextlib.contextmanager
def new_folder(folder):
    """Yield folder.part, to write to. At the end it replaces `folder`; after an error it is
    removed."""
    folder = os.path.realpath(folder)            # a link may lead to another disk
    part = folder + ".part"
    os.makedirs(part, exist_ok=True)
    with lock(f"{part}/.lock"):
        try:
            yield part
        except BaseException as error:
            shutil.rmtree(part, ignore_errors=True)
            if isinstance(error, OSError) and not error.filename:        # of a write, not of `open`
                raise UserError(f"{part} cannot be written: {error}") from None
            raise
        shutil.rmtree(folder, ignore_errors=True)
    os.remove(f"{part}/.lock")                                   # after closing it: Windows
    os.replace(part, folder)


def check_folder(folder):
    """UserError if writing the data set would remove a file that is not part of one."""
    if os.path.exists(folder):
        others = set(os.listdir(folder)) - FILES
        if others:
            raise UserError(f"{folder} also holds {min(others)!r}, which would be lost: choose "
                            "another --name, or move it away")


def survey(pieces, progress, total, tokenizer):
    """-> (which code points occur, {a hash of the name: characters} of the documents to split). For
    GPT-2's tokenizer, which needs no table, only the first text's code points are noted."""
    seen = np.zeros(0x110000, dtype=bool)
    sizes = Counter()
    found = False
    for piece in pieces:
        if piece.text and (tokenizer == "char" or not found):
            seen[code_points(piece.text)] = True
            found = True
        if piece.split is None:
            sizes[name_hash(piece.document)] += len(piece.text)
        progress.show(piece.position, total)
    return seen, sizes


def name_hash(name):
    """A number from 0 to 1 that depends on the name alone."""
    return zlib.crc32(name.replace(os.sep, "/").encode("utf-8", "replace")) / 2**32


def assign_splits(pieces, sizes, val_frac, whole):
    """Yield the pieces, each with its split. A hash of the document's name decides. If that would
    miss val_frac by far, because the documents are few or unequal, the last part of the text is for
    validation instead. whole: keep documents whole, and val_frac of their number to validate."""
    limit = val_frac
    total = sum(sizes.values())
    hashed = sum(size for share, size in sizes.items() if share < val_frac)
    few = not 0.25 * val_frac * total <= hashed <= 4 * val_frac * total
    if whole and val_frac < 1:
        kept = math.ceil(len(sizes) * val_frac)
        if kept == len(sizes):
            raise UserError(f"--val_frac={val_frac} of {kept} pairs leaves none to train on: add "
                            "pairs")
        limit = sorted(sizes)[kept]
    elif total and val_frac < 1 and (few or hashed == total):
        yield from split_at(pieces, int(total * (1 - val_frac)))
        return
    for piece in pieces:
        if piece.split is None:
            piece.split = "val" if name_hash(piece.document) < limit else "train"
        yield piece


def split_at(pieces, cut):
    """Yield the first `cut` characters for training, the others for validation."""
    for piece in pieces:
        before = piece.text[:cut]
        after = piece.text[cut:]
        cut -= len(before)
        if before or not after:
            yield replace(piece, split="train", text=before)
        if after:
            yield replace(piece, split="val", text=after, first=piece.first and not before)


def encode_in_threads(pieces, tokenizer):
    """Yield ({split: (ids, counted)}, position) for about PORTION characters at a time, in order,
    encoded by one thread per core. At most two portions per core are read ahead, so that memory is
    bounded."""
    cores = os.cpu_count() or 1
    pending = deque()
    portion = []
    size = 0
    with ThreadPoolExecutor(cores) as pool:
        for piece in pieces:
            portion.append(piece)
            size += len(piece.text)
            if size >= PORTION:
                pending.append(pool.submit(encode, portion, tokenizer))
                portion = []
                size = 0
            if len(pending) > 2 * cores:
                yield pending.popleft().result()
        for future in pending:
            yield future.result()
    if portion:
        yield encode(portion, tokenizer)


def encode(pieces, tokenizer):
    """-> ({split: (ids, counted)}, position after them). The end-of-text token stands before each
    document. counted: 0 for the tokens of a document's first piece, else 1, uint8."""
    encoded = {}
    for piece in pieces:
        ids, counted = encoded.setdefault(piece.split, ([], []))
        if piece.first and tokenizer.end_of_text is not None:
            ids.append(np.array([tokenizer.end_of_text], dtype=np.uint16))
            counted.append(np.ones(1, dtype=np.uint8))
        ids.append(tokenizer.encode(piece.text))
        counted.append(np.full(len(ids[-1]), not piece.first, dtype=np.uint8))
    joined = {split: tuple(map(np.concatenate, lists)) for split, lists in encoded.items()}
    return joined, pieces[-1].position


def report(folder, tokens, tokenizer, where=""):
    print(f"{folder}: {tokens['train']:,} tokens to train on{where}, {tokens['val']:,} to "
          f"validate, vocabulary {tokenizer.vocab_size} ({tokenizer.name})")


def write_items(folder, path, item):
    """Write a data set of items to compare models with. item(an object of the .jsonl file) gives a
    text, its endings, and the number of the right one.

    val.bin holds each text followed by each ending, and items.json, for each item, the number of
    the right ending and of all endings [begin, first, end, characters]: val.bin[begin:end] is the
    text and the ending, which begins at `first`. train.bin is empty.
    """
    check_folder(folder)
    tokenizer = GPT2Tokenizer()
    items = []
    rows = [np.empty(0, dtype=np.uint16)]
    begin = 0
    with open_text(path) as f:
        for number, record in json_records(path, f):
            try:
                text, endings, label = item(record)
                uneven = items and len(endings) != len(items[0]["endings"])
                if not text.strip() or label not in range(len(endings)) or uneven:
                    raise ValueError
            except (LookupError, TypeError, ValueError, AttributeError):
                raise UserError(f"{path}, line {number}: not an item of "
                                f"{os.path.basename(folder)}") from None
            places = []
            # White space at the text's end belongs to the token that follows.
            before = tokenizer.encode(text.rstrip())
            for ending in endings:
                rows.append(tokenizer.encode(f"{text} {ending}"))
                end = begin + len(rows[-1])
                places.append((begin, begin + len(before), end, len(ending)))
                begin = end
            items.append({"label": label, "endings": places})
    if not items:
        raise UserError(f"{path} holds no items")
    tokens = {"train": 0, "val": begin}
    with new_folder(folder) as part:
        for split, ids in (("train", rows[:1]), ("val", rows)):
            Path(part, f"{split}.bin").write_bytes(np.concatenate(ids).astype("<u2").data)
        Path(part, "items.json").write_text(json.dumps(items))
        write_meta(part, tokens, tokenizer)
    print(f"{folder}: {len(items):,} items, {begin:,} tokens")


# --------------------------------------------------------------------------------------------------
# Command line


@dataclass
class Options:
    name: str = flag(None, "name for your own data: train.py --dataset=NAME")
    tokenizer: str = flag(None, "for your own data: gpt2 or char [gpt2]", choices=("gpt2", "char"))
    val_frac: float = flag(None, "fraction of your own data kept for validation, 1 = all [0.1]",
                           above=0, at_most=1)
    field: str = flag(None, "field with the text in the lines of your .jsonl files [text]")
    pairs: str = flag(None, "your .jsonl files hold pairs: the fields of prompt and completion, "
                      "which alone counts in the loss [prompt,completion]",
                      if_bare="prompt,completion")
    skip_bad: bool = flag(None, "leave out files of yours that cannot be read, and list them")
    source: str = flag(None, "file of shakespeare, hellaswag or lambada, folder of stdlib or "
                       "tinystories, in place of a download")
    shards: int = flag(None, "shards of fineweb, up to 103 [103], or fineweb_edu, up to 1,001 "
                       "[100]", at_least=1)


def main():
    run_main(prepare, "Prepare less text at a time")


def prepare():
    typed, what = parse_flags(__doc__, {f.name: f for f in fields(Options)},
                              "the name of a data set, or files and folders of your own")
    if not what:
        raise UsageError(f"say what to prepare: {', '.join(DATASETS)}, or files and folders of "
                         "your own")
    if len(what) == 1 and what[0] in DATASETS:
        prepare_named(what[0], typed)
    else:
        prepare_own(what, typed)


def prepare_named(name, typed):
    accepted = inspect.signature(DATASETS[name]).parameters.keys() & {"source", "shards"}
    refuse(typed, typed.keys() - accepted, f"has no effect on {name}")
    if "source" in typed and not os.path.exists(typed["source"]):
        raise UsageError(f"--source={typed['source']} was not found")
    DATASETS[name](f"{DATA}/{name}", **typed)


def prepare_own(paths, typed):
    refuse(typed, ("source", "shards"), "has no effect on your own files")
    if "pairs" in typed:
        refuse(typed, ["field"], "has no effect with --pairs, which names two")
    named = [path for path in paths if path in DATASETS]
    if named:
        raise UsageError(f"{named[0]} is a data set of its own: prepare it alone")
    missing = [path for path in paths if not os.path.exists(path)]
    if "name" not in typed and missing:
        if missing[0] == "openwebtext":
            raise UsageError("openwebtext is not on the hub as plain files: use fineweb_edu or "
                             "fineweb in its place. Tokens made by nanoGPT work: put its train.bin "
                             "and val.bin in data/openwebtext")
        raise UsageError(f"{missing[0]!r} is not a data set ({', '.join(DATASETS)}), a file or a "
                         "folder")
    if "name" not in typed:
        raise UsageError("give your data a name: --name=NAME")
    if typed["name"] in DATASETS:
        raise UsageError(f"--name={typed['name']} is the name of a data set: choose another")
    own(os.path.join(DATA, typed.pop("name")), paths, **typed)


if __name__ == "__main__":
    main()
