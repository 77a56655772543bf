"""
Your own text: makes the dataset data/NAME from UTF-8 files.

    python data/text/prepare.py --input=diary.txt --name=diary
    python train.py config/speedrun_shakespeare_char.py --dataset=diary --out_dir=out-diary
    python data/text/prepare.py --input=letters.txt --name=letters --tokenizer=out-diary
    python data/text/prepare.py --input="books/*.txt" --name=books --tokenizer=bpe

The input is a file, a folder, or a pattern in quotes. Files may be compressed by gzip. In a file of
JSON, each line, or each item of a list, is one document: a string, or an object with the text in
its field "text". Every other file is one document. The last tenth of the text is for validation,
or, if there are 100 documents or more, about one document in ten.
"""
import os
import re
import sys

sys.path.insert(0, os.path.abspath(__file__ + '/../../..'))  # the project's folder
from configurator import fail, one_line_errors, run_main
from data.build import Texts, write_dataset
from data.checkpoints import checkpoint_path, read_checkpoint
from data.dataset import read_meta
from data.files import DATA_DIR
from data.huggingface import read_tokenizer

input = ''  # UTF-8 text: a file, a folder or a pattern, also of .gz and .jsonl files
name = ''  # name of the dataset
tokenizer = 'char'  # char: one token per character | bpe: made for this text | gpt2 | a run
vocab_size = 0  # number of tokens for --tokenizer=bpe, at least 257; 0: 4096 tokens
val_fraction = 0.1  # fraction for validation: of the text, or of its documents if 100 or more
unknown = ''  # drop: leave out characters that the given tokenizer lacks
field = 'text'  # field of JSON objects that holds the text; '': train on JSON and CSV as they are
CHOICES = {'unknown': ('', 'drop')}
LIMITS = {'val_fraction': (0, 1)}


def main():
    check_settings()
    kind, start = tokenizer, 'config/speedrun_shakespeare_char.py'
    if tokenizer not in ('char', 'bpe'):
        run = None if tokenizer.endswith('.json') else checkpoint_path(tokenizer)
        with one_line_errors(f'--tokenizer={tokenizer}: '):
            kind = read_checkpoint(run)['tokenizer'] if run else read_tokenizer(tokenizer)
        start = f'--init_from={tokenizer}' if run else start
    texts = Texts(input, field=field)
    write_dataset(name, texts, kind, unknown == 'drop', vocab_size or 4096, val_fraction)
    updates = read_meta(name)['tokens']['train'] / 4096  # in an epoch of this config
    print(f'now train on it: python train.py {start} --dataset={name} --out_dir=out-{name} '
          f'--max_iters={max(100, round(2.5 * updates))}')


def check_settings():
    if not input:
        fail('no text: give one with --input=FILE')
    if not re.fullmatch(r'[A-Za-z0-9][\w.-]*', name):
        fail(f"--name='{name}' must begin with a letter or digit; '_', '-' and '.' may follow")
    if os.path.exists(os.path.join(DATA_DIR, name, 'prepare.py')):
        fail(f'--name={name}: data/{name} has its own prepare.py: choose another name')
    if vocab_size and (tokenizer != 'bpe' or vocab_size < 257):
        fail(f'--vocab_size={vocab_size}: vocab_size is for --tokenizer=bpe, and at least 257')


if __name__ == '__main__':
    run_main(main, __name__)
