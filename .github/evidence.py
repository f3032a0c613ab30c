"""
Makes the README's tables and pictures of what the changes to the attention bring, and of how cost grows. The runs lie
in out-evidence/; the pictures beside this file.

    python .github/evidence.py            # everything: an hour on two cores; stopped and started at will
    python .github/evidence.py --train    # only the training runs, whose losses do not depend on how busy the machine is
    python .github/evidence.py --measure  # the table of the changes; for its speeds the machine should be idle
    python .github/evidence.py --scale    # speed over the context, over processes, over the size; memory of a window

Quality: nanoGPT's CPU recipe (4 layers of 128, 12 texts of 64 characters, 1,000 steps) on tinyshakespeare, three seeds.
Cost: GPT-2's shapes with random weights, in float32, the variants taking turns; training is forward and backward.
"""
import json
import os
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
TEXT = os.path.join(ROOT, "data", "shakespeare_char", "val.bin")
sys.path.insert(0, ROOT)
from model import GPT2, GPT2Config  # noqa: E402
from train import Tokens, draw, keep_freed_memory, plot  # noqa: E402

VARIANTS = {"plain": [], "rope": ["rope"], "gqa": ["gqa"], "sliding_window": ["sliding_window"],
            "all three": ["rope", "gqa", "sliding_window"]}
SEEDS = (1, 2, 3)
RECIPE = ("--dataset=shakespeare_char --n_layer=4 --n_head=4 --n_embd=128 --block_size=64 --batch_size=12 --max_iters=1000 "
          "--gradient_accumulation_steps=1 --learning_rate=1e-3 --warmup_iters=100 --eval_interval=125 --eval_iters=50 "
          "--log_interval=50 --init_from=auto").split()
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
DEFAULT = []                                                               # the default run's own flags


def out_dir(name, seed):
    return os.path.join("out-evidence", f"{name.replace(' ', '-')}-{seed}")


def train(name, seed):
    folder = out_dir(name, seed)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "log.txt"), "a") as log:
        subprocess.run([sys.executable, os.path.join(ROOT, "train.py"), *RECIPE, f"--seed={seed}", f"--out_dir={folder}",
                        *(f"--{flag}" for flag in VARIANTS[name])], stdout=log, stderr=log, check=True,
                       env=ONE_THREAD)
    print(f"trained {name}, seed {seed}", flush=True)


@torch.no_grad()
def loss_at(model, length):
    """Mean loss over the validation text, cut into windows of `length`."""
    data = Tokens([TEXT], length, model.config.vocab_size)
    total = count = 0
    for first in range(0, len(data), 64):
        x, y = data.__getitems__(list(range(first, min(first + 64, len(data)))))
        total, count = total + model(x, y)[1].item() * len(x), count + len(x)
    return total / count


def quality(name):
    """-> {1: (mean, spread), 2: ..., 4: ...}: loss at 1, 2 and 4 times the trained length; None where it cannot be."""
    models = [GPT2.from_pretrained(out_dir(name, seed)) for seed in SEEDS]
    T = models[0].config.block_size
    found = {}
    for times in (1, 2, 4):
        losses = [loss_at(m, times * T) for m in models] if times == 1 or models[0].config.rope else None
        found[times] = losses and (statistics.mean(losses), statistics.stdev(losses))
    return found


def training(model, length):
    """Tokens per second, forward and backward, of one text."""
    idx = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    began = time.perf_counter()
    model(idx, idx)[1].backward()
    model.zero_grad(set_to_none=True)
    return length / (time.perf_counter() - began)


def decoding(model, length, new=24):
    """Tokens per second of one text after a prompt of `length`."""
    idx = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    stream = model.stream(idx, new + 1, temperature=0)
    next(stream)                                                           # reads the prompt
    began = time.perf_counter()
    return sum(1 for _ in stream) / (time.perf_counter() - began)


def medians(jobs, rounds=3):
    """{name: function} -> {name: median of its results}, the jobs taking turns."""
    results = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            results[name].append(job())
    return {name: statistics.median(found) for name, found in results.items()}


def table(head, rows):
    print("\n" + "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows]), flush=True)


def changes():
    models = {name: GPT2(GPT2Config(**dict.fromkeys(flags, True)), seed=0) for name, flags in VARIANTS.items()}
    speed = medians({(name, what): job for name, model in models.items() for what, job in {
        "training": lambda m=model: training(m, 1024), 32: lambda m=model: decoding(m, 32),
        768: lambda m=model: decoding(m, 768)}.items()}, rounds=7)
    costs, losses = [], []
    for name, model in models.items():
        c = model.config
        costs.append([name, f"{model.num_parameters() / 1e6:.1f} M", f"{c.flops_per_token() / 1e6:.0f} M",
                      f"{c.cache_bytes(1, 2):,} B", f"{c.cache_bytes(c.block_size, 2) / 1e6:.1f} MB",
                      f"{speed[name, 'training']:.0f}", *(f"{speed[name, n]:.1f}" for n in (32, 768))])
        losses.append([name, *(f"{v[0]:.3f} ± {v[1]:.3f}" if v else "cannot" for v in quality(name).values())])
    table(["GPT-2 124M", "parameters", "FLOPs a token", "cache a token", "cache of 1,024", "training, tok/s",
           "decoding after 32, tok/s", "after 768"], costs)
    table(["validation loss", "at 64 tokens", "at 128", "at 256"], losses)


def over_context(contexts=(256, 512, 1024, 2048, 4096, 8192)):
    """GPT-2 124M with full attention and with a window of 256."""
    found = {}
    for T in contexts:
        jobs = {}
        for kind, flags in (("full", {}), ("window", dict(sliding_window=True, window_size=min(T, 256)))):
            model = GPT2(GPT2Config(block_size=T, **flags), seed=0)
            jobs[kind, "training", T] = lambda m=model, T=T: training(m, T)
            jobs[kind, "decoding", T] = lambda m=model, T=T: decoding(m, T - 25)
        found |= medians(jobs)
    kinds = [(kind, what) for what in ("training", "decoding") for kind in ("full", "window")]
    table(["context", *(f"{what}, {kind}" for kind, what in kinds)],
          [[f"{T:,}", *(f"{found[kind, what, T]:.0f}" if what == "training" else f"{found[kind, what, T]:.1f}"
                        for kind, what in kinds)] for T in contexts])
    draw(os.path.join(HERE, "context.svg"),
         [(f"{what}, {'full attention' if kind == 'full' else 'window of 256'}", [],
           [(T, found[kind, what, T]) for T in contexts]) for kind, what in kinds],
         "context (tokens)", "tokens per second", 0, 1.05 * max(found.values()))


MEMORY = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
from model import AttentionHead, GPT2Config
def step(T, flags):
    qkv = [torch.randn(1, 1, T, 32, requires_grad=True) for _ in range(3)]
    open("/proc/self/clear_refs", "w").write("5")                          # the peak counts from here
    before = resident("VmRSS")
    (sum(qkv) if flags is None else AttentionHead(GPT2Config(T, **flags))(*qkv)).square().sum().backward()
    return resident("VmHWM") - before
def resident(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1e3
flags = json.loads(sys.argv[3])                                            # null: no attention
step(512, flags)                                                           # what torch needs once
print(step(int(sys.argv[2]), flags))
"""


def over_window(contexts=(1024, 8192, 16384)):
    """A window of 256 against full attention in 2 layers of 128: time of a whole step, memory of one head of 32."""
    kinds = {"window": dict(sliding_window=True, window_size=256), "full": {}}
    more = kinds | {"formula": dict(flash=False), "none": None}
    models = {(T, kind): GPT2(GPT2Config(block_size=T, vocab_size=65, n_layer=2, n_head=4, n_embd=128, **flags), seed=0)
              for T in contexts for kind, flags in kinds.items()}
    speed = medians({job: lambda m=m, T=job[0]: training(m, T) for job, m in models.items()}, rounds=7)
    memory = medians({(T, kind): lambda T=T, flags=flags: float(subprocess.run(
        [sys.executable, "-c", MEMORY, ROOT, str(T), json.dumps(flags)], capture_output=True, text=True, check=True).stdout)
        for T in contexts for kind, flags in more.items()})
    table(["context", "window, us a token", "full", "as fast", "window, MB", "full, torch's kernel", "full, the formula",
           "no attention"],
          [[f"{T:,}", *(f"{1e6 / speed[T, kind]:.1f}" for kind in kinds), f"{speed[T, 'window'] / speed[T, 'full']:.1f} x",
            *(f"{memory[T, kind]:,.1f}" for kind in more)] for T in contexts])


def over_processes(modes=((1, ()), (2, ()), (4, ()), (2, ("--fsdp",)), (4, ("--fsdp",)))):
    """The default run, `python train.py`, a thread a process; modes: how many, and flags."""
    def speed(processes, *flags):
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
        command = [sys.executable, *launch, os.path.join(ROOT, "train.py"), "--benchmark", *DEFAULT, *flags]
        out = subprocess.run(command, env=ONE_THREAD, check=True, capture_output=True, text=True).stdout
        return float(re.search(r"([\d,]+) tokens per second", out)[1].replace(",", ""))
    found = medians({(n, flags): lambda n=n, flags=flags: speed(n, *flags) for n, flags in modes})
    table(["processes", "mode", "tok/s", "of one process"],
          [[n, "FSDP" if flags else "DDP" if n > 1 else "one device", f"{v:,.0f}", f"{v / found[1, ()]:.2f} x"]
           for (n, flags), v in found.items()])


def over_size(shapes=((12, 12, 768), (24, 16, 1024), (36, 20, 1280), (48, 25, 1600))):
    """OpenAI's four sizes: layers, heads, width."""
    rows = []
    for layers, heads, width in shapes:
        model = GPT2(GPT2Config(n_layer=layers, n_head=heads, n_embd=width), seed=0)
        found = medians({"training": lambda: training(model, 256), "decoding": lambda: decoding(model, 32)})  # noqa: B023
        parameters = model.num_parameters()
        rows.append([f"{parameters / 1e6:,.0f} M", f"{found['training']:.0f}", f"{found['decoding']:.1f}",
                     f"{6 * parameters * found['training'] / 1e9:.0f}", f"{4 * parameters * found['decoding'] / 1e9:.1f}"])
    table(["parameters", "training, tok/s", "decoding, tok/s", "training, GFLOP/s", "decoding, GB/s of weights"], rows)


def main():
    what = set(sys.argv[1:]) or {"--train", "--measure", "--scale"}
    if what - {"--train", "--measure", "--scale"}:
        sys.exit(__doc__)
    keep_freed_memory()                                                    # as train.py does
    if "--train" in what:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda job: train(*job), [(name, seed) for seed in SEEDS for name in VARIANTS]))
        plot([out_dir(name, SEEDS[0]) for name in VARIANTS], os.path.join(HERE, "variants.svg"), over="tokens")
    if "--measure" in what:
        changes()
    if "--scale" in what:
        over_window()
        over_size()
        over_processes()
        over_context()


if __name__ == "__main__":
    main()
