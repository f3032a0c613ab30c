"""
Makes the README's table and picture of what each change to the attention costs and brings:

    python .github/evidence.py            # half an hour on two cores; stopped and started at will
    python .github/evidence.py --train    # only the training runs, whose losses do not depend on how busy the machine is
    python .github/evidence.py --measure  # only the table; for its speeds the machine should have nothing else to do

Quality: nanoGPT's CPU recipe (4 layers of 128, 12 texts of 64 characters, 1,000 steps) on tinyshakespeare, three seeds.
Cost: GPT-2 124M's shape with random weights, in float32, the variants taking turns.
"""
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)
from model import GPT2, GPT2Config  # noqa: E402
from train import Tokens, plot  # noqa: E402

VARIANTS = {"plain": [], "rope": ["rope"], "gqa": ["gqa"], "sliding_window": ["sliding_window"],
            "all three": ["rope", "gqa", "sliding_window"]}
SEEDS = (1, 2, 3)
RECIPE = ("--dataset=shakespeare_char --n_layer=4 --n_head=4 --n_embd=128 --block_size=64 --batch_size=12 --max_iters=1000 "
          "--gradient_accumulation_steps=1 --learning_rate=1e-3 --warmup_iters=100 --eval_interval=125 --eval_iters=50 "
          "--log_interval=50 --init_from=auto").split()


def out_dir(name, seed):
    return os.path.join(ROOT, "out-evidence", f"{name.replace(' ', '-')}-{seed}")


def train(name, seed):
    folder = out_dir(name, seed)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "log.txt"), "a") as log:
        subprocess.run([sys.executable, os.path.join(ROOT, "train.py"), *RECIPE, f"--seed={seed}", f"--out_dir={folder}",
                        *(f"--{flag}" for flag in VARIANTS[name])], stdout=log, stderr=log, check=True,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})
    print(f"trained {name}, seed {seed}", flush=True)


@torch.no_grad()
def loss_at(model, length):
    """Mean loss over the validation text, cut into windows of `length`."""
    data = Tokens([os.path.join(ROOT, "data", "shakespeare_char", "val.bin")], length, model.config.vocab_size)
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


def costs(rounds=3):
    """-> {name: [training, decoding after 32 tokens, after 768 tokens]} in tokens per second, medians of the rounds."""
    models = {name: GPT2(GPT2Config(**dict.fromkeys(flags, True)), seed=0) for name, flags in VARIANTS.items()}
    times = {name: ([], [], []) for name in models}
    idx = torch.randint(50257, (1, 1024), generator=torch.Generator().manual_seed(0))
    for _ in range(rounds):
        for name, model in models.items():
            began = time.perf_counter()
            model(idx, idx)[1].backward()
            times[name][0].append(1024 / (time.perf_counter() - began))
            model.zero_grad(set_to_none=True)
            for kept, prompt in ((times[name][1], 32), (times[name][2], 768)):
                stream = model.stream(idx[:, :prompt], 25, temperature=0)
                next(stream)                                               # reads the prompt
                began = time.perf_counter()
                kept.append(sum(1 for _ in stream) / (time.perf_counter() - began))
    return {name: [statistics.median(t) for t in three] for name, three in times.items()}


def main():
    what = set(sys.argv[1:]) or {"--train", "--measure"}
    if what - {"--train", "--measure"}:
        sys.exit(__doc__)
    if "--train" in what:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda job: train(*job), [(name, seed) for seed in SEEDS for name in VARIANTS]))
        plot([out_dir(name, SEEDS[0]) for name in VARIANTS], os.path.join(HERE, "variants.svg"), over="tokens")
    if "--measure" in what:
        speed = costs()
        print("| | parameters | MFLOPs a token | cache, B a token | cache, full | training, tok/s | decoding at 32 | at 768 "
              "| loss at 64 | at 128 | at 256 |\n|---|---|---|---|---|---|---|---|---|---|---|")
        for name, flags in VARIANTS.items():
            c = GPT2Config(**dict.fromkeys(flags, True))
            with torch.device("meta"):
                parameters = GPT2(c).num_parameters()
            losses = [f"{v[0]:.3f} ± {v[1]:.3f}" if v else "cannot" for v in quality(name).values()]
            print(f"| {name} | {parameters / 1e6:.1f} M | {c.flops_per_token() / 1e6:.0f} | {c.cache_bytes(1, 2):,} | "
                  f"{c.cache_bytes(c.block_size, 2) / 1e6:.1f} MB | {speed[name][0]:.0f} | {speed[name][1]:.1f} | "
                  f"{speed[name][2]:.1f} | " + " | ".join(losses) + " |")


if __name__ == "__main__":
    main()
