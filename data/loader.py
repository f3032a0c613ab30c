"""
Reading token files: as samples for training, in an order that any number of processes can share.
"""
import functools
import glob
import json
import os
import re
import zlib

import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler

from data import DATA

ITEMS = "items.json"                                             # marks data to compare models with
SHARD_MAGIC = 20240520                                           # of llm.c's files of GPT-2 tokens
PIECE = 1 << 22                                                  # samples that are shuffled at once


def find_data(name):
    """-> (folder, {"train": [paths], "val": [paths]}) of a data set that has been prepared. `name`
    is a folder in data/, or the path of any folder."""
    folder = f"{DATA}/{name}"
    prepared = glob.glob(os.path.join(glob.escape(folder), "*.bin"))
    is_path = bool(os.path.dirname(name))
    if os.path.isdir(name) and (is_path or not prepared):
        folder = name
    paths = {"train": [], "val": []}
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*.bin"))):
        words = re.findall("[a-z]+", os.path.basename(path).lower())
        if "train" in words and "val" in words:
            raise ValueError(f"{path} has both train and val in its name: rename it to one of them")
        for split, found in paths.items():
            if split in words:
                found.append(path)
    for split, found in paths.items():
        if not found:
            where = name if is_path else folder
            raise FileNotFoundError(f"data set {name!r}: there is no {split}.bin in {where}. "
                                    "Prepare your own files with python data/prepare.py PATH... "
                                    f"--name={os.path.basename(name)}; --help there lists the data "
                                    "sets that have a name")
    return folder, paths


def token_counts(folder):
    """{split: number of tokens} as meta.json has it, {} if it has none."""
    path = f"{folder}/meta.json"
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as f:
        counts = json.load(f).get("tokens", {})
    if not isinstance(counts, dict) or not all(type(n) is int for n in counts.values()):
        raise ValueError(f"{path} is damaged: its tokens are not one number per split. Prepare the "
                         "data again")
    return counts


def read_items(folder, tokens):
    """The items of a data set that compares models, see `write_items` in data/prepare.py -> (number
    of the right ending (N,), (begin, first, end, characters) of all endings (N, E, 4)). ValueError
    if the file does not fit `tokens` tokens."""
    path = f"{folder}/{ITEMS}"
    try:
        with open(path, encoding="utf-8") as f:
            items = json.load(f)
        labels = np.array([item["label"] for item in items], dtype=np.int64)
        endings = np.array([item["endings"] for item in items], dtype=np.int64)
        begin, first, end, _ = np.moveaxis(endings, 2, 0)
        right = (0 <= begin) & (begin < first) & (first < end) & (end <= tokens)
        if not right.all() or not ((labels >= 0) & (labels < endings.shape[1])).all():
            raise ValueError("it does not fit val.bin")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error!s:.100}): prepare the data again") from None
    return labels, endings


def open_tokens(path):
    """The tokens of a file, mapped. ValueError if it is damaged.

    The file is raw uint16, as in nanoGPT, or one of llm.c's shards: 256 int32 (magic, version,
    number of tokens, zeros), then uint16. A file named like NAME_000001.bin must be a shard.
    """
    size = os.path.getsize(path)
    header = np.fromfile(path, dtype="<i4", count=256)
    named_as_shard = re.search(r"_\d{6}\.bin$", path)
    looks_like_one = len(header) == 256 and header[:3].all() and not header[3:].any()
    if named_as_shard or looks_like_one or SHARD_MAGIC in header[:1]:
        return open_shard(path, size, header)
    if size == 0:
        raise ValueError(f"{path} is empty: prepare the data again, with --val_frac below 1")
    if size % 2:
        raise ValueError(f"{path} is half written ({size:,} bytes): prepare the data again")
    return np.memmap(path, dtype="<u2", mode="r")


def open_shard(path, size, header):
    magic, version, tokens = np.append(header[:3], [0, 0, 0])[:3].tolist()
    if magic != SHARD_MAGIC or version != 1:
        raise ValueError(f"{path} has magic {magic} and version {version}; GPT-2 tokens have "
                         f"{SHARD_MAGIC} and 1. It is damaged, or another kind: download it again")
    if size != 1024 + 2 * tokens:
        raise ValueError(f"{path}: a shard of {tokens:,} tokens has {1024 + 2 * tokens:,} bytes, "
                         f"not {size:,}. It is truncated or damaged: download it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=1024)


def open_mask(path, tokens):
    """Which tokens of a file are to be predicted, one byte each, mapped; None if all are."""
    path = path.removesuffix(".bin") + ".mask"
    if not os.path.exists(path):
        return None
    if os.path.getsize(path) != tokens:
        raise ValueError(f"{path} has {os.path.getsize(path):,} bytes for {tokens:,} tokens: "
                         "prepare the data again")
    return np.memmap(path, dtype=np.uint8, mode="r")


class TokenDataset(Dataset):
    """Token files cut into samples of block_size tokens. Sample i is (x, y), each (T,) int64; y is
    x one token later, or -1 where a mask (see `open_mask`) says that it is not to be predicted. The
    files are mapped, so they may be larger than memory."""

    def __init__(self, paths, block_size, vocab_size, expected=None):
        """expected: the number of tokens that must be there, None if unknown."""
        self.paths = paths
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.files = [open_tokens(path) for path in paths]
        self.masks = [open_mask(path, len(f)) for path, f in zip(paths, self.files, strict=True)]
        self.masked = any(mask is not None for mask in self.masks)
        self.tokens = sum(map(len, self.files))
        if expected is not None and self.tokens != expected:
            raise ValueError(f"{paths[0]} holds {self.tokens:,} tokens, meta.json says "
                             f"{expected:,}: it is half written. Prepare the data again")
        # Samples of file f have the numbers from ends[f - 1] up to ends[f].
        self.ends = np.cumsum([max(0, len(f) - 1) // block_size for f in self.files])
        if len(self) == 0:
            largest = max(map(len, self.files)) - 1
            raise ValueError(f"{paths[0]} holds {self.tokens:,} tokens; a sample with "
                             f"block_size={block_size} needs {block_size + 1:,}. Use "
                             f"--block_size={max(1, largest)} or less, or more text")
        self[0]                                                 # fails now if the tokens do not fit
        self[len(self) - 1]

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, i):
        x, y = self.__getitems__([i])
        return x[0], y[0]

    def __getitems__(self, indices):
        """The samples as a batch: x and y, each (B, T)."""
        T = self.block_size
        x = np.empty((len(indices), T), dtype=np.int64)
        y = np.empty_like(x)
        for row, i in enumerate(indices):
            file = int(np.searchsorted(self.ends, i, side="right"))
            first = int(self.ends[file - 1]) if file else 0
            start = (i - first) * T
            ids = self.read(file, start, start + T + 1)
            x[row] = ids[:-1]
            y[row] = ids[1:]
            self.hide(y[row], file, start + 1)
        return torch.from_numpy(x), torch.from_numpy(y)

    def read(self, file, start, end):
        """Tokens start to end of a file. ValueError if one is outside the vocabulary."""
        ids = self.files[file][start:end]
        if ids.max() >= self.vocab_size:
            raise ValueError(f"{self.paths[file]} holds token {ids.max()}, beyond the vocabulary "
                             f"of {self.vocab_size}: it was made with another tokenizer")
        return ids

    def targets(self, file, start, end):
        """Tokens start to end of a file, int64: -1 in place of those not to be predicted."""
        ids = self.read(file, start, end).astype(np.int64)
        self.hide(ids, file, start)
        return ids

    def hide(self, ids, file, start):
        """Replace by -1, in place, those of a file's tokens from `start` that are not to be
        predicted."""
        if self.masks[file] is not None:
            ids[self.masks[file][start:start + len(ids)] == 0] = -1

    def span_counts(self, stride):
        """The number of rows of `spans` in each file."""
        lengths = np.array([len(file) for file in self.files])
        steps = lengths - self.block_size - 1                    # tokens beyond a file's first row
        return np.where(lengths > 1, 1 + np.maximum(0, -(-steps // stride)), 0)

    def spans(self, stride, samples=0):
        """What an evaluation reads: rows (file, begin, first, end), `stride` apart. A row reads
        tokens[begin:end] of a file, at most block_size + 1, and predicts tokens[first:end], those
        that the row before did not reach. Together all rows predict every token but a file's first,
        once. samples: only so many of those that predict `stride` tokens, evenly spaced."""
        T = self.block_size
        lengths = np.array([len(file) for file in self.files])
        if samples:
            steps = lengths - T - 1
            counts = np.where(steps < 0, lengths > stride, 1 + steps // stride)
            chosen = np.linspace(0, counts.sum() - 1, min(counts.sum(), samples)).astype(int)
        else:
            counts = self.span_counts(stride)
            chosen = np.arange(counts.sum())
        ends = np.cumsum(counts)
        file = np.searchsorted(ends, chosen, side="right")
        begin = (chosen - (ends - counts)[file]) * stride
        end = np.minimum(begin + T + 1, lengths[file])
        first = np.where(begin == 0, 1, begin - stride + T + 1)
        return np.stack((file, begin, first, end), axis=1)

    @functools.cached_property
    def fingerprint(self):
        """A text that differs between data sets, from the sizes and a sample of the tokens."""
        crc = 0
        for file in [*self.files, *(mask for mask in self.masks if mask is not None)]:
            some = file[::max(1, len(file) // 20)]
            crc = zlib.crc32(np.append(some, len(file)), crc)
        return f"{self.tokens:,} tokens (checksum {crc:08x})"


class EndlessSampler(DistributedSampler):
    """torch's DistributedSampler without an end, which can start anywhere.

    The shuffled epochs form one endless sequence of samples, of which process r of R reads every
    R-th. So a step reads the same samples for any R, each sample comes once an epoch, and the
    position is one number: the samples consumed, by all processes together. With several files, or
    one of more than PIECE samples, these are shuffled, and then the samples within each: reads stay
    local, memory small, and a resume skips what lies before it.
    """

    def __init__(self, dataset, rank, world_size, seed, consumed=0):
        super().__init__(dataset, world_size, rank, shuffle=True, seed=seed)
        self.consumed = consumed
        self.ends = [0]                                          # of the pieces
        for end in map(int, dataset.ends):
            self.ends += [*range(self.ends[-1] + PIECE, end, PIECE), end]

    def __iter__(self):
        position = self.consumed // len(self.dataset) * len(self.dataset)
        while True:
            self.set_epoch(position // len(self.dataset))
            for piece, generator in self.shuffled_pieces():
                first = self.ends[piece]
                samples = self.ends[piece + 1] - first
                if position + samples > self.consumed:
                    order = first + torch.randperm(samples, generator=generator).numpy()
                    # Position p of the line belongs to process p % R.
                    start = max(self.consumed - position, 0)
                    start += (self.rank - position - start) % self.num_replicas
                    for i in order[start::self.num_replicas]:
                        yield int(i)
                position += samples

    def shuffled_pieces(self):
        """Yield each piece and the generator that shuffles it."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        pieces = len(self.ends) - 1
        if pieces == 1:
            yield 0, generator                                   # as torch's sampler
            return
        seeds = torch.randint(2**62, (pieces,), generator=generator).tolist()
        for piece in torch.randperm(pieces, generator=generator).tolist():
            yield piece, torch.Generator().manual_seed(seeds[piece])
