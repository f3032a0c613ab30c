"""
Text to tokens. Each data set is a short function below; add one to DATASETS and
train.py knows its name too.

    python data/prepare.py stdlib               # Python's source, characters
    python data/prepare.py shakespeare_char     # nanoGPT's text, by characters
    python data/prepare.py shakespeare          # the same in GPT-2's tokens
    python data/prepare.py tinystories          # stories in a child's words
    python data/prepare.py fineweb --shards=9   # 100 million tokens each
    python data/prepare.py fineweb_edu          # its more instructive pages
    python data/prepare.py PATH... --name=mine  # text and .jsonl files, folders

Writes data/NAME/ with train.bin and val.bin (the tokens, raw uint16, as in
nanoGPT) and meta.json (the tokenizer). FineWeb's shards keep llm.c's format.
"""
import contextlib
import dataclasses
import glob
import inspect
import itertools
import json
import os
import re
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

if not __package__:                              # run as a script: the folder above holds `data`
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from data import DATA
from data.flags import flag_parser, one_line, progress
from data.hub import download, hub_download
from data.loader import open_tokens
from data.tokenizer import CharTokenizer, GPT2Tokenizer, code_points, replace_surrogates

# --------------------------------------------------------------------------------------------------
# The data sets: each function writes one folder. It gives write_tokens the files, and a function
# that reads one of them as Pieces.


class Piece(NamedTuple):
    """A part of a document's text."""
    text: str
    begins: bool = True                          # whether the document begins with it
    split: str | None = None                     # "train" or "val"; None: by the number
    predicted: bool = True                       # False: a prompt, which the loss leaves out


def stdlib(folder, source=None):
    """The running Python's standard library: no download, and a model of it writes Python."""
    root = source or sysconfig.get_paths()["stdlib"]
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings",
               "pydoc_data"}
    # ASCII files only, so that there are about 100 different characters.
    paths = [path for path in files_in(root) if path.endswith(".py")
             and skipped.isdisjoint(Path(path).relative_to(root).parts)
             and Path(path).read_bytes().isascii()]
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
    text = "".join(piece.text for piece in read_text(path))
    cut = int(len(text) * 0.9)                                   # nanoGPT's split
    yield Piece(text[:cut], split="train")
    yield Piece(text[cut:], split="val")


def tinystories(folder, source=None):
    """Short stories in words that small children know, by GPT-4 (R. Eldan, Y. Li, 2023:
    arXiv:2305.07759): a small model learns to write whole ones."""
    paths = []
    for name in ("TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt"):
        paths.append(f"{source or f'{DATA}/downloads'}/{name}")
        if not os.path.exists(paths[-1]):
            hub_download("datasets/roneneldan/TinyStories", name, paths[-1])
    write_tokens(folder, paths, read_stories, "gpt2")


def read_stories(path):
    split = "val" if path.endswith("-valid.txt") else "train"
    lines = []
    with open_text(path) as f:
        for line in itertools.chain(f, ["<|endoftext|>"]):
            if line.strip() != "<|endoftext|>":
                lines.append(line)
            elif lines:
                yield Piece("".join(lines).strip(), split=split)
                lines = []


def fineweb(folder, shards=103):
    """The 10 billion tokens of llm.c's GPT-2 124M: the first `shards`, and one to validate on."""
    token_shards(folder, "kjj0/fineweb10B-gpt2", "fineweb", shards, 103)


def fineweb_edu(folder, shards=100):
    """FineWeb's more instructive pages: the first `shards` of the 1,001 of llm.c's GPT-2 1.5B."""
    token_shards(folder, "karpathy/fineweb-edu-100B-gpt2-token-shards", "edu_fineweb", shards, 1001)


def token_shards(folder, repo, name, shards, most):
    """Download shards of llm.c's format, 100 million tokens each."""
    if not 0 < shards <= most:
        sys.exit(f"--shards={shards} must be from 1 to {most}")
    tokens = {"train": 0, "val": 0}
    for number in range(shards + 1):
        split = "train" if number else "val"
        path = f"{folder}/{name}_{split}_{number:06}.bin"
        try:
            open_tokens(path)
        except (FileNotFoundError, ValueError):                  # not downloaded yet, or damaged
            hub_download(f"datasets/{repo}", os.path.basename(path), path)
        tokens[split] += len(open_tokens(path))
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
        files += files_in(path) if os.path.isdir(path) else [path]
    texts = [path for path in files if is_text(path)]
    left_out = [path for path in files if path not in texts]
    if left_out:
        print(f"{len(left_out)} files are not text and are left out: {', '.join(left_out[:3])}")
    if pairs and not all(path.endswith(".jsonl") for path in texts):
        sys.exit("--pairs reads .jsonl files: name no others")
    names = pairs.split(",") if pairs else [field]
    write_tokens(folder, texts, partial(read_own, names), tokenizer, val_frac, bool(pairs))


def read_own(names, path):
    """The documents of a file; of a .jsonl file those in these fields."""
    if not path.endswith(".jsonl"):
        yield from read_text(path)
        return
    with open_text(path) as f:
        for number, line in enumerate(f, 1):
            if not line.strip("\ufeff \r\n"):
                continue
            try:
                record = json.loads(line.removeprefix("\ufeff"))
                texts = [replace_surrogates(record[name]) for name in names]
            except (ValueError, LookupError, TypeError, AttributeError):
                sys.exit(f"{path}, line {number}: no JSON object with texts {', '.join(names)}. "
                         "Fix the line, or name the fields with --field or --pairs")
            for i, text in enumerate(texts):
                yield Piece(text, begins=i == 0, predicted=i == len(texts) - 1)


# --------------------------------------------------------------------------------------------------
# Reading files

PORTION = 1 << 18                                # characters that are read or encoded at a time
CUT = re.compile(r".*\S(?=[ \t\r\n])", re.DOTALL)


def files_in(root):
    """The paths of all files below `root`, in order, without hidden ones."""
    for path in sorted(Path(root).rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if path.is_file() and not hidden:                        # no FIFO, no device
            yield str(path)


def is_text(path):
    """Whether a file can be read to its end as text."""
    try:
        with open_text(path) as f:
            return not any("\0" in portion for portion in iter(partial(f.read, PORTION), ""))
    except UnicodeDecodeError:
        return False


def open_text(path):
    return open(path, encoding="utf-8-sig", newline="")


def read_text(path):
    """A file as one document, in pieces of about PORTION characters. A piece ends before white
    space that follows something else: GPT-2's tokenizer cuts there anyway."""
    begins = True
    rest = ""
    with open_text(path) as f:
        while more := f.read(PORTION):
            cut = CUT.match(more)
            if cut:
                yield Piece(rest + cut[0], begins)
                begins = False
                rest = ""
            rest += more[cut.end() if cut else 0:]
    if rest:
        yield Piece(rest, begins)


# --------------------------------------------------------------------------------------------------
# Writing tokens

FILES = {"train.bin", "val.bin", "train.mask", "val.mask", "meta.json"}


def write_tokens(folder, paths, read, tokenizer, val_frac=0.1, masked=False):
    """Write a data set. tokenizer: "gpt2" or "char". read(path) yields the Pieces of a file.

    masked: some pieces do not count in the loss. So says a file train.mask beside train.bin, with a
    byte for each token.
    """
    name = os.path.basename(folder)
    if tokenizer == "char":
        tokenizer = count_characters(itertools.chain.from_iterable(map(read, paths)))
    else:
        tokenizer = GPT2Tokenizer()
    pieces = progress(itertools.chain.from_iterable(map(read, paths)),
                      sum(map(os.path.getsize, paths)), name, lambda piece: len(piece.text))
    with new_folder(folder) as part:
        tokens = write_files(part, pieces, tokenizer, val_frac, masked)
        if not tokens["val"] and not masked:                     # few documents
            tokens["val"] = int(tokens["train"] * val_frac)
            tokens["train"] -= tokens["val"]
            with open(f"{part}/train.bin", "r+b") as train, open(f"{part}/val.bin", "wb") as val:
                train.seek(2 * tokens["train"])
                shutil.copyfileobj(train, val)
                train.truncate(2 * tokens["train"])
        if not tokens["val"] or not tokens["train"] and val_frac < 1:
            sys.exit(f"{name}: {tokens} tokens are too few to train and validate. Add text")
        meta = {**tokenizer.to_json(), "tokens": tokens}
        Path(part, "meta.json").write_text(json.dumps(meta))
    report(folder, tokens, tokenizer)


def count_characters(pieces):
    """The tokenizer of all characters in the text, with a token between documents."""
    seen = np.zeros(0x110000, dtype=bool)
    documents = 0
    for piece in pieces:
        documents += piece.begins and piece.split is None
        seen[code_points(piece.text)] = True
    characters = "".join(map(chr, np.flatnonzero(seen)))
    if not characters:
        sys.exit("there is no text in the files given")
    return CharTokenizer(characters, len(characters) if documents > 1 else None)


def write_files(folder, pieces, tokenizer, val_frac, masked):
    """Write train.bin and val.bin, and their masks. -> {split: tokens}"""
    tokens = {"train": 0, "val": 0}
    document = 0
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(f"{folder}/{name}", "wb"))
                 for name in sorted(FILES - {"meta.json"}) if masked or name.endswith(".bin")}
        for piece in pieces:
            if piece.begins:
                document += 1
                # With val_frac=0.1 every tenth document is for validation.
                is_val = int(document * val_frac) > int((document - 1) * val_frac)
            split = piece.split or ("val" if is_val else "train")
            ids = tokenizer.encode(piece.text)
            counted = np.full(len(ids), piece.predicted, dtype=np.uint8)
            if piece.begins and tokens[split] and tokenizer.end_of_text is not None:
                ids = np.append(np.uint16(tokenizer.end_of_text), ids)
                counted = np.append(np.uint8(1), counted)
            files[f"{split}.bin"].write(ids.astype("<u2").tobytes())
            if masked:
                files[f"{split}.mask"].write(counted.tobytes())
            tokens[split] += len(ids)
    return tokens


@contextlib.contextmanager
def new_folder(folder):
    """Yield a folder to write to. At the end it replaces `folder`, unless that holds other files
    than those of a data set; after an error it is removed."""
    folder = os.path.realpath(folder)            # a link may lead to another disk
    part = f"{folder}.{os.getpid()}.part"
    old = f"{folder}.{os.getpid()}.old.part"
    if os.path.exists(folder) and set(os.listdir(folder)) - FILES:
        sys.exit(f"{folder} also holds {min(set(os.listdir(folder)) - FILES)!r}, which would be "
                 "lost. Choose another --name, or move it away")
    os.makedirs(part)
    try:
        yield part
        if os.path.exists(folder):
            os.rename(folder, old)
        os.rename(part, folder)
    except OSError as error:
        raise OSError(f"{error.filename or part}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def report(folder, tokens, tokenizer):
    print(f"{folder}: {tokens['train']:,} tokens to train on, {tokens['val']:,} to validate, "
          f"vocabulary {tokenizer.vocab_size} ({tokenizer.name})")


# --------------------------------------------------------------------------------------------------
# Command line


@dataclass
class Options:
    name: str = None            # name for your own data: train.py --dataset=NAME
    tokenizer: str = "gpt2"     # for your own data: gpt2 or char
    val_frac: float = 0.1       # fraction of your own documents for validation, 1 = all
    field: str = "text"         # field with the text in the lines of your .jsonl files
    pairs: str = dataclasses.field(default=None, metadata={"bare": "prompt,completion"})
                                # your .jsonl files hold pairs: the fields of prompt and completion,
                                # which alone counts in the loss [prompt,completion]
    source: str = None          # file of shakespeare, folder of stdlib or tinystories, in place of
                                # a download
    shards: int = None          # shards of fineweb, up to 103 [103], or fineweb_edu, up to 1,001
                                # [100]


def main():
    parser = flag_parser(__doc__, Options)
    parser.add_argument("what", nargs="+", help="a data set, or files and folders of your own")
    options = vars(parser.parse_args())
    what = options.pop("what")
    name = options.pop("name", "")
    function = partial(own, paths=what)
    if what[0] in DATASETS and len(what) == 1:
        name = what[0]
        function = DATASETS[name]
    elif not all(map(os.path.exists, what)):
        parser.error(f"{what} must be files and folders, or one of {', '.join(DATASETS)}")
    elif name in ("", ".", "..", *DATASETS) or os.path.basename(name) != name:
        parser.error(f"--name={name} must be the name of a new folder, and not of a data set")
    useless = options.keys() - inspect.signature(function).parameters.keys()
    if useless:
        parser.error(f"--{min(useless)} has no effect on {name}: leave it out")
    if options.get("tokenizer", "gpt2") not in ("gpt2", "char"):
        parser.error(f"--tokenizer={options['tokenizer']} must be gpt2 or char")
    if options.get("pairs", ",").count(",") != 1:
        parser.error(f"--pairs={options['pairs']} must be two names: --pairs=PROMPT,COMPLETION")
    if options.get("val_frac", 1) > 1:
        parser.error(f"--val_frac={options['val_frac']} must be at most 1")
    with one_line(OSError):
        function(f"{DATA}/{name}", **options)


if __name__ == "__main__":
    main()
