"""
Train a small model of each kind, and open what the runs leave with software of others: the pipeline
of transformers, lm-evaluation-harness and CTranslate2. Needs GPT-2's tokenizer files, but no other
download.

    pip install transformers "lm_eval[hf]" ctranslate2
    python .github/clients.py TEXT        # a text file of 200 kB or more; minutes on two cores

The table shows perplexities by --eval_only and by lm-evaluation-harness, and whether the pipeline
and CTranslate2 write the same 100 tokens as GPT2.generate (None: it does not know StarCoder2).
"""
import json
import os
import re
import subprocess
import sys

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
import ctranslate2
import lm_eval
import numpy as np
import torch
import transformers

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from data.tokenizer import GPT2Tokenizer, load_tokenizer  # noqa: E402
from model import GPT2  # noqa: E402

OUT = "out-clients"
BLOCK = 128
VARIANTS = {"plain": "", "no bias": "--bias=False", "gqa": "--gqa", "rope": "--rope",
            "rope, gqa": "--rope --gqa", "all three": "--rope --gqa --sliding_window"}
RECIPE = (f"--dataset={OUT}/data --block_size={BLOCK} --n_layer=2 --n_head=6 --n_embd=48 "
          "--max_iters=40 --warmup_iters=5 --eval_interval=40 --eval_iters=1 "
          "--gradient_accumulation_steps=1").split()
PROMPT = "The"


def write_data(path):
    """Write a data set, and the text of its validation tokens, which are whole samples."""
    tokenizer = GPT2Tokenizer()
    with open(path, encoding="utf-8") as f:
        ids = tokenizer.encode(f.read(200_000))
    train, val = np.split(ids, [len(ids) * 9 // 10])
    val = val[:len(val) // BLOCK * BLOCK]
    while not np.array_equal(tokenizer.encode(tokenizer.decode(val)), val):
        val = val[:-BLOCK]                                       # a cut in the middle of a word
    os.makedirs(f"{OUT}/data", exist_ok=True)
    train.tofile(f"{OUT}/data/train.bin")
    np.append(np.uint16(tokenizer.end_of_text), val).tofile(f"{OUT}/data/val.bin")
    with open(f"{OUT}/val.jsonl", "w") as f:
        f.write(json.dumps({"text": tokenizer.decode(val)}) + "\n")
    return len(val)


def train(folder, flags):
    """Train a model -> its perplexity by --eval_only."""
    script = [sys.executable, f"{ROOT}/train.py", f"--out_dir={folder}"]
    subprocess.run([*script, *RECIPE, *flags.split()], check=True, stdout=subprocess.DEVNULL)
    done = subprocess.run([*script, "--init_from=resume", "--eval_only", "--eval_iters=0",
                           f"--dataset={OUT}/data"], check=True, stdout=subprocess.PIPE, text=True)
    return float(re.search(r"perplexity (\S+)", done.stdout)[1])


def harness_perplexity(folder, tokens):
    """The perplexity by lm-evaluation-harness."""
    task = {"task": "val", "dataset_path": "json", "test_split": "test",
            "dataset_kwargs": {"data_files": {"test": os.path.abspath(f"{OUT}/val.jsonl")}},
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}]}
    results = lm_eval.simple_evaluate("hf", f"pretrained={folder},dtype=float32", tasks=[task],
                                      device="cpu", bootstrap_iters=0)
    with open(f"{OUT}/val.jsonl") as f:
        size = len(json.loads(f.read())["text"].encode())
    return 2 ** (results["results"]["val"]["bits_per_byte,none"] * size / tokens)


def write_random(like, folder):
    """Write a model of the shape of another with large random weights: one trained for a few steps
    repeats one word -> the text of 100 greedy tokens."""
    model = GPT2(GPT2.from_pretrained(like).config, seed=0)
    torch.manual_seed(0)
    for p in model.parameters():
        p.data = p.data * 12 if p.dim() > 1 else p.data + 0.1 * torch.randn_like(p)
    tokenizer = load_tokenizer(like)
    model.save_pretrained(folder, tokenizer)
    return tokenizer.decode(model.generate(tokenizer.encode(PROMPT), 100, temperature=0)[0])


def by_pipeline(folder):
    """The text of 100 tokens by transformers' pipeline."""
    pipeline = transformers.pipeline("text-generation", folder, dtype="float32")
    return pipeline(PROMPT, max_new_tokens=100, do_sample=False)[0]["generated_text"]


def by_ctranslate2(folder):
    """The text of 100 tokens by CTranslate2; None if it does not know the architecture."""
    try:
        ctranslate2.converters.TransformersConverter(folder).convert(f"{folder}/ct2", force=True)
    except ValueError:
        return None
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.convert_ids_to_tokens(tokenizer.encode(PROMPT))
    result = ctranslate2.Generator(f"{folder}/ct2").generate_batch([prompt], sampling_topk=1,
                                                                   max_length=100)
    return tokenizer.decode(result[0].sequences_ids[0])


def main():
    tokens = write_data(sys.argv[1])
    rows = []
    for name, flags in VARIANTS.items():
        folder = f"{OUT}/{name.replace(', ', '-').replace(' ', '-')}"
        ours = train(folder, flags)
        harness = harness_perplexity(folder, tokens)
        text = write_random(folder, f"{folder}/random")
        found = by_ctranslate2(f"{folder}/random")
        rows.append(f"| {name} | {ours:.2f} | {harness:.2f} | "
                    f"{by_pipeline(f'{folder}/random') == text} | {found and found == text} |")
    print("\n| flags | --eval_only | lm-evaluation-harness | pipeline | CTranslate2 |\n"
          "|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
