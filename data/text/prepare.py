"""
Your own text: makes the dataset data/NAME from a UTF-8 file.

    python data/text/prepare.py --input=diary.txt --name=diary --tokenizer=char
    python train.py config/train_shakespeare_char_cpu.py --dataset=diary --out_dir=out-diary
"""
import os
import re
import sys

import torch

sys.path.insert(0, os.path.abspath(__file__ + '/../../..'))  # the project's folder
from configurator import configure, fail, run_main
from data.datasets import write_dataset
from data.downloads import DATA_DIR

input = ''  # UTF-8 text
name = ''  # name of the dataset
tokenizer = 'char'  # char: one token per character | gpt2: GPT-2's byte pairs


def main():
    problems = []
    if not input:
        problems.append('no text: give one with --input=FILE')
    if not re.fullmatch(r'[A-Za-z0-9][\w.-]*', name):
        problems.append(f"--name='{name}': the name of a dataset begins with a letter or digit and "
                        "consists of letters, digits, '_', '-' and '.'")
    elif os.path.exists(os.path.join(DATA_DIR, name, 'prepare.py')):
        problems.append(f'--name={name}: data/{name} has its own prepare.py: choose another name')
    if tokenizer not in ('char', 'gpt2'):
        problems.append(f'--tokenizer={tokenizer}: tokenizer is one of char, gpt2')
    if problems:
        fail(*problems)
    write_dataset(name, input, tokenizer)
    config = '' if torch.cuda.is_available() else 'config/train_shakespeare_char_cpu.py '
    print(f'now train on it: python train.py {config}--dataset={name} --out_dir=out-{name}')


if __name__ == '__main__':
    configure(globals())
    run_main(main)
