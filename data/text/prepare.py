"""
Your own text: a UTF-8 file becomes the dataset data/NAME, which --dataset=NAME trains on.

    python data/text/prepare.py --input=diary.txt --name=diary --tokenizer=char
"""
import os
import re
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))  # quill's folder
from configurator import configure, fail
from data.common import DATA_DIR, write_dataset

input = ''  # the text, UTF-8
name = ''  # of the dataset
tokenizer = 'char'  # char: one token a character | gpt2: GPT-2's byte pairs


def main():
    problems = []
    if not input:
        problems.append('which text? --input=FILE')
    if not re.fullmatch(r'[A-Za-z0-9][\w.-]*', name):
        problems.append(f"--name='{name}': a dataset's name is made of letters, digits, '_', '-' and '.'")
    elif os.path.exists(os.path.join(DATA_DIR, name, 'prepare.py')):
        problems.append(f'--name={name}: data/{name} has its own prepare.py, choose another name')
    if tokenizer not in ('char', 'gpt2'):
        problems.append(f'--tokenizer={tokenizer}: tokenizer is one of char, gpt2')
    if problems:
        fail(*problems)
    write_dataset(name, input, tokenizer)
    print(f'now train on it: python train.py --dataset={name}')


if __name__ == '__main__':
    configure(globals())
    main()
