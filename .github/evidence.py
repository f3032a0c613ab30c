"""
Make EVIDENCE.md's tables and pictures of what the changes to the attention bring, and of how cost
grows. The runs are kept in out-evidence/, the pictures beside this file.

    python .github/evidence.py            # all: two hours on two cores
    python .github/evidence.py --train    # the training runs; a stopped one is resumed
    python .github/evidence.py --measure  # the tables of the changes
    python .github/evidence.py --scale    # speed and memory over context, size and processes

Speeds need an idle machine; losses do not depend on it. Quality: nanoGPT's CPU recipe (4 layers of
128, 12 samples of 64 characters, 1,000 steps) on tinyshakespeare, three seeds, with AdamW and with
Muon. Cost: GPT-2's shapes with random weights, in float32; the variants take turns. Training is
forward and backward.
"""
import itertools
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)
from data.loader import TokenDataset  # noqa: E402
from model import GPT2, SIZES, AttentionHead, GPT2Config  # noqa: E402
from train import draw, plot, prepare_device  # noqa: E402

TRAIN = os.path.join(ROOT, "train.py")
TEXT = os.path.join(ROOT, "data", "shakespeare_char", "val.bin")
VARIANTS = {
    "plain": {},
    "rope": dict(rope=True),
    "gqa": dict(gqa=True),
    "sliding_window": dict(sliding_window=True),
    "all three": dict(rope=True, gqa=True, sliding_window=True),
}
SEEDS = (1, 2, 3)
RECIPE = ("--dataset=shakespeare_char --n_layer=4 --n_head=4 --n_embd=128 --block_size=64 "
          "--batch_size=12 --gradient_accumulation_steps=1 --max_iters=1000 "
          "--warmup_iters=100 --eval_interval=125 --eval_iters=50 --log_interval=50 "
          "--init_from=auto").split()
OPTIMIZERS = {
    "AdamW": ["--learning_rate=1e-3"],
    "Muon": ["--muon", "--learning_rate=6e-3"],
}
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}

# --------------------------------------------------------------------------------------------------
# Measuring


def training(model, length):
    """Tokens per second of a forward and a backward pass over one text."""
    idx = random_text(model, length)
    began = time.perf_counter()
    _, loss = model(idx, idx)
    loss.backward()
    model.zero_grad(set_to_none=True)
    return length / (time.perf_counter() - began)


def decoding(model, length, new=24):
    """Tokens per second of one text after a prompt of `length` tokens."""
    stream = model.stream(random_text(model, length), new + 1, temperature=0)
    next(stream)                                                 # reads the prompt
    began = time.perf_counter()
    for _ in stream:
        pass
    return new / (time.perf_counter() - began)


def random_text(model, length):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (1, length), generator=generator)


def medians(jobs, rounds=3):
    """{name: function} -> {name: median of its results}. The jobs take turns."""
    results = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            results[name].append(job())
    return {name: statistics.median(found) for name, found in results.items()}


def table(head, rows):
    print()
    for row in [head, ["---"] * len(head), *rows]:
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


# --------------------------------------------------------------------------------------------------
# Training runs


def train_all():
    jobs = itertools.product(SEEDS, OPTIMIZERS, VARIANTS)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: train(*job), jobs))
    first = next(iter(OPTIMIZERS))
    plot([out_dir(SEEDS[0], first, name) for name in VARIANTS],
         os.path.join(HERE, "variants.svg"), over="tokens")


def train(seed, optimizer, name):
    folder = out_dir(seed, optimizer, name)
    os.makedirs(folder, exist_ok=True)
    command = [sys.executable, TRAIN, *RECIPE, *OPTIMIZERS[optimizer],
               *(f"--{flag}" for flag in VARIANTS[name]), f"--seed={seed}", f"--out_dir={folder}"]
    with open(os.path.join(folder, "log.txt"), "a") as log:
        subprocess.run(command, stdout=log, stderr=log, check=True, env=ONE_THREAD)
    print(f"trained {name}, {optimizer}, seed {seed}", flush=True)


def out_dir(seed, optimizer, name):
    return os.path.join("out-evidence", f"{name.replace(' ', '-')}-{optimizer}-{seed}")


# --------------------------------------------------------------------------------------------------
# The changes: what they cost, and what they bring


def costs():
    models = {name: GPT2(GPT2Config(**flags), seed=0) for name, flags in VARIANTS.items()}
    jobs = {}
    for name, model in models.items():
        jobs[name, "training"] = lambda m=model: training(m, 1024)
        jobs[name, "after 32"] = lambda m=model: decoding(m, 32)
        jobs[name, "after 768"] = lambda m=model: decoding(m, 768)
    speed = medians(jobs, rounds=7)
    rows = []
    for name, model in models.items():
        config = model.config
        rows.append([
            name,
            f"{model.num_parameters() / 1e6:.1f} M",
            f"{config.flops_per_token() / 1e6:.0f} M",
            f"{config.cache_bytes(1, 2):,} B",
            f"{config.cache_bytes(config.block_size, 2) / 1e6:.1f} MB",
            f"{speed[name, 'training']:.0f}",
            f"{speed[name, 'after 32']:.1f}",
            f"{speed[name, 'after 768']:.1f}",
        ])
    table(["GPT-2 124M", "parameters", "FLOPs a token", "cache a token", "cache of 1,024",
           "training, tok/s", "decoding after 32, tok/s", "after 768"], rows)


def losses():
    """The validation loss at 1, 2 and 4 times the trained length, where the model can read that."""
    rows = []
    for optimizer, name in itertools.product(OPTIMIZERS, VARIANTS):
        models = [GPT2.from_pretrained(out_dir(seed, optimizer, name)) for seed in SEEDS]
        config = models[0].config
        row = [optimizer, name]
        for times in (1, 2, 4):
            if times > 1 and not config.rope:
                row.append("cannot")
                continue
            found = [loss_at(model, times * config.block_size) for model in models]
            row.append(f"{statistics.mean(found):.3f} ± {statistics.stdev(found):.3f}")
        rows.append(row)
    table(["optimizer", "validation loss", "at 64 tokens", "at 128", "at 256"], rows)


@torch.no_grad()
def loss_at(model, length):
    """Mean loss over the validation text, cut into samples of `length` tokens."""
    data = TokenDataset([TEXT], length, model.config.vocab_size)
    total = 0.0
    for start in range(0, len(data), 64):
        x, y = data.__getitems__(list(range(start, min(start + 64, len(data)))))
        _, loss = model(x, y)
        total += loss.item() * len(x)
    return total / len(data)


# --------------------------------------------------------------------------------------------------
# How cost grows


def over_window(contexts=(1024, 8192, 16384)):
    """A window of 256 and full attention: time of a step in 2 layers of 128, and the memory that
    one head of 32 adds to its inputs."""
    kinds = {"window": dict(sliding_window=True, window_size=256), "full": {}}
    more = {**kinds, "formula": dict(flash=False), "none": None}
    jobs = {}
    for T in contexts:
        for kind, flags in kinds.items():
            config = GPT2Config(T, vocab_size=65, n_layer=2, n_head=4, n_embd=128, **flags)
            model = GPT2(config, seed=0)
            jobs[T, kind] = lambda m=model, T=T: training(m, T)
    speed = medians(jobs, rounds=7)
    jobs = {}
    for T in contexts:
        for kind, flags in more.items():
            jobs[T, kind] = lambda T=T, flags=flags: in_new_process(added_memory, T, flags)
    memory = medians(jobs)
    rows = []
    for T in contexts:
        rows.append([f"{T:,}", *(f"{1e6 / speed[T, kind]:.1f}" for kind in kinds),
                     f"{speed[T, 'window'] / speed[T, 'full']:.1f} x",
                     *(f"{memory[T, kind]:,.1f}" for kind in more)])
    table(["context", "window, us a token", "full", "as fast", "window, MB", "full, torch's kernel",
           "full, the formula", "no attention"], rows)


def in_new_process(function, *arguments):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def added_memory(T, flags):
    """The peak in MB of one head's forward and backward pass over T tokens, above its inputs.
    flags: None adds q, k and v instead of attention."""
    head_step(512, flags)                                        # what torch needs once
    return head_step(T, flags)


def head_step(T, flags):
    inputs = [torch.randn(1, 1, T, 32, requires_grad=True) for _ in range(3)]
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")                                             # the peak counts from here
    before = process_memory("VmRSS")
    if flags is None:
        y = sum(inputs)
    else:
        y = AttentionHead(GPT2Config(T, **flags))(*inputs)
    y.square().sum().backward()
    return process_memory("VmHWM") - before


def process_memory(name):
    """A number of /proc/self/status in MB."""
    with open("/proc/self/status") as f:
        found = re.search(rf"^{name}:\s*(\d+) kB", f.read(), re.MULTILINE)
    return int(found[1]) / 1e3


def over_size(sizes=SIZES):
    """OpenAI's four sizes."""
    rows = []
    for shape in sizes.values():
        model = GPT2(GPT2Config(**shape), seed=0)
        found = medians({"training": lambda m=model: training(m, 256),
                         "decoding": lambda m=model: decoding(m, 32)})
        parameters = model.num_parameters()
        rows.append([f"{parameters / 1e6:,.0f} M", f"{found['training']:.0f}",
                     f"{found['decoding']:.1f}",
                     f"{6 * parameters * found['training'] / 1e9:.0f}",
                     f"{4 * parameters * found['decoding'] / 1e9:.1f}"])
    table(["parameters", "training, tok/s", "decoding, tok/s", "training, GFLOP/s",
           "decoding, GB/s of weights"], rows)


def over_processes():
    """The default run, `python train.py`, with one thread a process."""
    jobs = {}
    for mode, processes, flags in (("one device", 1, []), ("DDP", 2, []), ("DDP", 4, []),
                                   ("FSDP", 2, ["--fsdp"]), ("FSDP", 4, ["--fsdp"])):
        jobs[processes, mode] = lambda n=processes, flags=flags: run_speed(n, flags)
    found = medians(jobs)
    one = found[1, "one device"]
    rows = [[processes, mode, f"{speed:,.0f}", f"{speed / one:.2f} x"]
            for (processes, mode), speed in found.items()]
    table(["processes", "mode", "tok/s", "of one process"], rows)


def run_speed(processes, flags):
    """Tokens per second that train.py --benchmark reports."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [TRAIN, "--benchmark", *flags]
    done = subprocess.run(command, env=ONE_THREAD, check=True, capture_output=True, text=True)
    found = re.search(r"([\d,]+) tokens per second", done.stdout)
    return float(found[1].replace(",", ""))


def over_context(contexts=(256, 512, 1024, 2048, 4096, 8192)):
    """GPT-2 124M with full attention and with a window of 256."""
    found = {}
    for T in contexts:
        window = dict(sliding_window=True, window_size=min(T, 256))
        jobs = {}
        for kind, flags in (("full", {}), ("window", window)):
            model = GPT2(GPT2Config(T, **flags), seed=0)
            jobs["training", kind, T] = lambda m=model, T=T: training(m, T)
            jobs["decoding", kind, T] = lambda m=model, T=T: decoding(m, T - 25)
        found |= medians(jobs)
    lines = [(what, kind) for what in ("training", "decoding") for kind in ("full", "window")]
    digits = {"training": 0, "decoding": 1}
    rows = []
    for T in contexts:
        speeds = [f"{found[what, kind, T]:.{digits[what]}f}" for what, kind in lines]
        rows.append([f"{T:,}", *speeds])
    table(["context", *(f"{what}, {kind}" for what, kind in lines)], rows)
    labels = {"full": "full attention", "window": "window of 256"}
    curves = [(f"{what}, {labels[kind]}", [], [(T, found[what, kind, T]) for T in contexts])
              for what, kind in lines]
    draw(os.path.join(HERE, "context.svg"), curves, ("context (tokens)", "tokens per second"),
         0, 1.05 * max(found.values()))


def main():
    parts = {"--train": [train_all], "--measure": [costs, losses],
             "--scale": [over_window, over_size, over_processes, over_context]}
    chosen = sys.argv[1:] or list(parts)
    if not parts.keys() >= set(chosen):
        sys.exit(__doc__)
    prepare_device(torch.device("cpu"))                          # as train.py does
    for part, functions in parts.items():
        if part in chosen:
            for function in functions:
                function()


if __name__ == "__main__":
    main()
