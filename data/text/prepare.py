"""
Your own text: makes the dataset data/NAME from a UTF-8 file.

    python data/text/prepare.py --input=diary.txt --name=diary --tokenizer=char
    python train.py config/train_shakespeare_char_cpu.py --dataset=diary --out_dir=out-diary
    python data/text/prepare.py --input=letters.txt --name=letters --tokenizer=out-diary

--tokenizer also takes a checkpoint, and a tokenizer.json of Hugging Face or its folder.
"""
import os
import re
import sys

import torch

sys.path.insert(0, os.path.abspath(__file__ + '/../../..'))  # the project's folder
from configurator import configure, fail, one_line_errors, run_main
from data.checkpoints import read_checkpoint
from data.datasets import write_dataset
from data.downloads import DATA_DIR
from data.gpt2 import GPT2_NAMES
from data.huggingface import read_json
from data.tokenizers import pretrained_tokenizer, tokenizer_size
from data.weights import checkpoint_path

input = ''  # UTF-8 text
name = ''  # name of the dataset
tokenizer = 'char'  # char: one token per character | gpt2 | that of an earlier run: its folder
unknown = ''  # drop: leave out characters that the given tokenizer lacks


def main():
    problems = []
    if not input:
        problems.append('no text: give one with --input=FILE')
    if not re.fullmatch(r'[A-Za-z0-9][\w.-]*', name):
        problems.append(f"--name='{name}': the name of a dataset begins with a letter or digit and "
                        "consists of letters, digits, '_', '-' and '.'")
    elif os.path.exists(os.path.join(DATA_DIR, name, 'prepare.py')):
        problems.append(f'--name={name}: data/{name} has its own prepare.py: choose another name')
    if tokenizer not in ('char', *GPT2_NAMES) and not os.path.exists(tokenizer):
        problems.append(f'--tokenizer={tokenizer}: tokenizer is one of char, gpt2, or the path of '
                        "a run's folder, a checkpoint, or a tokenizer.json")
    if unknown not in ('', 'drop'):
        problems.append(f'--unknown={unknown}: unknown is drop, or not given')
    if problems:
        fail(*problems)
    kind = tokenizer
    if tokenizer not in ('char', 'gpt2'):
        with one_line_errors(f'--tokenizer={tokenizer}: '):
            kind = read_tokenizer(tokenizer)
    write_dataset(name, input, kind, drop=unknown == 'drop')
    start = '' if torch.cuda.is_available() else 'config/train_shakespeare_char_cpu.py '
    if is_run(tokenizer):
        start = f'--init_from={tokenizer} '
    print(f'now train on it: python train.py {start}--dataset={name} --out_dir=out-{name}')


def is_run(path):
    """Return whether path is a run's folder or a checkpoint."""
    return not path.endswith('.json') and checkpoint_path(path) is not None


def read_tokenizer(path):
    """Return the tokenizer of a run's folder, a checkpoint, or Hugging Face's files."""
    if is_run(path):
        saved = read_checkpoint(checkpoint_path(path))['tokenizer']
        tokenizer_size(saved)  # checks the tokenizer
        return saved
    config = read_json(os.path.join(path, 'config.json'), {})
    return pretrained_tokenizer(path, config.get('vocab_size'))


if __name__ == '__main__':
    configure(globals())
    run_main(main)
