"""
Text to tokens. Each data set is a short function below; add one and it has a
name here and in train.py --dataset=NAME.

    python data/prepare.py stdlib               # Python's source, characters
    python data/prepare.py shakespeare_char     # nanoGPT's text, by characters
    python data/prepare.py shakespeare          # the same in GPT-2's tokens
    python data/prepare.py fineweb --shards=9   # 100 million tokens each
    python data/prepare.py PATH... --name=mine  # text, .jsonl, .gz of either

Writes data/NAME/ with train.bin and val.bin (the tokens, raw uint16, as nanoGPT
has them) and meta.json (the tokenizer); FineWeb's shards stay as they come, in
llm.c's format. A run that was stopped goes on where it was.
"""
import argparse
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
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import numpy as np

DATA = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(DATA))
from model import Progress, download, hub_download  # noqa: E402

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
            try:                                                           # encode_ordinary, without a Python list
                return gpt2_bpe().encode_to_numpy(text, disallowed_special=()).astype(np.uint16)
            except UnicodeEncodeError:                                     # half a surrogate pair, as JSON can hold it
                return self.encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
            except ValueError:                                             # more white space than tiktoken can go back
                parts = re.split(f"(?<=[{WHITE}])(?=[{WHITE}][^{WHITE}])", text)  # over, cut where it cuts anyway
                if len(parts) == 1:
                    raise
                return np.concatenate([self.encode(part) for part in parts])
        ids = self.ids[codes(text)]
        if (bad := np.flatnonzero(ids == UNKNOWN)).size:
            raise ValueError(f"the character {text[bad[0]]!r} is not among the {len(self.characters)} that the model was "
                             f"trained on: {''.join(sorted(self.characters))[:120]!r}")
        return ids

    def decode_bytes(self, ids):
        """-> UTF-8. A GPT-2 token can be a part of a character, so only whole texts are sure to be whole UTF-8."""
        ids = [i for i in ids if i < self.vocab_size]                      # a model's vocabulary may be rounded up
        if self.name == "gpt2":
            return gpt2_bpe().decode_bytes(ids)
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
WHITE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode's white space, as tiktoken sees it


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
    write_tokens(folder, plain, lambda path, f: [(os.path.relpath(path, root), None, read_pieces(f))], "char")


def shakespeare_char(folder, source=None, tokenizer="char"):
    path = source or os.path.join(DATA, "downloads", "tinyshakespeare.txt")
    if not os.path.exists(path):
        download("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt", path,
                 sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")

    def read(path, f):
        text = f.read()
        cut = int(len(text) * 0.9)                                         # nanoGPT's split
        return [("train", "train", [text[:cut]]), ("val", "val", [text[cut:]])]
    write_tokens(folder, [os.fspath(path)], read, tokenizer)


def shakespeare(folder, source=None):
    shakespeare_char(folder, source, tokenizer="gpt2")


def fineweb(folder, shards=103):
    """The 10 billion tokens of llm.c's GPT-2 124M: as many shards as asked for, and the one it is validated on."""
    names = ["fineweb_val_000000.bin"] + [f"fineweb_train_{i:06}.bin" for i in range(1, shards + 1)]
    progress, bytes_done, tokens = Progress(""), 0, []

    def show(have, size):                                                  # the files to come are taken to be as large
        progress.show(bytes_done + have, size and bytes_done + size * (len(names) - len(tokens)))
    for name in names:
        path, progress.name = os.path.join(folder, name), f"fineweb, file {len(tokens) + 1} of {len(names)}"
        try:
            tokens.append(len(open_tokens(path)))
        except (FileNotFoundError, ValueError):                            # not there yet, or damaged
            hub_download("datasets/kjj0/fineweb10B-gpt2", name, path, show)
            tokens.append(len(open_tokens(path)))
        bytes_done += os.path.getsize(path)
    print(f"{folder}: {sum(tokens[1:]):,} tokens to train on in {shards} shards, {tokens[0]:,} to validate, "
          "vocabulary 50257 (gpt2)")


DATASETS = {f.__name__: f for f in (stdlib, shakespeare_char, shakespeare, fineweb)}


def own(folder, paths, tokenizer="gpt2", val_frac=0.1, field="text"):
    """Any files and folders. Each file is a document, each line of a .jsonl file another (its `field`)."""
    files = []
    for path in paths:
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path!r} is neither a file, a folder nor a data set ({', '.join(DATASETS)})")
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

    def read(path, f):
        if path.removesuffix(".gz").endswith(".jsonl"):
            return json_lines(path, f, field)
        return [(path, None, read_pieces(f))]
    write_tokens(folder, files, read, tokenizer, val_frac, field)


# ---------------------------------------------------------------------------------------------------------------------
# Reading and writing


PORTION = 1 << 18                     # characters that a thread encodes at a time
JOURNAL_EVERY = 2.0                   # seconds


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
    with contextlib.suppress(ValueError), open_text(path, "rb") as f:     # a text that is damaged is told of where it is read
        return b"\0" in f.read(1 << 16)
    return False


CUT = re.compile(r".*\S(?=[ \t\r\n])", re.DOTALL)


def read_pieces(f, size=None):
    """A file's text in pieces of about `size` characters. A piece ends before white space that follows something else:
    there GPT-2's tokenizer cuts anyway, so the tokens are those of the whole text."""
    rest = ""
    while more := f.read(size or PORTION):
        rest += more
        if cut := CUT.match(rest):
            yield rest[:cut.end()]
            rest = rest[cut.end():]
    if rest:
        yield rest


def json_lines(path, f, field):
    for number, line in enumerate(f, 1):
        line = line.removeprefix("\ufeff")                                 # a byte order mark
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            raise ValueError(f"{path}, line {number}: no JSON object with a text {field!r}: mend it, or "
                             "name the field with --field")
        yield f"{path}:{number}", None, [record[field]]


def read_texts(path, read):
    """A file's text: (document's name, split, number of the piece in the document, piece, bytes of the file read)."""
    with open_text(path) as f:
        source = getattr(f.buffer, "fileobj", f.buffer)                    # the .gz itself, if it is one
        for name, split, pieces in read(path, f):
            for k, text in enumerate(pieces):
                yield name, split, k, text, source.tell()


def portions(files, read, val_frac, done):
    """All text in portions of about PORTION characters: (place, bytes of source up to here, [(split, piece, whether it
    begins a document)...]). A place is (files finished, portions of the next); what comes up to `done` is left out."""
    before = sum(map(os.path.getsize, files[:done[0]]))
    for i, path in enumerate(files[done[0]:], done[0]):
        number, portion, size = 0, [], 0
        for name, split, k, text, at in read_texts(path, read):
            key = name.replace(os.sep, "/").encode("utf-8", "replace")
            split = split or ("val" if zlib.crc32(key) < val_frac * 2**32 else "train")
            portion.append((split, text, k == 0))
            size += len(text)
            if size >= PORTION:
                number += 1
                if (i, number) > done:
                    yield (i, number), before + at, portion
                portion, size = [], 0
        before += os.path.getsize(path)
        yield (i + 1, 0), before, portion


def in_order(work, items):
    """(item, work(item)) in the order of the items, by a thread per core. Memory is bounded: little is read ahead."""
    cores, begun = os.cpu_count() or 1, deque()
    with ThreadPoolExecutor(cores) as pool:
        for item in items:
            begun.append((item, pool.submit(work, item)))
            if len(begun) > 2 * cores:
                item, result = begun.popleft()
                yield item, result.result()
        for item, result in begun:
            yield item, result.result()


def write_tokens(folder, files, read, tokenizer, val_frac=0.1, field=None):
    """read(path, its text as a file) -> (a document's name, "train" | "val" | None, its text in pieces)... None: a hash
    of the name decides, or where documents are so few that it misses val_frac by far, the tail of all tokens.

    All is read once before it is encoded, so that a bad line is told at once and not after hours. All is written to
    NAME.part, which is moved into place whole. Its journal says how much of what is there counts, so that a run that was
    stopped goes on, unless settings have changed, or a source that was read by then."""
    if os.path.exists(folder) and (others := set(os.listdir(folder)) - {"train.bin", "val.bin", "meta.json"}):
        raise ValueError(f"{folder} holds {min(others)!r} too, which would be lost: choose another --name, "
                         "or move it away")
    name, part = os.path.basename(folder), folder.rstrip("/\\") + ".part"
    nothing = ValueError(f"{name}: there is no text in what was given")
    if not any(map(os.path.getsize, files)):
        raise nothing
    sources = [(os.path.abspath(path), (stat := os.stat(path)).st_size, stat.st_mtime_ns) for path in files]
    sizes = [size for _, size, _ in sources]
    total = sum(sizes)

    def check(first=0):
        """Reads the files from the `first` on -> the characters, for their tokenizer, and the number of documents."""
        seen, documents, before, progress = np.zeros(0x110000, dtype=bool), 0, sum(sizes[:first]), Progress(f"check {name}")
        for path, size in zip(files[first:], sizes[first:], strict=True):
            for _, split, k, text, at in read_texts(path, read):
                if tokenizer == "char":
                    seen[codes(text)] = True
                documents += split is None and k == 0
                progress.show(before + at, total)
            before += size
        return "".join(map(chr, np.flatnonzero(seen))), documents
    if tokenizer == "char":
        characters, documents = check()
        if not characters:
            raise nothing
        tokenizer = Tokenizer("char", characters, len(characters) if documents > 1 else None)
    else:
        tokenizer = Tokenizer(tokenizer)
        tokenizer.encode("")                                               # its files may be missing
    end = np.array([tokenizer.end_of_text] if tokenizer.end_of_text is not None else [], dtype=np.uint16)

    # origins[n] tells the settings and the first n sources from others
    origins = list(accumulate(sources, lambda origin, source: hashlib.sha256(f"{origin}{source}".encode()).hexdigest(),
                              initial=repr((tokenizer.to_json(), val_frac, field, PORTION))))
    paths = {split: os.path.join(part, f"{split}.bin") for split in ("train", "val")}
    journal = os.path.join(part, "journal.json")
    done, tokens = read_journal(journal, origins, paths) or ((0, 0), {"train": 0, "val": 0})
    if tokenizer.name == "gpt2":
        check(done[0])
    if done == (0, 0):
        if os.path.exists(journal):
            print(f"{name}: begins anew, since settings have changed, or a source of what is in {part}")
        shutil.rmtree(part, ignore_errors=True)
        os.makedirs(part)
    else:
        print(f"{name}: goes on after the {sum(tokens.values()):,} tokens in {part}")
    written, progress = time.time(), Progress(name)
    progress.show(sum(sizes[:done[0]]), total)

    def encode(item):
        ids = {split: [] for split in paths}
        for split, text, begins in item[2]:
            ids[split] += [end[:begins], tokenizer.encode(text)]
        return {split: np.concatenate(arrays) for split, arrays in ids.items() if arrays}

    with open(paths["train"], "ab") as train, open(paths["val"], "ab") as val:
        out = {"train": train, "val": val}
        for split, f in out.items():
            f.truncate(2 * tokens[split])
        for (place, at, _), encoded in in_order(encode, portions(files, read, val_frac, done)):
            for split, ids in encoded.items():
                if not tokens[split] and len(end):                         # not before the first document
                    ids = ids[np.cumsum(ids != end) > 0]
                ids.astype("<u2").tofile(out[split])
                tokens[split] += len(ids)
            progress.show(at, total)
            if time.time() - written >= JOURNAL_EVERY:
                for f in out.values():
                    f.flush()
                    os.fsync(f.fileno())
                with open(journal + ".new", "w", encoding="utf-8") as f:
                    json.dump({"origin": origins[place[0] + (place[1] > 0)], "done": place, "tokens": tokens}, f)
                os.replace(journal + ".new", journal)
                written = time.time()
    if not any(tokens.values()):
        shutil.rmtree(part)
        raise nothing
    if not all(tokens.values()) or not 0.25 <= tokens["val"] / sum(tokens.values()) / val_frac <= 4:
        with open(paths["train"], "ab") as train, open(paths["val"], "rb") as val:
            train.write(end.astype("<u2").tobytes() * all(tokens.values()))
            shutil.copyfileobj(val, train)
            count = train.tell() // 2
        cut = int(count * (1 - val_frac))
        with open(paths["train"], "r+b") as train, open(paths["val"], "wb") as val:
            train.seek(2 * cut)
            shutil.copyfileobj(train, val)
            train.truncate(2 * cut)
        tokens = {"train": cut, "val": count - cut}
    with open(os.path.join(part, "meta.json"), "w", encoding="utf-8") as f:
        json.dump({**tokenizer.to_json(), "tokens": tokens}, f)
    if os.path.exists(journal):
        os.remove(journal)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
    print(f"{folder}: {tokens['train']:,} tokens to train on, {tokens['val']:,} to validate, "
          f"vocabulary {tokenizer.vocab_size} ({tokenizer.name})")


def read_journal(path, origins, files):
    """-> (what is done, {split: tokens}), or None where there is nothing to go on with."""
    try:
        with open(path, encoding="utf-8") as f:
            found = json.load(f)
        finished, begun = found["done"]
        if found["origin"] == origins[finished + (begun > 0)] and all(os.path.getsize(files[k]) >= 2 * n
                                                                      for k, n in found["tokens"].items()):
            return (finished, begun), found["tokens"]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def open_tokens(path):
    """The tokens of a file, mapped: raw uint16, or one of llm.c's shards (256 int32: magic, version, number of tokens,
    zeros; then uint16), as which every NAME_000001.bin must be whole. ValueError for a file that is damaged."""
    size, header = os.path.getsize(path), np.fromfile(path, dtype="<i4", count=256)
    looks = len(header) == 256 and header[:3].all() and not header[3:].any()
    if re.search(r"_\d{6}\.bin$", path) or looks or len(header) > 2 and header[0] == 20240520:
        magic, version, tokens = (*map(int, header[:3]), 0, 0, 0)[:3]
        if (magic, version) != (20240520, 1):
            raise ValueError(f"{path} has magic {magic} and version {version}, not the 20240520 and 1 of GPT-2 tokens: "
                             "it is damaged or of another kind, fetch it anew")
        if size != 1024 + 2 * tokens:
            raise ValueError(f"{path}: a shard of {tokens:,} tokens has {1024 + 2 * tokens:,} bytes, not {size:,}: "
                             "it is cut short or damaged, fetch it anew")
        return np.memmap(path, dtype="<u2", mode="r", offset=1024)
    if size % 2 or not size:
        raise ValueError(f"{path} is {'half written' if size else 'empty'} ({size:,} bytes): prepare it anew"
                         + ", with --val_frac below 1" * (not size))
    return np.memmap(path, dtype="<u2", mode="r")


# ---------------------------------------------------------------------------------------------------------------------
# Command line, shared by the three scripts


def command_line(description, options, positional=None, argv=None):
    """Parses --name=value for `options` {name: (type, default, help)} -> ({name: value given}, [positionals]).
    Booleans take --flag, --flag=True, --flag=False and --no-flag. A mistake ends with one line and exit code 2."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            refuse(message)
    parser = Parser(usage="%(prog)s [--flag=value ...]", description=description, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (kind, default, text) in options.items():
        shown = f"{text} [{default}]" if default not in (None, "") else text
        how = dict(default=argparse.SUPPRESS, help=shown.replace("%", "%%"), metavar=kind.__name__)
        if kind is bool:
            parser.add_argument("--" + name, nargs="?", const=True, type=boolean, **how)
            parser.add_argument("--no-" + name, dest=name, action="store_false", default=argparse.SUPPRESS,
                                help=argparse.SUPPRESS)
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
        near = difflib.get_close_matches(name.lstrip("-").removeprefix("no-").replace("-", "_"), options, 1)
        refuse(f"there is no flag {name}" + (f": did you mean --{near[0]}?" if near else ""))
    given = vars(given)
    for name in (name for name in given if given[name] == "" and options[name][1]):
        refuse(f"--{name} is empty: give it a value, or leave it out for {options[name][1]}")
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[1-9]?\d)?", given.get("device", "auto")):
        refuse(f"--device={given['device']} is not known: use auto, cpu, cuda, cuda:N or mps")
    return given, given.pop("positional", [])


def boolean(text):
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() in ("true", "1")


def refuse(message):
    """A bad command line: one line, exit code 2."""
    if os.environ.get("RANK", "0") == "0":                                 # the other processes have the same to say
        print(f"{os.path.basename(sys.argv[0])}: {message} (--help lists the flags)", file=sys.stderr)
    else:
        time.sleep(1)                                                      # torchrun ends all of them when the first ends
    sys.exit(2)


def guarded(main):
    """Runs main(); what a user can mend ends with one line and exit code 1, not with a traceback."""
    if hasattr(sys.stdout, "reconfigure"):                                 # not in a notebook
        sys.stdout.reconfigure(errors="replace")                           # a character that this console lacks
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:                                                # who reads the output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)                       # or Python complains as it flushes
        sys.exit(141)
    except (ValueError, OSError, MemoryError) as e:
        sys.exit(f"{os.path.basename(sys.argv[0])}: {e}")
    except RuntimeError as e:
        if not out_of_memory(e):
            raise
        sys.exit(f"{os.path.basename(sys.argv[0])}: out of memory: fewer or shorter texts, or a smaller model, need less")


def out_of_memory(e):
    """What CUDA, MPS and CPU say of it."""
    return type(e).__name__ in ("OutOfMemoryError", "MemoryError") or "out of memory" in str(e) or "allocate memory" in str(e)


def main():
    options = {
        "name": (str, None, "what to call your own data: train.py --dataset=NAME"),
        "tokenizer": (str, None, "gpt2 or char, for your own data [gpt2]"),
        "val_frac": (float, None, "part of your own data that is kept for validation, 1 = all of it [0.1]"),
        "field": (str, None, "the text's name in the objects of your .jsonl files [text]"),
        "source": (str, None, "a download that is already on the machine, for stdlib and shakespeare"),
        "shards": (int, None, "of fineweb, 1 to 103 [103]"),
    }
    given, what = command_line(__doc__, options, "the name of a data set, or files and folders of your own")
    if not what:
        refuse(f"say what to prepare: {', '.join(DATASETS)}, or files and folders of your own")
    if len(what) == 1 and what[0] in DATASETS:
        if wrong := given.keys() - {"shards" if what[0] == "fineweb" else "source"}:
            refuse(f"--{min(wrong)} has no effect on {what[0]}")
        if not 1 <= given.get("shards", 1) <= 103:
            refuse(f"--shards={given['shards']} must be between 1 and 103")
        if "source" in given and not os.path.exists(given["source"]):
            refuse(f"--source={given['source']} is not there")
        return DATASETS[what[0]](os.path.join(DATA, what[0]), **given)
    for option in given.keys() & {"source", "shards"}:
        refuse(f"--{option} has no effect on your own files")
    if not given.get("name"):
        if what[0] in DATASETS:
            refuse(f"{what[0]} is a data set of its own: give it alone, or your files a --name")
        missing = [path for path in what if not os.path.exists(path)]
        near = difflib.get_close_matches(what[0], DATASETS, 1)
        refuse(f"{missing[0]!r} is neither a data set ({', '.join(DATASETS)}) nor a file or folder"
               + (f": did you mean {near[0]}?" if near else "") if missing else "give your data a name: --name=NAME")
    if given["name"] in DATASETS:
        refuse(f"--name={given['name']} is the name of a data set: choose another")
    if not 0 < given.get("val_frac", 0.1) <= 1:
        refuse(f"--val_frac={given['val_frac']} must be between 0 and 1")
    if given.get("tokenizer", "gpt2") not in ("gpt2", "char"):
        refuse(f"--tokenizer={given['tokenizer']} is not known: use gpt2 or char")
    own(os.path.join(DATA, given.pop("name")), what, **given)


if __name__ == "__main__":
    guarded(main)
