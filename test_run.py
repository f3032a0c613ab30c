"""
Tests of data/prepare.py, train.py and sample.py: the runs. The long ones: pytest -m slow.
"""
import gzip
import io
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import xml.etree.ElementTree
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler

import sample
import train
from data import prepare
from model import GPT2, GPT2Config

HERE = pathlib.Path(__file__).resolve().parent
SHARED = HERE.parent / "shared"
os.environ["OMP_NUM_THREADS"] = "1"                                        # of the processes started here
torch.set_num_threads(1)
if (SHARED / "tiktoken_cache").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
needs_bpe = pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ,
                               reason="needs GPT-2's tokenizer files: set TIKTOKEN_CACHE_DIR")
SHAKESPEARE = SHARED / "data/tinyshakespeare.txt"
needs_shakespeare = pytest.mark.skipif(not SHAKESPEARE.exists(), reason=f"needs {SHAKESPEARE}")

TINY = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, batch_size=2, max_iters=9, eval_interval=3, eval_iters=3,
            log_interval=1, learning_rate=2e-3, warmup_iters=2, device="cpu")
ALL = dict(rope=True, gqa=True, sliding_window=True, n_head=4, n_kv_head=2, window_size=8)


def flags(**changes):
    return [f"--{name}={value}" for name, value in {**TINY, **changes}.items()]


# Importing torch takes seconds. So most processes are forked from one that has done that and nothing else.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "train", "sample", __name__])
SCRIPTS = {"train": train, "sample": sample, "prepare": prepare}


def child(script, argv, env, folder, log, before):
    for number, path in ((0, os.devnull), (1, log + ".out"), (2, log + ".err")):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    sys.stdin = open(0)
    os.environ.update(env)
    os.chdir(folder)
    sys.argv = [script + ".py", *argv]
    if before:
        before()
    prepare.guarded(SCRIPTS[script].main)


def start(script, *argv, ranks=0, folder=None, before=None):
    """Starts `python SCRIPT.py ARGV`, or as many of it as torchrun would; `before` is called first in each."""
    processes, port = [], free_port()
    for rank in range(ranks or 1):
        place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks,
                     MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        env = {name: str(value) for name, value in place.items()} if ranks else {}
        where, log = folder[rank] if isinstance(folder, list) else folder or LOGS, os.path.join(LOGS, str(next(COUNT)))
        process = FORKS.Process(target=child, args=(script, [str(a) for a in argv], env, where, log, before))
        process.log = log
        process.start()
        processes.append(process)
    return processes


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def finish(processes, timeout=60):
    """Waits -> the exit codes, negative for signals; what the first printed; what all of them wrote to stderr."""
    deadline = time.time() + timeout
    for p in processes:
        p.join(max(0, deadline - time.time()))
    late = [p for p in processes if p.is_alive()]
    for p in late:
        p.kill()
        p.join()
    out, err = ("".join(pathlib.Path(p.log + kind).read_text() for p in processes) for kind in (".out", ".err"))
    assert not late, f"{len(late)} of {len(processes)} processes hang after {timeout} s\n{out}\n{err}"
    return SimpleNamespace(codes=[p.exitcode for p in processes], out=out, err=err)


def run(*args, code=0, **how):
    done = finish(start(*args, **how))
    assert set(done.codes) == {code}, (done.codes, done.out, done.err)
    return done


LOGS, COUNT = None, itertools.count()


@pytest.fixture(scope="session", autouse=True)
def logs(tmp_path_factory):
    global LOGS
    LOGS = str(tmp_path_factory.mktemp("logs"))


def here(capsys, script, *argv):
    """What `python SCRIPT.py ARGV` does, in this process -> (exit code, stdout, stderr)."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    code, before = 0, sys.argv
    sys.argv = [script + ".py", *map(str, argv)]
    try:
        prepare.guarded(SCRIPTS[script].main)
    except SystemExit as e:
        code = e.code or 0
    finally:
        sys.argv = before
        for number, handler in handlers.items():
            signal.signal(number, handler)
    out, err = capsys.readouterr()
    return (1, out, f"{err}{code}\n") if isinstance(code, str) else (code, out, err)


def one_line(err, *words):
    assert err.count("\n") == 1 and "Traceback" not in err and all(word in err for word in words), err


WORDS = ["".join(random.Random(i).choices("abcdefghij", k=i % 6 + 1)) for i in range(40)]
TEXT = "\n".join(" ".join(random.Random(i).choices(WORDS, k=8)) for i in range(200))


def write_set(folder, *texts):
    """A data set by characters, of a text to train on and another for validation."""
    os.makedirs(folder)
    t, counts = prepare.Tokenizer("char", "".join(sorted(set("".join(texts))))), {}
    for split, text in zip(("train", "val"), texts, strict=True):
        t.encode(text).tofile(os.path.join(folder, f"{split}.bin"))
        counts[split] = len(text)
    pathlib.Path(folder, "meta.json").write_text(json.dumps({**t.to_json(), "tokens": counts}))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A data set of 53 training and 5 validation windows: numbers that do not divide evenly."""
    folder = str(tmp_path_factory.mktemp("data") / "set")
    write_set(folder, TEXT[:1700], TEXT[1700:1870])
    return folder


def curve(out):
    """metrics.jsonl without what depends on the machine."""
    records = train.read_metrics(str(out))
    return [{k: v for k, v in r.items() if k not in ("tokens_per_second", "memory")} for r in records]


def same_run(a, b):
    """Two finished runs are equal to the bit: every line of the metrics, the weights, the optimizer and the rest."""
    assert curve(a) == curve(b) and contents(a) == contents(b)


def contents(out):
    """The bytes of a checkpoint, short: {file: hash}."""
    return {name: hash((out / name).read_bytes()) for name in train.FILES}


def agree(a, b, tolerance=2e-5):
    """Largest relative difference of two runs' losses and gradient norms."""
    a, b = curve(a), curve(b)
    assert [(r["step"], r.keys()) for r in a] == [(r["step"], r.keys()) for r in b]
    worst = max(abs(x[k] - y[k]) / (abs(y[k]) or 1) for x, y in zip(a, b, strict=True) for k in x)
    assert worst <= tolerance, worst
    return worst


# ---------------------------------------------------------------------------------------------------------------------
# Data


def read_bin(folder, split):
    return np.fromfile(os.path.join(folder, f"{split}.bin"), dtype="<u2")


@needs_shakespeare
def test_shakespeare_char_is_nanogpts(tmp_path):
    """Another split, vocabulary or order of characters than nanoGPT's, whose losses could then not be compared."""
    prepare.shakespeare_char(str(tmp_path / "s"), SHAKESPEARE)
    text = SHAKESPEARE.read_text()
    ids = {c: i for i, c in enumerate(sorted(set(text)))}
    assert len(ids) == prepare.Tokenizer.load(tmp_path / "s").vocab_size == 65
    cut = int(len(text) * 0.9)
    for split, part, size in (("train", text[:cut], 1_003_854), ("val", text[cut:], 111_540)):
        tokens = read_bin(tmp_path / "s", split)
        assert len(tokens) == size and tokens.tolist() == [ids[c] for c in part]


@needs_shakespeare
@needs_bpe
def test_shakespeare_is_tiktokens(tmp_path):
    """Byte pairs other than GPT-2's, or a split other than nanoGPT's."""
    import tiktoken
    prepare.shakespeare(str(tmp_path / "s"), SHAKESPEARE)
    text, encode = SHAKESPEARE.read_text(), tiktoken.get_encoding("gpt2").encode_ordinary
    cut = int(len(text) * 0.9)
    for split, part, size in (("train", text[:cut], 301_966), ("val", text[cut:], 36_059)):
        assert read_bin(tmp_path / "s", split).tolist() == (encoded := encode(part)) and len(encoded) == size


@pytest.mark.parametrize("tokenizer", ["char", pytest.param("gpt2", marks=needs_bpe)])
def test_own_files(tmp_path, capsys, monkeypatch, tokenizer):
    """A document lost, doubled, glued to the next one, or taken from a hidden or binary file."""
    texts = {f"{i}.txt": f"text {i} says näh.\n\n" * (i + 1) for i in range(12)}
    (tmp_path / "in/deep").mkdir(parents=True)
    for i, (name, text) in enumerate(texts.items()):
        if i % 2:
            (tmp_path / "in" / name).write_text(text)
        else:
            (tmp_path / "in/deep" / (name + ".gz")).write_bytes(gzip.compress(text.encode()))
    lines = [f"a line {i}" for i in range(8)]
    (tmp_path / "in/x.jsonl").write_text("".join(json.dumps({"body": line}) + "\n" for line in lines))
    (tmp_path / "in/.hidden").write_text("hidden")
    (tmp_path / "in/image.png").write_bytes(b"\x89PNG\0\1\2")
    (tmp_path / "in/empty.txt").write_text("")
    monkeypatch.chdir(tmp_path)                                            # the split depends on the paths given
    argv = ["in", f"--name={tmp_path}/set", f"--tokenizer={tokenizer}", "--field=body", "--val_frac=0.3"]
    code, out, _ = here(capsys, "prepare", *argv)
    assert code == 0 and "1 files that are not text" in out and "image.png" in out
    t = prepare.Tokenizer.load("set")
    assert t.name == tokenizer and t.end_of_text == t.vocab_size - 1
    got = {split: t.decode(read_bin("set", split)).split("<|endoftext|>") for split in ("train", "val")}
    assert sorted(got["train"] + got["val"]) == sorted([*texts.values(), *lines]) and len(got["val"]) > 1
    assert train.token_counts("set") == {split: len(read_bin("set", split)) for split in got}


@needs_bpe
@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("ab'st1.é日🎉 \n\r\t\u00a0\u2028\x1c\x0b"), max_size=60), st.integers(1, 12))
def test_pieces_give_the_tokens_of_the_whole(text, size):
    """A cut where GPT-2's tokenizer would not cut: other tokens in files of more than one piece."""
    encode = prepare.Tokenizer("gpt2").encode
    with open(os.path.join(LOGS, "text"), "w", encoding="utf-8", newline="") as f:
        f.write(text)
    with open(f.name, encoding="utf-8", newline="") as f:
        pieces = list(prepare.read_pieces(f, size))
    assert "".join(pieces) == text
    assert [i for piece in pieces for i in encode(piece)] == encode(text).tolist()


@pytest.mark.parametrize("ending", ["\n", "\r\n", " "])
def test_pieces_stay_small(tmp_path, ending):
    """Text with Windows' line ends, or without any, read into memory as a whole."""
    (tmp_path / "text").write_bytes(f"word{ending}".encode() * 3000)
    with open(tmp_path / "text", newline="") as f:
        assert max(map(len, prepare.read_pieces(f, 1000))) < 2100


def test_character_table():
    """An id that means another character after loading, or an unknown character taken for a known one."""
    t = prepare.Tokenizer("char", "\n abé日", 6)
    assert t.encode("b é日\n").tolist() == [3, 1, 4, 5, 0] and t.decode([3, 1, 6, 5]) == "b <|endoftext|>日"
    assert t.vocab_size == 7 and prepare.Tokenizer("char", "ab").vocab_size == 2
    with pytest.raises(ValueError, match="'z' is not among the 6"):
        t.encode("abz")
    for wrong in (("char", "aa"), ("char", ""), ("char", None), ("char", "ab", 5), ("bpe",)):
        with pytest.raises(ValueError):
            prepare.Tokenizer(*wrong)


def test_stdlib_needs_no_network(tmp_path, monkeypatch):
    """A default data set that cannot be made offline, or that trains on what it validates."""
    for name in ["test/test_os.py", "site-packages/x.py", "uni.py", "json/x.py"] + [f"m{i}.py" for i in range(31)]:
        (tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib" / name).write_text(f"# {name}\n" + ("é" if name == "uni.py" else "") + "x = 1\n" * 20)
    monkeypatch.setattr(socket, "socket", None)
    prepare.stdlib(str(tmp_path / "s"), tmp_path / "lib")
    t = prepare.Tokenizer.load(tmp_path / "s")
    texts = [t.decode(read_bin(tmp_path / "s", split)).split("<|endoftext|>") for split in ("train", "val")]
    assert len(texts[0]) + len(texts[1]) == 32 and len(texts[1]) >= 1 and not set(texts[0]) & set(texts[1])
    assert t.characters.isascii() and not any("site-packages" in text or "test_os" in text for text in sum(texts, []))


def shard(tokens, magic=20240520, version=1, claimed=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if claimed is None else claimed
    return header.tobytes() + np.array(tokens, "<u2").tobytes()


GOOD = list(range(50)) * 4


@pytest.mark.parametrize("content, meta, words", [
    (b"", None, "empty"),
    (np.array(GOOD, "<u2").tobytes()[:-1], None, "half written (399 bytes)"),
    (np.array(GOOD[:32], "<u2").tobytes(), None, "fewer than one window of block_size=32 and one more"),
    (np.array([*GOOD[:170], 777, *GOOD[171:]], "<u2").tobytes(), None, "token 777, beyond the vocabulary of 50"),
    (np.array(GOOD[:150], "<u2").tobytes(), {"tokens": {"train": 200}}, "holds 150 tokens, meta.json says 200"),
    (shard(GOOD)[:-2], None, "cut short"),
    (shard(GOOD, claimed=100), None, "cut short or damaged"),
    (shard(GOOD, version=2), None, "version 2"),
])
def test_damaged_token_files(tmp_path, content, meta, words):
    """Training on whatever a damaged file happens to hold."""
    (tmp_path / "train.bin").write_bytes(content)
    if meta:
        (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=re.escape(words)):
        train.Tokens([str(tmp_path / "train.bin")], 32, 50, train.token_counts(tmp_path).get("train"))


def test_windows(tmp_path):
    """A window that starts at the wrong token, spans two files, or has y out of step with x."""
    (tmp_path / "a.bin").write_bytes(np.arange(0, 10, dtype="<u2").tobytes())  # 2 windows, and a token left over
    (tmp_path / "b.bin").write_bytes(shard(range(100, 113)))               # 3 windows
    data = train.Tokens([str(tmp_path / name) for name in ("a.bin", "b.bin")], 4, 200)
    assert len(data) == 5 and data.tokens == 23
    assert [(x.tolist(), y.tolist()) for x, y in (data[i] for i in range(5))] == [
        (list(range(s, s + 4)), list(range(s + 1, s + 5))) for s in (0, 4, 100, 104, 108)]
    x, y = data.__getitems__([4, 0])
    assert x.dtype == torch.int64 and x.tolist() == [[108, 109, 110, 111], [0, 1, 2, 3]] and y[0, -1] == 112


@settings(max_examples=200, deadline=None)
@given(n=st.integers(1, 40), ranks=st.integers(1, 6), seed=st.integers(0, 5), consumed=st.integers(0, 100))
def test_order(n, ranks, seed, consumed):
    """A window seen twice or never in an epoch, by two ranks, or in another step when the number of ranks changes."""
    def order(rank, size, consumed=0):
        return iter(train.Order(range(n), SimpleNamespace(rank=rank, size=size), seed, consumed))
    line = list(itertools.islice(order(0, 1), 4 * n + 200))
    for epoch in range(3):
        torchs = DistributedSampler(range(n), 1, 0, seed=seed)
        torchs.set_epoch(epoch)
        assert line[epoch * n:(epoch + 1) * n] == list(torchs) and sorted(torchs) == list(range(n))
    whole = n // ranks * ranks                                             # beyond it, torch's repeats some windows
    for rank in range(ranks):
        torchs = list(DistributedSampler(range(n), ranks, rank, seed=seed))
        assert list(itertools.islice(order(rank, ranks), whole // ranks)) == torchs[:whole // ranks]
    each = [list(itertools.islice(order(rank, ranks, consumed - consumed % ranks), 10)) for rank in range(ranks)]
    assert [i for step in zip(*each, strict=True) for i in step] == line[consumed - consumed % ranks:][:10 * ranks]
    assert list(itertools.islice(order(0, 1, consumed), 10)) == line[consumed:consumed + 10]


def test_data_larger_than_memory_is_mapped(tmp_path):
    """Token files read into memory."""
    with open(tmp_path / "train.bin", "wb") as f:
        f.truncate(200 << 30)
    if os.stat(f.name).st_blocks:
        pytest.skip("this file system has no sparse files")
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.time()
    data = train.Tokens([f.name], 1024, 50)
    assert data.tokens == 100 << 30 and data[len(data) - 1][0].sum() == 0 and data.fingerprint()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000 and time.time() - began < 5


def test_prepare_leaves_other_files_alone(tmp_path, capsys):
    """A data set prepared over a folder that holds something else, which is then lost."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/input.txt").write_text(TEXT)
    code, _, err = here(capsys, "prepare", tmp_path / "mine/input.txt", f"--name={tmp_path}/mine")
    assert code == 1 and (tmp_path / "mine/input.txt").read_text() == TEXT and os.listdir(tmp_path) == ["mine"]
    one_line(err, "input.txt", "--name")
    for _ in range(2):                                                     # but its own files are replaced
        argv = [tmp_path / "mine/input.txt", f"--name={tmp_path}/other", "--tokenizer=char"]
        assert here(capsys, "prepare", *argv)[0] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Training


def at_step(step, number, rank=None):
    """To be called in a process before train.main: it sends itself a signal while it computes `step`."""
    formula, first = train.learning_rate, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"

    def learning_rate(run, done):
        if first and done + 1 == step and rank in (None, os.environ.get("RANK")):
            os.kill(os.getpid(), number)
        return formula(run, done)
    train.learning_rate = learning_rate


@pytest.fixture(scope="session")
def straight(data, tmp_path_factory):
    """whole: a run with dropout, across an epoch's end. cut: the same, killed two steps after its first checkpoint."""
    folder, how = tmp_path_factory.mktemp("straight"), dict(dataset=data, dropout=0.1)
    run("train", *flags(out_dir=folder / "whole", **how))
    run("train", *flags(out_dir=folder / "cut", **how), before=partial(at_step, 5, signal.SIGKILL), code=-9)
    return folder


def resume(straight, out, *argv, **how):
    shutil.copytree(straight / "cut", out)
    return run("train", *flags(out_dir=out), "--init_from=resume", *argv, **how)


def test_learning_rate():
    """A schedule other than nanoGPT's, or off by one step."""
    made = dict(learning_rate=3.0, min_lr=1.0, warmup_iters=4, lr_decay_iters=10, max_iters=20)

    def nanogpts(it):
        if it < 4:
            return 3.0 * (it + 1) / (4 + 1)
        if it > 10:
            return 1.0
        return 1.0 + 0.5 * (1.0 + math.cos(math.pi * (it - 4) / (10 - 4))) * (3.0 - 1.0)
    for it in range(20):
        assert train.learning_rate(train.Run(**made), it) == pytest.approx(nanogpts(it), rel=1e-12)
    assert train.learning_rate(train.Run(**made), 7) == pytest.approx(2.0)
    default = train.Run(learning_rate=3.0, warmup_iters=0, max_iters=50)
    assert train.learning_rate(default, 0) == 3.0 and train.learning_rate(default, 50) == pytest.approx(0.3)
    assert train.learning_rate(train.Run(learning_rate=3.0, decay_lr=False), 1) == 3.0


def test_equals_a_loop_written_by_hand(data, tmp_path):
    """A step or evaluation that is not as documented: decay on biases, a wrong mean, clip, rate, order or window."""
    changes = dict(weight_decay=0.5, grad_clip=0.5, max_iters=10, eval_interval=5, eval_iters=100)
    run("train", *flags(dataset=data, out_dir=tmp_path / "out", **changes))
    splits = {split: train.Tokens([f"{data}/{split}.bin"], 32, 50) for split in ("train", "val")}
    model = GPT2(GPT2Config(block_size=32, vocab_size=12, n_layer=2, n_head=2, n_embd=32), seed=1337)
    named = dict(model.named_parameters())
    no_decay = [name for name in named if name.endswith("bias") or "ln_" in name]
    optimizer = torch.optim.AdamW([{"params": [named[name] for name in no_decay], "weight_decay": 0.0},
                                   {"params": [named[name] for name in named.keys() - no_decay], "weight_decay": 0.5}],
                                  betas=(0.9, 0.99), foreach=False, fused=False)
    order, rows = [], []
    for epoch in range(2):
        sampler = DistributedSampler(splits["train"], 1, 0, seed=1337)
        sampler.set_epoch(epoch)
        order += list(sampler)
    for step in range(11):
        if step % 5 == 0:
            rows.append([step, *(np.mean([model(*split.__getitems__([i]))[1].item() for i in range(len(split))])
                                 for split in splits.values())])
        if step == 10:
            break
        lr = 2e-3 * (step + 1) / 3 if step < 2 else 2e-4 + 9e-4 * (1 + math.cos(math.pi * (step - 2) / 8))
        for group in optimizer.param_groups:
            group["lr"] = lr
        _, loss = model(*splits["train"].__getitems__(order[8 * step:8 * step + 8]))   # the four batches of two as one
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        rows.append([step + 1, loss.item(), lr, norm.item()])
    for record, row in zip(curve(tmp_path / "out"), rows, strict=True):
        assert [v for k, v in record.items() if k != "tokens"] == pytest.approx(row, rel=2e-5)


def test_evaluation_changes_nothing(data, straight, tmp_path):
    """An evaluation that draws random numbers, or data, that the training then misses."""
    run("train", *flags(dataset=data, dropout=0.1, out_dir=tmp_path / "out", eval_interval=100))
    a, b = ([r for r in curve(out) if "loss" in r] for out in (straight / "whole", tmp_path / "out"))
    assert len(a) == 9 and a == b


def test_what_a_run_leaves(straight, tmp_path, capsys):
    """A step that is missing or doubled in metrics.jsonl, a picture no browser opens, flags taken for others."""
    records = train.read_metrics(str(straight / "whole"))
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 10))
    assert [r["step"] for r in records if "val_loss" in r] == [0, 3, 6, 9]
    assert all(r["tokens_per_second"] > 0 for r in records if "loss" in r)
    shutil.copytree(straight / "whole", odd := tmp_path / "a<b>&\"c'")
    code, out, _ = here(capsys, "train", f"--plot={odd},{straight / 'whole'}")
    assert code == 0 and out.strip() == str(odd / "loss.svg")
    for path in (odd, straight / "whole"):
        assert xml.etree.ElementTree.parse(path / "loss.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_eval_only_and_best_only(straight, tmp_path):
    """--eval_only that trains or writes; --always_save_checkpoint=False that keeps a model which is not the best."""
    out = resume(straight, tmp_path / "a", "--eval_only").out
    assert f"{next(r['val_loss'] for r in curve(tmp_path / 'a') if r['step'] == 3 and 'val_loss' in r):.4f}" in out
    assert curve(tmp_path / "a") == curve(straight / "cut")
    resume(straight, tmp_path / "b", "--always_save_checkpoint=False", "--learning_rate=1", "--min_lr=1")
    assert len(curve(tmp_path / "b")) == 13 and train.load_state(str(tmp_path / "b"))["step"] == 3


@pytest.mark.parametrize("eval_interval", [100, 1])                        # the step fails, or the evaluation after it
def test_stops_where_the_loss_is_not_finite(straight, tmp_path, eval_interval):
    """Training on for hours after the loss is nan, or saving such weights over good ones."""
    changes = ["--learning_rate=1e38", "--grad_clip=0", f"--eval_interval={eval_interval}"]
    err = resume(straight, tmp_path / "out", *changes, code=1).err
    one_line(err, f"step {4 if eval_interval == 1 else 5} is", "e+37: stopped", "step 3", f"--out_dir={tmp_path}/out")
    assert contents(tmp_path / "out") == contents(straight / "cut")
    assert all(math.isfinite(v) for r in curve(tmp_path / "out") for v in r.values())


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(data, straight, tmp_path, number, code):
    """Work lost at Ctrl-C or when a cluster takes the machine back."""
    out = tmp_path / "a folder"
    done = run("train", *flags(dataset=data, dropout=0.1, out_dir=out), before=partial(at_step, 5, number), code=code)
    assert "stopped at step 5; the checkpoint in" in done.out and not done.err
    assert done.out.splitlines()[-1].strip() == f"python train.py --init_from=resume --out_dir='{out}'"
    assert len(curve(out)) == 2 + 5 and train.load_state(str(out))["step"] == 5
    run("train", "--init_from=resume", f"--out_dir={out}", "--device=cpu")
    same_run(out, straight / "whole")


def test_dropout_differs_per_rank_and_repeats_per_seed(tmp_path):
    """All ranks with the same dropout mask, which halves its worth; or a run that cannot be repeated."""
    write_set(tmp_path / "set", *["abcdefgh" * 50] * 2)                    # all windows are equal

    def first_loss(name, ranks, dropout=0.5, seed=1):
        how = dict(max_iters=1, batch_size=1, gradient_accumulation_steps=ranks or 1, dropout=dropout, seed=seed)
        run("train", *flags(dataset=tmp_path / "set", out_dir=tmp_path / name, **how), ranks=ranks)
        return next(r["loss"] for r in curve(tmp_path / name) if "loss" in r)
    assert first_loss("a", 0, dropout=0) == pytest.approx(first_loss("b", 2, dropout=0), rel=1e-6)
    assert first_loss("c", 2) == first_loss("d", 2) != first_loss("e", 2, seed=2)
    assert abs(first_loss("f", 0) - first_loss("c", 2)) > 1e-3             # rank 0 alone has the mask of rank 0


# ---------------------------------------------------------------------------------------------------------------------
# Distributed


@pytest.fixture(scope="session")
def alone(data, tmp_path_factory):
    """Runs of one process, dropout off: plain GPT-2 and all three flags."""
    folder = tmp_path_factory.mktemp("alone")
    for name, changes in {"plain": {}, "all": ALL}.items():
        run("train", *flags(dataset=data, out_dir=folder / name, **changes))
    return folder


@pytest.mark.parametrize("fsdp", [False, True])
@pytest.mark.parametrize("name, changes", [("plain", {}), ("all", ALL)])
def test_two_processes_train_as_one(data, alone, tmp_path, name, changes, fsdp):
    """Gradients summed instead of averaged, a norm of one shard only, data or evaluation that differ with the mode."""
    run("train", *flags(dataset=data, out_dir=tmp_path / "out", **changes), *["--fsdp"] * fsdp, ranks=2)
    agree(tmp_path / "out", alone / name)


@pytest.mark.slow
@pytest.mark.parametrize("name, changes", [("plain", {}), ("all", ALL)])
def test_all_modes_over_50_steps(data, tmp_path, name, changes):
    """A difference between the modes that grows."""
    how = dict(dataset=data, max_iters=50, eval_interval=1, gradient_accumulation_steps=8, batch_size=1, **changes)
    run("train", *flags(out_dir=tmp_path / "1", **how))
    for mode, ranks in itertools.product(("ddp", "fsdp"), (2, 4)):
        run("train", *flags(out_dir=tmp_path / f"{mode}{ranks}", **how), *["--fsdp"] * (mode == "fsdp"), ranks=ranks)
        print(f"{name}, {mode} on {ranks}: {agree(tmp_path / f'{mode}{ranks}', tmp_path / '1'):.1e} at 50 steps")


def torchrun(*argv, hook="", nproc=2, options=("--standalone",), tmp):
    """Starts torchrun on train.py, in each process of which `hook` is run first."""
    script = HERE / "train.py"
    if hook:
        script = tmp / "train.py"
        script.write_text(f"import signal, sys\nsys.path.insert(0, {str(HERE)!r})\nimport train\n"
                          f"import {__name__}\n{__name__}.{hook}\ntrain.guarded(train.main)\n")
    command = [sys.executable, "-m", "torch.distributed.run", *options, f"--nproc_per_node={nproc}", script, *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp)


def test_torchrun(data, alone, tmp_path):
    """The card's third command, as it is typed."""
    process = torchrun(*flags(dataset=data, out_dir=tmp_path / "out"), "--fsdp", tmp=tmp_path)
    out, _ = process.communicate(timeout=90)
    assert process.returncode == 0 and "fsdp: torchrun started 2 processes" in out and "Warning" not in out, out
    agree(tmp_path / "out", alone / "plain")


@pytest.mark.parametrize("first, then", [(["--fsdp"], ([], 0)), ([], (["--fsdp"], 2)), (["--fsdp"], ([], 2))])
def test_checkpoints_cross_modes(data, alone, tmp_path, first, then):
    """A checkpoint that only the mode which wrote it can read; a SIGTERM to one rank that the others do not hear of."""
    stop = partial(at_step, 5, signal.SIGTERM, "1")
    run("train", *flags(dataset=data, out_dir=tmp_path / "out"), *first, ranks=2, before=stop, code=143)
    run("train", *flags(out_dir=tmp_path / "out"), "--init_from=resume", *then[0], ranks=then[1])
    agree(tmp_path / "out", alone / "plain")


def weigh(folder):
    """Writes down, after a step, the bytes of this process's weights, gradients and optimizer state."""
    def hook(optimizer, *_):
        held = [t for g in optimizer.param_groups for p in g["params"] for t in (p, p.grad, *optimizer.state[p].values())]
        local = (t.to_local() if hasattr(t, "to_local") else t for t in held)
        pathlib.Path(folder, os.environ["RANK"]).write_text(str(sum(t.numel() * t.element_size() for t in local)))
    sys.modules["torch.optim.optimizer"].register_optimizer_step_post_hook(hook)


@pytest.mark.parametrize("ranks", [2, 4])
def test_fsdp_holds_its_share(data, tmp_path, ranks):
    """Sharding that leaves whole weights, gradients or moments in every process."""
    shape = dict(n_embd=64, block_size=32, n_layer=2, n_head=2)
    argv = [*flags(dataset=data, out_dir=tmp_path / "out", max_iters=1, **shape), "--fsdp"]
    run("train", *argv, ranks=ranks, before=partial(weigh, tmp_path))
    whole = 16 * GPT2.from_pretrained(tmp_path / "out").num_parameters()
    shares = [int(pathlib.Path(tmp_path, str(rank)).read_text()) / whole for rank in range(ranks)]
    assert max(shares) <= 1.1 / ranks and sum(shares) >= 1, shares


def test_accumulation_that_does_not_divide(data, tmp_path):
    """A global batch silently made smaller, or an error without a number that works."""
    err = run("train", *flags(dataset=data, out_dir=tmp_path / "out"), ranks=3, code=2).err
    one_line(err, "--gradient_accumulation_steps=4", "among 3", "use 3 or 6", "--nproc_per_node=2")


def test_ranks_that_see_other_things(data, tmp_path):
    """Two machines with unlike data, or of which one has no checkpoint: a hang, or a model trained on a mixture."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        shutil.copytree(data, folder / "set")
    run("train", *flags(dataset="set", out_dir="out"), folder=folders[0])
    err = run("train", *flags(dataset="set", out_dir="out"), "--init_from=auto", ranks=2, folder=folders, code=1).err
    one_line(err, "a checkpoint in out", "process 1 of 2 has False, process 0 has True")
    tokens = read_bin(data, "train")
    tokens[::17] = 0
    tokens.tofile(folders[1] / "set/train.bin")
    err = run("train", *flags(dataset="set", out_dir=tmp_path / "out"), ranks=2, folder=folders, code=1).err
    one_line(err, "the data in set", "process 1 of 2 has", "process 0 has")
    assert not (tmp_path / "out").exists()


def named_data(folder):
    def stdlib(where):
        with open(os.path.join(folder, "calls"), "a") as f:
            f.write("prepared\n")
        time.sleep(0.5)
        write_set(where, TEXT[:800], TEXT[800:900])
    prepare.DATA = train.DATA = folder
    train.DATASETS["stdlib"] = stdlib


def test_ranks_prepare_data_once(tmp_path):
    """Four processes that write the same files at the same time."""
    run("train", *flags(max_iters=1, out_dir=tmp_path / "out"), ranks=4, before=partial(named_data, str(tmp_path)))
    assert (tmp_path / "calls").read_text() == "prepared\n" and not (tmp_path / "stdlib.part").exists()


@pytest.mark.slow
@pytest.mark.parametrize("mode", [[], ["--fsdp"]])
@pytest.mark.parametrize("hook", ["at_step(5, signal.SIGKILL, '2')", "fails_at_once('2')"])
def test_a_dead_rank_ends_the_run(data, tmp_path, mode, hook):
    """The other ranks wait for it for ever."""
    began = time.time()
    process = torchrun(*flags(dataset=data, out_dir=tmp_path / "out"), *mode, hook=hook, nproc=4, tmp=tmp_path)
    out, _ = process.communicate(timeout=120)
    assert process.returncode and re.search(r"rank\s*:\s*2 ", out), out
    print(f"{hook} {mode}: torchrun ended after {time.time() - began:.0f} s")
    assert time.time() - began < 60


def fails_at_once(rank):
    if os.environ["RANK"] == rank:
        raise RuntimeError("before the first collective")


def rendezvous():
    return ("--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--local_addr=127.0.0.1")


@pytest.mark.slow
@pytest.mark.parametrize("mode, nodes", [([], 1), (["--fsdp"], 1), ([], 2)])
def test_a_dead_rank_is_restarted(data, alone, tmp_path, monkeypatch, mode, nodes):
    """--max-restarts with --init_from=auto that begins anew, goes on from other numbers, or finds the dead in the store."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", str(nodes - 1))
    options = ("--max-restarts=2", *(rendezvous() if nodes == 2 else ["--standalone"]))
    argv = [*flags(dataset=data, out_dir=tmp_path / "out"), "--init_from=auto", *mode]
    how = dict(options=options, hook="at_step(5, signal.SIGKILL, '2')", nproc=4 // nodes, tmp=tmp_path)
    for agent in [torchrun(*argv, **how) for _ in range(nodes)]:
        out, _ = agent.communicate(timeout=180)
        assert agent.returncode == 0, out
    agree(tmp_path / "out", alone / "plain")


@pytest.mark.slow
@pytest.mark.parametrize("mode", [[], ["--fsdp"]])
def test_two_nodes(data, alone, tmp_path, mode):
    """What only shows with two torchrun agents: ranks and local ranks taken for each other."""
    options, argv = rendezvous(), [*flags(dataset=data, out_dir=tmp_path / "out"), *mode]
    for agent in [torchrun(*argv, options=options, tmp=tmp_path) for _ in range(2)]:
        out, _ = agent.communicate(timeout=180)
        assert agent.returncode == 0, out
    agree(tmp_path / "out", alone / "plain")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of a run


@pytest.mark.parametrize("mode, ranks", [([], 0), ([], 2), (["--fsdp"], 2)])
def test_resume_to_the_bit(data, tmp_path, mode, ranks):
    """A resume that loses the moments, the place in the data, dropout's stream or the schedule, or doubles a step."""
    def go(out, *argv, **how):
        run("train", *flags(dataset=data, dropout=0.1, out_dir=tmp_path / out), *mode, *argv, ranks=ranks, **how)
    go("whole")
    for step in (5, 8):                                                    # in the first epoch and in the second
        go("cut", "--init_from=auto", before=partial(at_step, step, signal.SIGKILL), code=-9)
    go("cut", "--init_from=auto")
    same_run(tmp_path / "cut", tmp_path / "whole")


def test_transformers_opens_it(data, straight):
    """A checkpoint that Hugging Face's reader refuses, or reads as another model than the one that was evaluated."""
    from transformers import GPT2LMHeadModel
    x, y = train.Tokens([f"{data}/val.bin"], 32, 50).__getitems__(range(5))
    with torch.no_grad():
        theirs = GPT2LMHeadModel.from_pretrained(straight / "whole").eval()(x).logits
        ours, _ = GPT2.from_pretrained(str(straight / "whole"))(x)
    assert (theirs - ours).abs().max() < 1e-4 * theirs.std()
    loss = torch.nn.functional.cross_entropy(theirs.flatten(0, 1), y.flatten()).item()
    assert curve(straight / "whole")[-1]["val_loss"] == pytest.approx(loss, rel=2e-5)


class Watched:
    """A file whose writes are watched. The one at which something happens gets only half of its bytes out."""

    def __init__(self, f, due):
        self.f, self.due = f, due

    def __getattr__(self, name):
        return getattr(self.f, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.f.close()

    def write(self, data):
        def half():
            self.f.write(data[:len(data) // 2])
            self.f.flush()
        self.due("write", half)
        return self.f.write(data)


def at_disk_call(n, act, calls=None):
    """To be called in a process before train.main: the n-th time that the save of step 6 turns to the disk, it is
    killed ("kill") or finds the disk full ("full"). `calls`: a file to write the calls' names to."""
    import model
    names, on = [], []

    def due(name, first=lambda: None):
        if on:
            names.append(name)
            if len(names) == n:
                first()
                if act == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(28, "No space left on device")

    def watch(name, function):
        def watched(*args, **how):
            due(name)
            return function(*args, **how)
        setattr(os, name, watched)
    for name in ("fsync", "rename", "replace", "link", "remove", "rmdir", "makedirs"):
        watch(name, getattr(os, name))
    train.open = model.open = lambda *args, **how: Watched(open(*args, **how), due) if on else open(*args, **how)
    whole_save = train.save

    def save(*args):
        on.extend([1] * (args[-1]["step"] == 6))
        whole_save(*args)
        on.clear()
        if calls:
            pathlib.Path(calls).write_text(" ".join(names))
    train.save = save


@pytest.mark.parametrize("act", ["kill", "full"])
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_save_loses_anything(straight, tmp_path, act, every):
    """A moment in a save at which a kill or a full disk leaves no checkpoint, or files of two steps."""
    resume(straight, tmp_path / "counted", before=partial(at_disk_call, 0, "none", tmp_path / "calls"))
    same_run(tmp_path / "counted", straight / "whole")
    names = (tmp_path / "calls").read_text().split()
    done = names.index("rename")                                           # which completes the save
    numbers = list(range(len(names)) if every else (1, done // 2, done - 1, done, done + 1, done + 4, len(names) - 1))
    for first in range(0, len(numbers), 8):
        outs, started = {i: tmp_path / str(i) for i in numbers[first:first + 8]}, []
        for i, out in outs.items():
            shutil.copytree(straight / "cut", out)
            how = partial(at_disk_call, i + 1, act)
            started.append(start("train", *flags(out_dir=out), "--init_from=resume", before=how))
        for i, processes in zip(outs, started, strict=True):
            done = finish(processes)
            if act == "kill":
                assert done.codes == [-9], (i, names[i], done.err)
            elif names[i] != "link":                                       # where there are no links, files are moved
                assert done.codes == [1], (i, names[i], done.err)
                one_line(done.err, "step 6 cannot be saved in", "No space left" if names[i] != "write" else "")
        started = [start("train", *flags(out_dir=out), "--init_from=auto") for out in outs.values()]
        for i, processes in zip(outs, started, strict=True):
            done = finish(processes)
            assert done.codes == [0], (i, names[i], done.err)
            same_run(outs[i], straight / "whole")
            shutil.rmtree(outs[i])
    print(f"{act}: {len(numbers)} moments in a save of {len(names)} calls")


SAVING = ["checkpoint of step 6 cannot be saved in", "the one before it is untouched"]


@pytest.mark.parametrize("size, words", [(50_000, SAVING), (150_000, SAVING), (900, ["metrics.jsonl cannot be written"])])
def test_disk_full(straight, tmp_path, size, words):
    """A traceback, or the good checkpoint lost, where the weights, the state or the metrics cannot grow any further."""
    limit = partial(files_up_to, size)
    done = resume(straight, tmp_path / "out", before=limit, code=1)
    one_line(done.err, *words)
    assert contents(tmp_path / "out") == contents(straight / "cut") and not (tmp_path / "out/.saving").exists()
    run("train", *flags(out_dir=tmp_path / "out"), "--init_from=auto")
    same_run(tmp_path / "out", straight / "whole")


def files_up_to(size):
    if size < 2000:                                                        # less than what is printed, into a file
        sys.stdout = io.StringIO()
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


class Malicious:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("damage, words", [
    ("two steps", "the weights are of step 6, training_state.pt is of step 9"), ("no weights", "No such file"),
    ("short model.safetensors", "cut short"), ("short training_state.pt", "training_state.pt is damaged"),
    ("short meta.json", "meta.json is damaged"), ("short config.json", "config.json"),
    ("pickle", "training_state.pt is damaged"), ("torch.save", "training_state.pt is damaged"),
    ("empty", "training_state.pt is damaged"), ("optimizer", "training_state.pt has no optimizer state")])
def test_damaged_checkpoints(straight, tmp_path, capsys, damage, words):
    """Training on from a mixture, a traceback, or code in a pickle that is run."""
    shutil.copytree(straight / "whole", out := tmp_path / "out")
    state = out / "training_state.pt"
    if damage == "two steps":
        shutil.copy(out / "previous/model.safetensors", out)
    elif damage.startswith("short "):
        path = out / damage[6:]
        path.write_bytes(path.read_bytes()[:-50])
    elif damage == "no weights":
        (out / "model.safetensors").unlink()
    elif damage == "pickle":
        state.write_bytes(pickle.dumps(Malicious(str(tmp_path / "ran"))))
    elif damage == "torch.save":
        torch.save({"step": 9, "run": Malicious(str(tmp_path / "ran"))}, state)
    elif damage == "optimizer":
        saved = torch.load(state, weights_only=True)
        del saved["optimizer"]["transformer.wte.weight"]["exp_avg"]
        torch.save(saved, state)
    else:
        state.write_bytes(b"")
    for init_from in ("resume", "auto"):
        argv = [f"--out_dir={out}", f"--init_from={init_from}", "--max_iters=20", "--device=cpu"]
        code, _, err = here(capsys, "train", *argv)
        assert code == 1 and not (tmp_path / "ran").exists()
        one_line(err, words)
        assert f"is in {out}/previous" in err or damage in ("short meta.json", "short config.json", "optimizer")


def test_a_new_run_does_not_destroy_the_old_one(data, straight, tmp_path):
    """`python train.py` typed once too often over a finished run."""
    out = tmp_path / "out"
    shutil.copytree(straight / "whole", out)
    done = run("train", *flags(dataset=data, out_dir=out, seed=2))
    assert f"moved to {out}/previous_run" in done.out
    same_run(out / "previous_run", straight / "whole")
    assert curve(out)[-1]["step"] == 9 and curve(out) != curve(straight / "whole")
    assert "moved to" not in run("train", *flags(out_dir=out), "--init_from=resume", "--max_iters=10").out


@pytest.mark.slow
def test_100_kills(data, tmp_path):
    """An instant at which kill -9 loses something, inside a save or outside."""
    chance, inside, killed = random.Random(0), 0, 0
    for mode, ranks, kills in (([], 0, 80), ([], 2, 10), (["--fsdp"], 2, 10)):
        def go(out, mode=mode, ranks=ranks, **how):
            argv = [*flags(dataset=data, dropout=0.1, out_dir=out), "--init_from=auto", *mode]
            return start("train", *argv, ranks=ranks, **how)
        began = time.time()
        finish(go(whole := tmp_path / f"whole{len(mode)}{ranks}", before=slow_disk))
        seconds = time.time() - began
        for kill in range(kills):
            out = tmp_path / f"{len(mode)}{ranks}{kill}"
            processes = go(out, before=slow_disk)
            if kill % 2:                                                   # at any time
                time.sleep(chance.uniform(0, seconds))
            else:                                                          # in a save
                nth, seen = chance.randrange(3), False
                while any(p.is_alive() for p in processes) and nth >= 0:
                    now = (out / ".saving").exists() or (out / ".saved").exists()
                    nth, seen = nth - (now and not seen), now
                    time.sleep(0.001)
                time.sleep(chance.uniform(0, 0.25))
            killed += any(p.is_alive() for p in processes)
            for p in processes:
                p.kill()
            for p in processes:
                p.join()
            inside += (out / ".saving").exists() or (out / ".saved").exists()  # left by an unfinished save
            done = finish(go(out))
            assert set(done.codes) == {0}, done.err
            same_run(out, whole)
            shutil.rmtree(out)
    print(f"{killed} kills, {inside} of them inside a save")
    assert killed >= 90 and inside >= 30


def slow_disk():
    for name in ("fsync", "rename", "replace", "link", "rmdir"):
        def slowly(call, *args, **how):
            time.sleep(0.02)
            return call(*args, **how)
        setattr(os, name, partial(slowly, getattr(os, name)))


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


SAMPLED = r"(?s)(.*)\n([\d,]+) tokens in [\d.]+ s: [\d,.]+ tokens per second on cpu, float32\n"


def sampled(capsys, out, *argv):
    """The text that sample.py prints, and the number of tokens on its last line."""
    code, text, err = here(capsys, "sample", f"--out_dir={out}", "--device=cpu", *argv)
    assert code == 0 and not err, err
    return re.fullmatch(SAMPLED, text).groups()


def generated(out, prompt, *size, **how):
    t, model = prepare.Tokenizer.load(out), GPT2.from_pretrained(str(out))
    idx = torch.from_numpy(t.encode(prompt).astype(np.int64)).repeat(size[0], 1)
    return [t.decode(row.tolist()) for row in model.generate(idx, size[1], **how)]


def test_sample_equals_generate(straight, tmp_path, capsys):
    """Text by another tokenizer than the checkpoint's, tokens lost or doubled, a seed or flag without effect."""
    shutil.copytree(straight / "whole", out := tmp_path / "alone")         # no data set in sight
    greedy = sampled(capsys, out, "--start=ab c", "--max_new_tokens=60", "--temperature=0")
    assert greedy == (*generated(out, "ab c", 1, 60, temperature=0), "60")
    how = dict(temperature=0.7, top_k=5, top_p=0.9)
    expected = generated(out, "ab c", 3, 9, generator=torch.Generator().manual_seed(7), **how)
    (tmp_path / "prompt").write_text("ab c")
    argv = [f"--start=FILE:{tmp_path}/prompt", "--num_samples=3", "--max_new_tokens=9", "--seed=7"]
    texts, count = sampled(capsys, out, *argv, *(f"--{name}={value}" for name, value in how.items()))
    assert texts + "\n" == "".join(text + "\n" + "-" * 15 + "\n" for text in expected) and count == "27"
    assert len({sampled(capsys, out, "--start=a", f"--seed={seed}") for seed in (1, 1, 2)}) == 2


@needs_bpe
def test_streams_whole_characters(tmp_path, capsys, monkeypatch):
    """Half a character printed as �, or nothing printed before the end."""
    GPT2(GPT2Config(n_layer=1, n_head=1, n_embd=8, block_size=16)).save_pretrained(tmp_path / "m")
    text, pieces = "naïve 日本語 🎉🏳️‍🌈 Ελλάδα!", []
    tokens = prepare.Tokenizer("gpt2").encode(text).tolist()
    monkeypatch.setattr(GPT2, "stream", lambda self, idx, n, **how: (torch.tensor([i]) for i in tokens))
    monkeypatch.setattr(sample, "print", lambda *a, **how: pieces.append(a[0]), raising=False)
    assert here(capsys, "sample", f"--init_from={tmp_path}/m", "--start=ö", "--device=cpu")[0] == 0
    assert "".join(pieces[:-1]) == "ö" + text and "�" not in "".join(pieces) and len([p for p in pieces if p]) > 10


@pytest.mark.parametrize("streaming", [True, False])
def test_stop_at_eot(tmp_path, capsys, monkeypatch, streaming):
    """Text after the end of the document, the token itself in it, or one text of a batch that stops the others."""
    GPT2(GPT2Config(n_layer=1, n_head=1, n_embd=8, block_size=16, vocab_size=10)).save_pretrained(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps(prepare.Tokenizer("char", "abcdefg", 7).to_json()))
    columns = [[0, 1], [7, 2], [7, 9], [7, 7]]                             # 9: an id that the tokenizer lacks

    def stream(self, idx, n, stop_token, **how):
        assert stop_token == 7
        return (torch.tensor(column[:len(idx)]) for column in columns)
    monkeypatch.setattr(GPT2, "stream", stream)
    text, count = sampled(capsys, tmp_path, "--start=g", "--stop_at_eot", f"--num_samples={2 - streaming}")
    line = "-" * 15
    assert (text, count) == (("ga", "1") if streaming else (f"ga\n{line}\ngbc\n{line}", "4"))


def interrupted(after):
    stream = GPT2.stream

    def watched(*args, **how):
        for i, token in enumerate(stream(*args, **how)):
            if i == after:
                os.kill(os.getpid(), signal.SIGINT)
            yield token
    GPT2.stream = watched


def test_ctrl_c_while_sampling(straight):
    """A traceback for a person who has read enough."""
    argv = [f"--out_dir={straight / 'whole'}", "--start=a", "--device=cpu"]
    done = run("sample", *argv, before=partial(interrupted, 9), code=130)
    assert done.err == "" and done.out.startswith("a") and "tokens per second" not in done.out


def test_as_typed(straight, tmp_path):
    """What works only in the tests' own process: a piped prompt, a reader that leaves, a run from another folder."""
    script, out = f"{sys.executable} {HERE}/", f"--out_dir={straight / 'whole'} --device=cpu"
    lines = [f"printf 'ab c' | {script}sample.py {out} --max_new_tokens=5", f"{script}sample.py {out} | head -c 9",
             f"{script}train.py --out_dri=x", f"{script}data/prepare.py"]
    how = dict(cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes = [subprocess.Popen(["bash", "-c", line], **how) for line in lines]
    (piped, no_err), (begun, no_err2), *wrong = [p.communicate(timeout=120) for p in processes]
    assert re.fullmatch(SAMPLED, piped)[1].startswith("ab c") and len(re.fullmatch(SAMPLED, piped)[1]) == 9
    assert begun[0] == "\n" and len(begun) == 9 and no_err == no_err2 == ""
    one_line(wrong[0][1], "did you mean --out_dir")
    one_line(wrong[1][1], "say what to prepare")
    assert [p.returncode for p in processes[2:]] == [2, 2]
    assert not os.listdir(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


@pytest.fixture(scope="session")
def bad(data, straight, tmp_path_factory):
    """Files and folders of which each has something wrong."""
    tmp = tmp_path_factory.mktemp("bad")
    for name in ("empty", "nanogpt", "half", "wide", "pickle", "short", "bpe", "nometa"):
        (tmp / name).mkdir()
    tokens = read_bin(data, "train")
    for name in ("nanogpt", "half", "wide"):
        for split in ("train", "val"):
            shutil.copy(f"{data}/{split}.bin", tmp / name)
    (tmp / "nanogpt/meta.pkl").write_bytes(b"")
    shutil.copy(f"{data}/meta.json", tmp / "half")
    tokens[:-100].tofile(tmp / "half/train.bin")
    shutil.copy(f"{data}/meta.json", tmp / "wide")
    np.where(np.arange(len(tokens)) == 5, 999, tokens).astype("<u2").tofile(tmp / "wide/train.bin")
    for name in ("pickle", "short", "bpe", "nometa"):
        for file in ("config.json", "model.safetensors", "meta.json"):
            shutil.copy(straight / "whole" / file, tmp / name)
    (tmp / "pickle/model.safetensors").write_bytes(pickle.dumps(list(range(9))))
    (tmp / "short/model.safetensors").write_bytes((tmp / "short/model.safetensors").read_bytes()[:-9])
    (tmp / "bpe/meta.json").write_text('{"tokenizer": "gpt2"}')
    (tmp / "nometa/meta.json").unlink()
    packed = gzip.compress(random.Random(0).randbytes(99999).hex().encode())
    for name, content in {"file": b"", "text": TEXT.encode(), "late": b"a" * 99999 + b"\xff", "cut.gz": packed[:-9],
                          "wrong.gz": packed[:70000] + bytes(99) + packed[70099:],
                          "latin.jsonl": b'{"text": "caf\xe9"}', "x.jsonl": b'{"text": "a"}\n{"txt": "b"}\n'}.items():
        (tmp / name).write_bytes(content)
    return tmp


NANOGPT = """out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint init_from dataset
    gradient_accumulation_steps batch_size block_size n_layer n_head n_embd dropout bias learning_rate max_iters
    weight_decay beta1 beta2 grad_clip decay_lr warmup_iters lr_decay_iters min_lr
    backend device dtype compile""".split()


def test_flags(capsys):
    """A field without its flag, a flag without help, a boolean that cannot be switched off."""
    for script, names in dict(train=[*train.RUN, *train.SHAPE, *NANOGPT], sample=[*sample.OPTIONS, *sample.CHANGES],
                              prepare=["name", "tokenizer", "val_frac", "field", "source"]).items():
        code, out, err = here(capsys, script, "--help")
        assert code == 0 and not err
        for name in names:
            assert re.search(rf"^  --{name} .*\n?.*\w", out, re.MULTILINE), name
    options = train.options()
    for name in (name for name, (kind, _, _) in options.items() if kind is bool):
        for flag in f"--{name}", f"--{name}=True", f"--{name}=False", f"--no-{name}":
            on = "False" not in flag and "--no-" not in flag
            assert prepare.command_line("", options, argv=[flag]) == ({name: on}, [])


BAD = """
train    2  --n_layr=2                                             did you mean --n_layer?
train    2  --zzz                                                  there is no flag --zzz
train    2  --n_layer=two                                          --n_layer: invalid int value: 'two'
train    2  --rope=maybe                                           neither True nor False
train    2  config/train_gpt2.py                                   config files are not run
train    2  --n_embd=30 --n_head=4                                 n_embd=30 is not divisible by n_head=4: try n_embd=32
train    2  --gqa --n_head=4 --n_kv_head=3                         not divisible by n_kv_head=3: try one of [1, 2, 4]
train    2  --rope --n_embd=30                                     must be even, so try n_embd=32
train    2  --n_kv_head=1                                          add --gqa
train    2  --window_size=8                                        add --sliding_window
train    2  --rope_theta=5                                         add --rope
train    2  --sliding_window --window_size=0                       window_size=0
train    2  --sliding_window --window_size=64                      at most 32
train    2  --dropout=nan                                          dropout=nan
train    2  --vocab_size=5                                         too small
train    2  --fsdp                                                 torchrun --standalone --nproc_per_node=2 train.py
train    2  --backend=gloo                                         --backend has no effect
train    2  --device=gpu                                           use auto, cpu, cuda
train    1  --device=cuda:99                                       GPUs
train    2  --dtype=int8                                           float32, bfloat16
train    2  --dtype=float16                                        use bfloat16 or float32
train    2  --compile=maybe                                        auto, True or False
train    2  --learning_rate=nan                                    --learning_rate=nan
train    2  --max_iters=-1                                         --max_iters=-1
train    2  --batch_size=0                                         --batch_size=0
train    2  --beta2=1.0                                            --beta2=1.0
train    2  --seed=-1                                              --seed=-1
train    2  --seed=18446744073709551616                            --seed=18446744073709551616
train    2  --decay_lr=False                                       no effect without --decay_lr
train    1  --dataset=nowhere                                      python data/prepare.py PATH... --name=nowhere
train    1  --dataset={bad}/empty                                  no train.bin
train    1  --dataset={bad}/nanogpt                                meta.pkl, a pickle
train    1  --dataset={bad}/half                                   half written
train    1  --dataset={bad}/wide                                   token 999, beyond the vocabulary
train    1  --block_size=512                                       smaller --block_size
train    2  --init_from=gpt3                                       neither scratch, resume, auto
train    1  --init_from=resume                                     there is no checkpoint in
train    1  --init_from=gpt2                                       gpt2/resolve/main/config.json
train    2  --init_from={run} --n_head=4                           n_head=4 contradicts
train    2  --init_from=resume --out_dir={run} --n_layer=3         contradicts the checkpoint
train    2  --init_from=resume --out_dir={run} --dataset=stdlib    contradicts the checkpoint
train    2  --init_from=resume --out_dir={run} --dropout=2         dropout=2
train    1  --init_from={bad}/pickle                               could run code
train    1  --init_from={bad}/short                                cut short
train    1  --init_from={bad}/bpe                                  choose or prepare one with its tokenizer
train    1  --out_dir={bad}/file                                   file
train    1  --plot={bad}/empty                                     train first
sample   2  --strat=x                                              did you mean --start?
sample   2  --top_p=0.0                                            --top_p=0.0
sample   2  --top_k=-1                                             --top_k=-1
sample   2  --temperature=-1.0                                     --temperature=-1.0
sample   2  --num_samples=0                                        --num_samples=0
sample   2  --max_new_tokens=0                                     --max_new_tokens=0
sample   2  --dtype=int8                                           --dtype=int8
sample   2  --seed=18446744073709551616                            --seed=18446744073709551616
sample   2  --device=gpu                                           --device=gpu
sample   2  --device=cuda:99                                       --device=cuda:99
sample   2  --temperature=0 --top_k=5                              no effect at --temperature=0
sample   2  --stop_at_eot                                          no end-of-text
sample   2  --init_from=gpt3                                       neither resume
sample   1  --init_from=gpt2                                       gpt2/resolve/main/config.json
sample   1  --init_from={bad}/pickle                               could run code
sample   1  --init_from={bad}/short                                cut short
sample   1  --init_from={bad}/nometa                               meta.json is missing
sample   1  --out_dir={bad}/empty                                  no checkpoint in
sample   1  --block_size=99                                        the checkpoint's 32 positions
sample   1  --start=abZ                                            'Z' is not among the 12
sample   1  --start=FILE:{bad}/none                                none
sample   1  --start=FILE:{bad}/latin.jsonl                         latin.jsonl
prepare  2                                                         say what to prepare
prepare  2  shakespeare_chr                                        did you mean shakespeare_char?
prepare  2  {bad}/text                                             --name=NAME
prepare  2  {bad}/text --nam=x                                     did you mean --name?
prepare  2  {bad}/text --name=stdlib                               choose another
prepare  2  {bad}/text --name=x --val_frac=2                       between 0 and 1
prepare  2  {bad}/text --name=x --tokenizer=bpe                    gpt2 or char
prepare  2  {bad}/text --name=x --source={bad}/text                no effect on your own files
prepare  2  stdlib --tokenizer=char                                no effect on stdlib
prepare  2  shakespeare --source={bad}/none                        is not there
prepare  1  {bad}/none --name=x                                    neither a file
prepare  1  {bad}/file --name=x --tokenizer=char                   no text
prepare  1  {bad}/latin.jsonl --name=x                             no text
prepare  1  {bad}/late --name=x --tokenizer=char                   late cannot be read
prepare  1  {bad}/cut.gz --name=x --tokenizer=char                 cut.gz cannot be read
prepare  1  {bad}/wrong.gz --name=x --tokenizer=char               wrong.gz
prepare  1  {bad}/x.jsonl --name=x --tokenizer=char                x.jsonl, line 2: no JSON object with a text 'text'
prepare  1  {bad}/text --name=file --tokenizer=char                file
prepare  1  shakespeare_char                                       tinyshakespeare
prepare  1  {bad}/text --name=x                                    6d1cbeee0f20b3d9449abfede4726ed8212e3aee
""".strip().splitlines()


@pytest.mark.parametrize("script, code, argv, words", [(s[:9].strip(), int(s[9]), s[12:66].strip(), s[67:])
                                                        for s in BAD])
def test_bad_input(data, straight, tmp_path, bad, capsys, monkeypatch, script, code, argv, words):
    """A traceback, a wrong exit code, a message without a cure, or something left behind."""
    def files():
        return {path: path.stat().st_mtime_ns for path in bad.rglob("*") if path.is_file()}
    before, nobody = files(), "http://127.0.0.1:9"
    for name, value in dict(HF_ENDPOINT=nobody, HTTPS_PROXY=nobody, https_proxy=nobody, HF_HOME=tmp_path / "hub",
                            TIKTOKEN_CACHE_DIR=tmp_path / "bpe").items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(prepare, "gpt2_bpe", prepare.gpt2_bpe.__wrapped__)
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setattr(time, "sleep", lambda seconds: None)               # between attempts to download
    monkeypatch.setattr(prepare, "DATA", str(bad))
    monkeypatch.setattr(train, "DATA", str(bad))
    first = {"train": flags(dataset=data, out_dir=tmp_path / "out"), "prepare": [],
             "sample": [f"--out_dir={straight / 'whole'}", "--start=a"]}[script]
    got, _, err = here(capsys, script, *first, *argv.format(bad=bad, run=straight / "whole").split())
    one_line(err, words)
    assert got == code and err.startswith(script + ".py: ")
    assert files() == before and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# README


def readme_commands():
    """The lines of README.md's shell blocks, without comments; left out is what CI itself runs, and the two machines."""
    text = (HERE / "README.md").read_text()
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    return [line for line in lines if not re.match(r"pip |ruff |python -m pytest|torchrun --nnodes|python \.github/", line)]


@needs_bpe
def test_readme_commands(tmp_path):
    """A command in the README that does not run, with other values only where it would take long or need a network."""
    (tmp_path / "book.txt").write_text(TEXT)
    for name, tokenizer in (("chars", "char"), ("shakespeare", "gpt2")):
        prepare.own(str(tmp_path / name), [str(tmp_path / "book.txt")], tokenizer)
    GPT2(GPT2Config(n_layer=1, n_head=4, n_embd=32, block_size=32)).save_pretrained(tmp_path / "weights")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text(TEXT)
    ran = 0
    for line in readme_commands():
        command, _, piped = line.partition("|")
        words = shlex.split(piped or command, comments=True)
        prompt = shlex.split(command)[1] if piped else None
        ranks = int(re.search(r"--nproc_per_node=(\d+)", line)[1]) if words[0] == "torchrun" else 0
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        script, argv = pathlib.Path(words[at]).stem, words[at + 1:]
        if script == "model":
            continue                                                       # its output is tested above
        replaced = {"--init_from=gpt2": f"--init_from={tmp_path / 'weights'}", "--name=mine": f"--name={tmp_path / 'mine'}",
                    "--dataset=mine": f"--dataset={tmp_path / 'mine'}",
                    "--dataset=shakespeare_char": f"--dataset={tmp_path / 'chars'}",
                    "--dataset=shakespeare": f"--dataset={tmp_path / 'shakespeare'}", "--start=def ": "--start=ab"}
        argv = [replaced.get(word, word) for word in argv]
        joined = " ".join(argv)
        short = dict(max_iters=2, eval_interval=1, eval_iters=1, batch_size=1, gradient_accumulation_steps=4)
        if script == "train" and "--help" not in argv and "--plot" not in joined:
            if "init_from" not in joined:
                short |= dict(block_size=32, n_layer=1, n_head=4, n_embd=32)
                short |= {} if "dataset" in joined else dict(dataset=tmp_path / "chars")
            argv += [f"--{name}={value}" for name, value in short.items()]
            argv += [] if "init_from" not in joined or "resume" in joined else [f"--out_dir={tmp_path / 'tuned'}"]
            argv += ["--max_iters=3"] if "resume" in joined else []
        argv += ["--max_new_tokens=4"] if script == "sample" else []
        if prompt is not None:
            (tmp_path / "piped").write_text("a")
            argv += [f"--start=FILE:{tmp_path / 'piped'}"]
        run(script, *argv, folder=tmp_path, ranks=ranks)
        ran += 1
    assert ran >= 15
