"""
Make the tables of EVIDENCE.md. The runs are kept in out-evidence/, and a stopped one is resumed.

    python .github/evidence.py cost                # size and speed of the three changes
    python .github/evidence.py quality             # their losses: an hour on two cores
    python .github/evidence.py time NANOGPT        # time to nanoGPT's loss; a clone of nanoGPT

Needs `python data/prepare.py shakespeare_char`, and in the clone the same by nanoGPT's own script.
Cost: GPT-2 124M with random weights, in float32, where the variants take turns. Quality: nanoGPT's
CPU recipe (4 layers of 128, 12 samples of 64 characters, 1,000 steps), three seeds, with Muon and
with AdamW; losses over the whole validation text.
"""
import os
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from model import GPT2, GPT2Config  # noqa: E402

VARIANTS = {"plain": [], "rope": ["rope"], "gqa": ["gqa"], "sliding_window": ["sliding_window"],
            "all three": ["rope", "gqa", "sliding_window"]}
OPTIMIZERS = {"Muon": ["--learning_rate=6e-3"],
              "AdamW": ["--no-muon", "--learning_rate=1e-3", "--schedule=cosine"]}
SEEDS = (1, 2, 3)
RECIPE = ("--dataset=shakespeare_char --n_layer=4 --n_head=4 --n_embd=128 --block_size=64 "
          "--batch_size=12 --gradient_accumulation_steps=1 --warmup_iters=100 --sample_interval=0")
STEPS = "--max_iters=1000 --eval_interval=250 --eval_iters=50 --init_from=auto"
NANOGPT = ("config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 "
           "--log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 "
           "--max_iters=2000 --lr_decay_iters=2000 --dropout=0.0")
FAST = ("--dataset=shakespeare_char --rope --gqa --sliding_window --window_size=16 --n_layer=1 "
        "--n_head=4 --n_embd=128 --block_size=64 --batch_size=12 --gradient_accumulation_steps=1 "
        "--bias=False --learning_rate=1.5e-2 --beta2=0.95 --warmup_iters=20 --max_iters=475 "
        "--eval_interval=475 --eval_iters=100 --sample_interval=0 --out_dir=out-evidence/fast")


def main():
    if sys.argv[1:2] == ["cost"]:
        cost()
    elif sys.argv[1:2] == ["quality"]:
        quality()
    elif sys.argv[1:2] == ["time"] and len(sys.argv) == 3:
        time_to_loss(sys.argv[2])
    else:
        sys.exit(__doc__)


def cost(rounds=5):
    models = {}
    for name, flags in VARIANTS.items():
        models[name] = GPT2(GPT2Config(**dict.fromkeys(flags, True)))
    speeds = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            speeds[name].append((training(model), decoding(model, 32), decoding(model, 768)))
    rows = []
    for name, model in models.items():
        config = model.config
        numbers = 2 * config.n_layer * config.kv_heads * config.head_dim     # keys and values
        cache = 2 * numbers                                                  # bytes in bfloat16
        tokens = config.window_size or config.block_size
        medians = [f"{statistics.median(column):.1f}" for column in zip(*speeds[name], strict=True)]
        rows.append([name, f"{model.num_parameters() / 1e6:.1f} M",
                     f"{config.flops_per_token() / 1e6:.0f} M", f"{cache:,} B",
                     f"{cache * tokens / 1e6:.1f} MB", *medians])
    table(["GPT-2 124M", "parameters", "FLOPs a token", "cache a token", "cache of 1,024",
           "training, tok/s", "decoding after 32", "after 768"], rows)


def training(model):
    """Tokens per second of a forward and a backward pass over one text of 1,024 tokens."""
    idx = torch.randint(model.config.vocab_size, (1, 1024))
    began = time.perf_counter()
    _, loss = model(idx, idx)
    loss.backward()
    model.zero_grad(set_to_none=True)
    return 1024 / (time.perf_counter() - began)


def decoding(model, length, new=24):
    """Tokens per second of one text after a prompt of `length` tokens."""
    idx = torch.randint(model.config.vocab_size, (1, length))
    stream = model.stream(idx, new + 1, temperature=0)
    next(stream)                                                 # reads the prompt
    began = time.perf_counter()
    for _ in stream:
        pass
    return new / (time.perf_counter() - began)


def quality():
    runs = [(optimizer, name, seed) for optimizer in OPTIMIZERS for name in VARIANTS
            for seed in SEEDS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(train, *zip(*runs, strict=True)))
    rows = []
    for optimizer in OPTIMIZERS:
        for name, flags in VARIANTS.items():
            row = [optimizer, name]
            for length in (64, 128, 256):
                if length == 64 or "rope" in flags:
                    losses = [evaluate(out_dir(optimizer, name, seed), length) for seed in SEEDS]
                    row.append(f"{statistics.mean(losses):.3f} ± {statistics.stdev(losses):.3f}")
                else:
                    row.append("cannot")
            rows.append(row)
    table(["optimizer", "validation loss", "at 64 tokens", "at 128", "at 256"], rows)


def train(optimizer, name, seed):
    flags = [f"--{flag}" for flag in VARIANTS[name]]
    run(f"{RECIPE} {STEPS}", f"--seed={seed}", f"--out_dir={out_dir(optimizer, name, seed)}",
        *OPTIMIZERS[optimizer], *flags)


def out_dir(optimizer, name, seed):
    return f"out-evidence/{optimizer}-{name.replace(' ', '-')}-{seed}"


def evaluate(folder, length):
    """The loss over the whole validation text, in samples of `length` tokens."""
    text = run("--dataset=shakespeare_char --eval_only --eval_iters=0 --batch_size=64",
               f"--init_from={folder}", f"--block_size={length}")
    return float(re.search(r"validation loss (\S+)", text)[1])


def run(flags, *more, threads="1"):
    """Run train.py, and return what it prints."""
    command = [sys.executable, "train.py", *flags.split(), *more]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": threads}).stdout


def time_to_loss(nanogpt):
    threads = str(os.cpu_count())
    began = time.perf_counter()
    text = subprocess.run([sys.executable, "train.py", *NANOGPT.split()], cwd=nanogpt, check=True,
                          capture_output=True, text=True).stdout
    theirs = time.perf_counter() - began
    print(f"nanoGPT: {theirs:.1f} s,", re.findall(r"step .*val loss .*", text)[-1])
    for seed in SEEDS:
        began = time.perf_counter()
        run(FAST, f"--seed={seed}", threads=threads)
        ours = time.perf_counter() - began
        loss = evaluate("out-evidence/fast", 64)
        print(f"seed {seed}: {ours:.1f} s, {theirs / ours:.1f} times sooner, loss {loss:.4f}")


def table(head, rows):
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
