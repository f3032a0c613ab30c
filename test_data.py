"""
Tests of real data and real evaluations: text to tokens by many threads, FineWeb's shards, --eval_only, memory.
"""
import gzip
import itertools
import json
import math
import os
import pathlib
import re
import resource
import string
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import train
from data import prepare
from model import GPT2, GPT2Config
from test_model import hub  # noqa: F401
from test_run import agree, data, flags, here, logs, needs_bpe, read_bin, run  # noqa: F401

# ---------------------------------------------------------------------------------------------------------------------
# Text to tokens


@pytest.fixture
def texts(tmp_path):
    """A folder of each kind of file, some of it more than a portion -> what the documents are."""
    words = [f"{w} it's\n\n  naïve  東京 {w * 7}\r\n" for w in range(9000)]
    long, other = "".join(words), "".join(words[5:3000])
    lines = ["", "first", "a<|endoftext|>b", "half \ud83d of a pair", "", "x" * 5, " "] * 40
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_text("".join(json.dumps({"text": line, "n": 1}) + "\n" for line in lines))
    (tmp_path / "in/b.txt").write_text(long, newline="")
    (tmp_path / "in/c.txt.gz").write_bytes(gzip.compress(other.encode()))
    (tmp_path / "in/d.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "last"}).encode()))
    return lines + [long, other, "last"]


def by_hand(documents):
    """The rule in its plainest words: the end of text stands between documents, and none before the first token."""
    bpe, ids = prepare.gpt2_bpe(), []
    for text in documents:
        ids += [50256] * bool(ids) + bpe.encode_ordinary(text)
    return ids


@needs_bpe
def test_threads_give_the_tokens_of_one(texts, tmp_path, capsys):
    """Portions that come back in another order, a lost or doubled end of text, cuts that change tokens."""
    code, out, err = here(capsys, "prepare", tmp_path / "in", f"--name={tmp_path}/set", "--val_frac=1")
    assert code == 0 and "\r" not in out + err
    assert read_bin(tmp_path / "set", "val").tolist() == by_hand(texts) and not len(read_bin(tmp_path / "set", "train"))
    assert sorted(os.listdir(tmp_path / "set")) == ["meta.json", "train.bin", "val.bin"]


@needs_bpe
@pytest.mark.parametrize("changed", [False, True])
def test_preparing_goes_on(texts, tmp_path, capsys, monkeypatch, changed):
    """A stop that costs all the work done, doubles or drops a portion, or mixes the old source with a new one."""
    monkeypatch.setattr(prepare, "JOURNAL_EVERY", 0)
    monkeypatch.setattr(prepare, "PORTION", 20_000)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    encode, calls, fuse = prepare.Tokenizer.encode, [], 330                # all lines, and some of the long text

    def fused(self, text):
        calls.append(text)
        if len(calls) > fuse:
            raise KeyboardInterrupt
        return encode(self, text)
    monkeypatch.setattr(prepare.Tokenizer, "encode", fused)
    command = ["prepare", tmp_path / "in", f"--name={tmp_path}/set", "--val_frac=1"]
    assert here(capsys, *command)[0] == 130 and (tmp_path / "set.part/journal.json").exists()
    if changed:
        (tmp_path / "in/a.jsonl").write_text('{"text": "new"}\n')
        texts[:280] = ["new"]
    with open(tmp_path / "set.part/val.bin", "ab") as f:                   # written, but not in the journal yet
        f.write(b"half a portion")
    calls[:], fuse = [], 10**9
    code, out, _ = here(capsys, *command)
    assert code == 0 and ("goes on" in out) != changed and not ("first" in calls and not changed)
    assert read_bin(tmp_path / "set", "val").tolist() == by_hand(texts) and not (tmp_path / "set.part").exists()


def test_reading_does_not_run_ahead():
    """A reader faster than the encoders, and so the whole source in memory."""
    read = []
    items = (read.append(i) or i for i in range(100))
    for taken, (item, result) in enumerate(prepare.in_order(lambda i: i * i, items)):
        assert (item, result) == (taken, taken**2) and len(read) - taken <= 2 * os.cpu_count() + 1


@needs_bpe
def test_white_space_without_end():
    """A million line breaks, at which tiktoken's regular expression gives up: the end of a night's work."""
    text, encode = "a" + "\n" * 1_000_000 + "b c", prepare.gpt2_bpe().encode_ordinary
    assert prepare.Tokenizer("gpt2").encode(text).tolist() == encode(text[:-4]) + encode(text[-4:])


# ---------------------------------------------------------------------------------------------------------------------
# FineWeb's shards


def shard(count, seed=0, magic=20240520, version=1, claimed=None, vocab_size=50257):
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, claimed or count
    return header.tobytes() + np.random.default_rng(seed).integers(0, vocab_size, count, dtype="<u2").tobytes()


NAMES = ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]


def test_fineweb(hub, tmp_path, capsys, monkeypatch):  # noqa: F811
    """Shards fetched twice, or anew after a stop; a display for each; a screen of 80 columns that it does not fit."""
    monkeypatch.setattr(prepare, "DATA", str(tmp_path))
    clock = itertools.count()
    hub.files.update({name: shard(4000, i) for i, name in enumerate(NAMES[:2])})
    (tmp_path / "fineweb").mkdir()
    (tmp_path / "fineweb" / (NAMES[1] + ".part")).write_bytes(hub.files[NAMES[1]][:5000])
    code, _, err = here(capsys, "prepare", "fineweb", "--shards=2")
    assert code == 1 and NAMES[2] in err and "404" in err
    assert hub.log[0][2] == f"/datasets/kjj0/fineweb10B-gpt2/resolve/main/{NAMES[0]}"
    assert {headers["Range"] for *_, headers in hub.log if "Range" in headers} == {"bytes=5000-"}
    hub.asked()
    hub.files[NAMES[2]] = shard(2_000_000, 2)
    with monkeypatch.context() as patch:
        patch.setattr("time.time", lambda: next(clock))                    # every call comes a second after the last
        patch.setattr(sys.stderr, "isatty", lambda: True)
        code, out, err = here(capsys, "prepare", "fineweb", "--shards=2")
    assert code == 0 and "2,004,000 tokens to train on in 2 shards, 4,000 to validate" in out
    assert {name for _, _, name in hub.asked()} == {NAMES[2]}
    assert [(tmp_path / "fineweb" / name).read_bytes() for name in NAMES] == [hub.files[name] for name in NAMES]
    lines = re.split("[\r\n]", err.strip())
    assert len(lines) > 1 and all("fineweb, file 3 of 3" in line and len(line) < 80 for line in lines)
    assert err.count("\n") == 1
    (tmp_path / "fineweb" / NAMES[1]).write_bytes(b"<html>a mirror's login</html>" * 100)
    code, _, err = here(capsys, "prepare", "fineweb", "--shards=1")
    assert code == 1 and f"{NAMES[1]} has magic" in err and not hub.log


@pytest.mark.parametrize("content, words", [
    (shard(90, magic=20240801), "magic 20240801"), (shard(90, version=3), "version 3"), (shard(90)[:-1], "1,203"),
    (shard(90, claimed=91), "91 tokens has 1,206 bytes, not 1,204"), (shard(90)[:900], "900"), (shard(90)[1:], "half")])
def test_damaged_shards_are_named(tmp_path, content, words):
    """A header taken for tokens, and a shard that is short trained on, unseen."""
    paths = [str(tmp_path / f"{i}.bin") for i in range(2)]
    for path, each in zip(paths, (shard(90), content), strict=True):
        pathlib.Path(path).write_bytes(each)
    with pytest.raises(ValueError, match=f"1.bin.*{words}"):
        train.Tokens(paths, 16, 50257)


class Windows:
    def __init__(self, *ends):
        self.ends = np.array(ends)

    def __len__(self):
        return int(self.ends[-1])


def order(windows, count, rank=0, size=1, seed=3, consumed=0):
    return list(itertools.islice(train.Order(windows, SimpleNamespace(rank=rank, size=size), seed, consumed), count))


def test_order_over_shards(monkeypatch):
    """A window left out or read twice; epochs alike; reads all over the disk; another order on resume or more ranks."""
    windows, largest, randperm = Windows(7, 7, 20, 33), [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda n, **how: largest.append(n) or randperm(n, **how))
    line = order(windows, 99)
    files = [[int(i >= 7) + int(i >= 20) for i in line[at:at + 33]] for at in (0, 33, 66)]
    assert all(sorted(line[at:at + 33]) == list(range(33)) for at in (0, 33, 66)) and line[:33] != line[33:66]
    assert all(len(list(itertools.groupby(epoch))) == 3 for epoch in files) and len(set(map(tuple, files))) > 1
    assert line[:33] != order(windows, 33, seed=4) and max(largest) == 13
    for size, at in itertools.product((1, 2, 3, 5), (0, 1, 6, 7, 8, 32, 33, 34, 50)):
        ranks = [order(windows, 8, rank, size, consumed=at) for rank in range(size)]
        assert [ranks[(at + i) % size][i // size] for i in range(8 * size)] == line[at:at + 8 * size]


def test_training_on_shards(tmp_path):
    """Shards that ranks read in different orders."""
    for name, tokens in zip(NAMES, (100, 400, 300), strict=True):
        (tmp_path / name).write_bytes(shard(tokens, vocab_size=26))
    (tmp_path / "meta.json").write_text(json.dumps({"tokenizer": "char", "characters": string.ascii_lowercase}))
    for ranks in (0, 2):
        run("train", *flags(dataset=tmp_path, max_iters=4, out_dir=tmp_path / f"{ranks}"), ranks=ranks)
    agree(tmp_path / "0", tmp_path / "2")


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


DOCUMENTS = ["a bad dab\n\n  cab é  日本\u3000ab", "dead\u00a0beef 日", "", " fade  abc" * 9]
SHAPE = dict(n_layer=2, n_head=2, n_embd=32)


@pytest.fixture(scope="module", params=["transformers", "all flags"])
def judged(request, tmp_path_factory):
    """A data set and a model of its characters -> (its folder, function of tokens to logits)."""
    folder = tmp_path_factory.mktemp("judged")
    documents = [(str(i), None, [text]) for i, text in enumerate(DOCUMENTS)]
    prepare.write_tokens(str(folder / "set"), [__file__], lambda path, f: documents, "char", val_frac=1)
    vocab_size = prepare.Tokenizer.load(folder / "set").vocab_size
    if request.param == "transformers":
        torch.manual_seed(0)
        config = transformers.GPT2Config(n_positions=16, vocab_size=vocab_size, **SHAPE)
        model = transformers.GPT2LMHeadModel(config).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(4 if p.dim() > 1 else 1)                            # or all tokens are as likely
    else:
        model = GPT2(GPT2Config(16, vocab_size, **SHAPE, rope=True, gqa=True, sliding_window=True, window_size=5), 0)
    model.save_pretrained(folder / "model")
    (folder / "model/meta.json").write_text((folder / "set/meta.json").read_text())
    return folder, lambda ids: (model(ids).logits if request.param == "transformers" else model(ids)[0])[0]


@pytest.mark.parametrize("ranks, stride", [(0, None), (0, 1), (0, 5), (2, 5)])
def test_eval_only(judged, tmp_path, ranks, stride):
    """Tokens scored twice, never, or with less before them than promised; the token between documents taken for text;
    ranks that count a window for another; an evaluation that leaves files."""
    folder, logits = judged
    given = [f"--eval_stride={stride}"] * bool(stride) + ["--fsdp"] * bool(ranks)
    done = run("train", f"--init_from={folder}/model", f"--dataset={folder}/set", "--eval_only", "--device=cpu",
               "--batch_size=4", *given, ranks=ranks, folder=tmp_path)
    ids, T, S, nats = torch.from_numpy(read_bin(folder / "set", "val").astype(np.int64)), 16, stride or 16, 0.0
    for t in range(1, len(ids)):                                           # by the first window that reaches token t
        begin = S * max(0, math.ceil((t - T) / S))
        with torch.no_grad():
            nats -= logits(ids[None, begin:t])[-1].log_softmax(-1)[ids[t]].item()
    tokens, (size, words) = len(ids) - 1, (sum(len(f(text)) for text in DOCUMENTS) - 1 for f in (str.encode, str.split))
    told = re.search(r"loss (\S+) nats per token, of (\S+) tokens\nperplexity (\S+) per token, (\S+) per word, of (\S+)"
                     r" words\nbits per byte (\S+), of (\S+) bytes\n$", done.out)
    bits, perplexities = nats / math.log(2), [math.exp(nats / n) for n in (tokens, words)]
    right = [nats / tokens, tokens, *perplexities, words, bits / size, size]
    assert [float(number.replace(",", "")) for number in told.groups()] == pytest.approx(right, rel=5e-4)
    assert float(told[1]) == pytest.approx(nats / tokens, abs=6e-5) and os.listdir(tmp_path) == []


@needs_bpe
@given(st.lists(st.text(st.sampled_from("a 日é\n\u3000\u00a0🎉"), max_size=12), min_size=1), st.sets(st.integers(1, 9)))
def test_bytes_and_words_are_those_of_the_text(texts, cuts):  # noqa: F811
    """Words cut, joined or lost where windows meet, in the middle of a character too."""
    ids = np.array(by_hand(texts), dtype=np.uint16)
    edges = [0, *sorted(cut for cut in cuts if cut < len(ids)), len(ids)]
    spans = np.array([(0, 0, a, b) for a, b in itertools.pairwise(edges)])
    assert train.text_size(SimpleNamespace(files=[ids]), prepare.Tokenizer("gpt2"), spans) == (
        sum(len(text.encode()) for text in texts), sum(len(text.split()) for text in texts))


@pytest.mark.parametrize("wrong, word", [
    ("--eval_stride=4", "--eval_only"), ("--eval_only --eval_stride=17", "=16"), ("--eval_only --eval_stride=0", "1")])
def test_refused_strides(judged, capsys, wrong, word):
    """A flag without effect, or tokens that no window scores."""
    folder, _ = judged
    code, _, err = here(capsys, "train", f"--init_from={folder}/model", f"--dataset={folder}/set", *wrong.split())
    assert code == 2 and word in err and err.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# What a person sees


def little_memory():
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30),) * 2)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is limited by way of /proc")
def test_out_of_memory(data, tmp_path):  # noqa: F811
    """A traceback of the allocator's, or an advice that makes another run of it."""
    common = dict(dataset=data, out_dir=tmp_path / "out")
    err = run("train", *flags(**common, batch_size=2**15), before=little_memory, code=1).err
    assert err.count("\n") == 1 and "--batch_size=16384 --gradient_accumulation_steps=8 --eval_iters=6" in err
    common |= dict(batch_size=6, max_iters=3)
    run("train", *flags(**common))
    advice = train.cure(train.Run(batch_size=6, eval_iters=3), {}, SimpleNamespace(distributed=False))
    run("train", *flags(**common | dict(out_dir=tmp_path / "less")), *re.findall(r"--\S+", advice))
    assert "--batch_size=3" in advice
    agree(tmp_path / "out", tmp_path / "less")


def test_only_memory_is_taken_for_memory(capsys, monkeypatch):
    """An error of ours shown as one of memory, or a GPU's out of memory as a traceback."""
    def fit(*_):
        raise errors.pop()
    monkeypatch.setattr(train, "fit", fit)
    errors = [RuntimeError("shapes"), torch.OutOfMemoryError("CUDA: 2 GB"), RuntimeError("MPS backend out of memory")]
    for _ in range(2):
        code, _, err = here(capsys, "train", "--batch_size=1", "--device=cpu")
        assert code == 1 and err.count("\n") == 1 and "--grad_checkpoint" in err
    with pytest.raises(RuntimeError, match="shapes"):
        here(capsys, "train", "--batch_size=1", "--device=cpu")


def test_lines_fit(data, tmp_path, capsys, monkeypatch):  # noqa: F811
    """A live line that wraps in 80 columns, and so never renews itself; carriage returns in a log file."""
    out = run("train", *flags(dataset=data, out_dir=tmp_path / "out", max_iters=2)).out
    lines = re.findall(r"^step \d/2  loss \S+  lr \S+  norm \S+ .* tok/s  \S+ left  .* GB$", out, re.MULTILINE)
    assert len(lines) == 2 and "\r" not in out and all(line.index(" left") < 75 for line in lines)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    log = train.Log(train.Run(out_dir=str(tmp_path / "log")), GPT2Config(), 0)
    log.line(f"{lines[0]}  mfu 45.1%  and more  of this  and that", stay=False)
    assert len(shown := capsys.readouterr().out) < 81 and "left" in shown and "that" not in shown
