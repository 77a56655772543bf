"""
Measure the accuracy of a GPT-2 on the 10,042 questions of HellaSwag's validation set.

    python data/hellaswag/evaluate.py --init_from=gpt2
    torchrun --nproc_per_node=8 data/hellaswag/evaluate.py --init_from=gpt2-xl

A question is a context with four endings (https://arxiv.org/abs/1905.07830). The last line of
output is one JSON object.
"""
import json
import os
import sys

import torch
from torch.nn import functional as F

sys.path.insert(0, os.path.abspath(__file__ + '/../../..'))  # the project's folder
from configurator import DTYPES, fail, one_line_errors, run_main, setup
from data.downloads import DownloadError, download_resumable
from data.files import DATA_DIR
from data.huggingface import GPT2_NAMES, gpt2_folder, load_gpt2
from data.tokenizers import pretrained_tokenizer, tokenizer_from_dict

# -----------------------------------------------------------------------------
# settings

init_from = 'gpt2'  # gpt2, gpt2-medium, gpt2-large, gpt2-xl | folder with config.json and weights
device = 'auto'  # auto (env TORCH_DEVICE, or cuda, mps, cpu in this order) | cpu | cuda[:N] | mps
dtype = 'auto'  # of matrix products; auto is the fastest for this device

CHOICES = {'dtype': DTYPES}

HELLASWAG = {
    'url': 'https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl',
    'sha256': '0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588'}


def main():
    if init_from not in GPT2_NAMES and not os.path.isdir(init_from):
        fail(f'init_from={init_from}: init_from is one of {", ".join(GPT2_NAMES)}, '
             'or a folder with config.json and model.safetensors')
    process = setup(device=device, dtype=dtype)
    path = os.path.join(DATA_DIR, 'hellaswag', 'hellaswag_val.jsonl')
    process.once_per_node(lambda: download_questions(path))
    with open(path, encoding='utf-8') as f:
        rows = [json.loads(line) for line in f]
    with one_line_errors(f'--init_from={init_from}: '):
        model = load_gpt2(gpt2_folder(init_from, process=process))
        tokenizer = tokenizer_from_dict(pretrained_tokenizer(init_from, model.config.vocab_size))
        acc, acc_norm = hellaswag(model.eval().to(process.device), tokenizer, rows, process)
    process.print(f'{init_from} on {len(rows):,} questions of HellaSwag: '
                  f'acc={acc:.4f} acc_norm={acc_norm:.4f}')
    result = {'task': 'hellaswag', 'init_from': init_from, 'n': len(rows), 'acc': acc,
              'acc_norm': acc_norm}
    process.print(json.dumps(result))
    process.close()


def download_questions(path):
    """Download the questions to path unless they are there."""
    try:
        download_resumable(path=path, **HELLASWAG)
    except DownloadError as e:
        fail(f'no HellaSwag: {e}')


def hellaswag(model, tokenizer, rows, process):
    """Return (acc, acc_norm), the accuracies on these questions.

    For acc, the answer is the ending with the largest sum of the log probabilities of its tokens.
    For acc_norm, it is the ending with the largest mean. Each rank answers its share of the rows.
    As in llm.c, the text is not cleaned up:
    https://github.com/karpathy/llm.c/blob/master/dev/data/hellaswag.py
    """
    counts = torch.zeros(3)  # correct by sum, correct by mean, all
    for row in rows[process.rank::process.world_size]:
        sums, means = score_endings(model, tokenizer, row['ctx'], row['endings'], process)
        label = row['label']
        counts += torch.tensor([sums.argmax() == label, means.argmax() == label, True])
    counts = process.all_reduce(counts.to(process.device)).cpu()
    acc, acc_norm = (counts[:2] / counts[2]).tolist()
    return acc, acc_norm


@torch.no_grad()
def score_endings(model, tokenizer, context, endings, process):
    """Return the sums and the means of the log probabilities of each ending's tokens, (4,) each."""
    context = tokenizer.encode(context).tolist()
    tails = [tokenizer.encode(' ' + ending).tolist() for ending in endings]
    length = len(context) + max(map(len, tails))
    ids = torch.zeros(len(tails), length, dtype=torch.int64)  # padded with 0 on the right
    mask = torch.zeros(len(tails), length - 1)  # 1 where the next token belongs to the ending
    for i, tail in enumerate(tails):
        end = len(context) + len(tail)
        ids[i, :end] = torch.tensor(context + tail)
        mask[i, len(context) - 1:end - 1] = 1
    ids = ids.to(process.device)
    with process.autocast():
        logits, _ = model(ids[:, :-1])
    targets = ids[:, 1:].flatten()
    loss = F.cross_entropy(logits.float().flatten(0, 1), targets, reduction='none')
    sums = -(loss.view(len(tails), -1).cpu() * mask).sum(dim=1)
    return sums, sums / mask.sum(dim=1)


if __name__ == '__main__':
    run_main(main, __name__)
