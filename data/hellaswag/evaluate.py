"""
Measure the accuracy of a model on the 10,042 questions of HellaSwag's validation set.

    python data/hellaswag/evaluate.py --init_from=gpt2
    python data/hellaswag/evaluate.py --init_from=out-gpt2
    torchrun --nproc_per_node=8 data/hellaswag/evaluate.py --init_from=gpt2-xl

A question is a context with four endings (https://arxiv.org/abs/1905.07830). The last line of
output is one JSON object.
"""
import json
import os
import sys

sys.path.insert(0, os.path.abspath(__file__ + '/../../..'))  # the project's folder
from configurator import DTYPES, one_line_errors, run_main, setup
from data.downloads import download
from data.files import DATA_DIR
from sample import load

import torch
from torch.nn import functional as F

init_from = 'gpt2'  # gpt2, gpt2-medium, gpt2-large, gpt2-xl | folder of a run or of a GPT-2
device = 'auto'  # auto (env TORCH_DEVICE, or cuda, mps, cpu in this order) | cpu | cuda[:N] | mps
dtype = 'auto'  # precision of matrix products; auto is the fastest for this device

CHOICES = {'dtype': DTYPES}

HELLASWAG = {
    'url': 'https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl',
    'sha256': '0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588'}

def main():
    process = setup(device=device, dtype=dtype)
    rows = read_questions(os.path.join(DATA_DIR, 'hellaswag', 'hellaswag_val.jsonl'))
    with one_line_errors(f'--init_from={init_from}: '):
        model, tokenizer = load(init_from, process.device)
        questions = [encode(tokenizer, row) for row in rows]

    # the answer is the ending whose tokens have the largest sum (acc) or the largest mean
    # (acc_norm) of log probabilities; each rank answers its share
    correct = torch.zeros(2)
    for context, endings, label in questions[process.rank::process.world_size]:
        sums, means = score_endings(model, context, endings, process)
        correct += torch.stack([sums.argmax() == label, means.argmax() == label])
    acc, acc_norm = (process.all_reduce(correct.to(process.device)) / len(rows)).tolist()
    process.print(json.dumps({'task': 'hellaswag', 'init_from': init_from, 'n': len(rows),
                              'acc': acc, 'acc_norm': acc_norm}))
    process.close()

def read_questions(path):
    """Return the questions as dicts; download them to path unless they are there."""
    with one_line_errors('no HellaSwag: '):
        download(path=path, **HELLASWAG)
    with open(path, encoding='utf-8') as f:
        return [json.loads(line) for line in f]

def encode(tokenizer, row):
    """Return the tokens of a question's context, those of its endings, and the right ending."""
    # not cleaned up, as in https://github.com/karpathy/llm.c/blob/master/dev/data/hellaswag.py
    context = tokenizer.encode(row['ctx']).tolist()
    endings = [tokenizer.encode(' ' + ending).tolist() for ending in row['endings']]
    return context, endings, row['label']

@torch.no_grad()
def score_endings(model, context, endings, process):
    """Return the sums and the means of the log probabilities of each ending's tokens, (4,) each.

    A context that is too long for the model loses its beginning.
    """
    longest = max(map(len, endings))
    context = context[-(model.config.block_size + 1 - longest):]
    idx = torch.zeros(len(endings), len(context) + longest - 1, dtype=torch.int64)
    targets = torch.full_like(idx, -1)  # -1 is not counted
    for i, ending in enumerate(endings):
        tokens = torch.tensor(context + ending)
        idx[i, :len(tokens) - 1] = tokens[:-1]
        targets[i, len(context) - 1:len(tokens) - 1] = tokens[len(context):]
    with process.autocast():
        logits, _ = model(idx.to(process.device))
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten().to(process.device),
                             ignore_index=-1, reduction='none')
    sums = -losses.view(targets.shape).sum(dim=1).cpu()
    return sums, sums / (targets >= 0).sum(dim=1)

if __name__ == '__main__':
    run_main(main, __name__)
