"""
TinyStories (https://arxiv.org/abs/2305.07759), with a vocabulary of byte pairs trained on it. Even
a small model learns to write from these simple stories. Downloads 2.2 GB, or a part of it.

    python data/tinystories/prepare.py --mb=200

Run the same command again to continue after an interruption.
"""
import os
import sys

sys.path.insert(0, os.path.abspath(__file__ + '/../../..'))  # the project's folder
from configurator import fail, one_line_errors, run_main
from data.build import Texts, write_dataset
from data.downloads import download, hub_address

mb = 0  # megabytes of stories to train on; 0: all of them
vocab_size = 4096  # number of tokens
LIMITS = {'mb': (0, 10**6), 'vocab_size': (257, 65536)}

FOLDER = os.path.dirname(os.path.abspath(__file__))
SEPARATOR = '<|endoftext|>'  # after each story


def main():
    base = f'{hub_address()}/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-'
    part = f'-{mb}MB' if mb else ''
    train = os.path.join(FOLDER, f'TinyStoriesV2-GPT4-train{part}.txt')
    val = os.path.join(FOLDER, 'TinyStoriesV2-GPT4-valid.txt')
    with one_line_errors(f'{base}train.txt belongs in {train}, {base}valid.txt in {val}: '):
        download(f'{base}train.txt', train, end=mb * 1_000_000)
        download(f'{base}valid.txt', val)
    for path in (train, val):
        with open(path, 'rb') as f:
            found = SEPARATOR.encode() in f.read(1_000_000)
        if not found:
            os.remove(path)
            fail(f'{path} began without a story, so it is removed: run this again')
    texts = Texts(train, val, separator=SEPARATOR)
    write_dataset(os.path.basename(FOLDER), texts, 'bpe', vocab_size=vocab_size, val_fraction=0,
                  val_paths=[val])
    print('now train on it: python train.py config/train_tinystories.py')


if __name__ == '__main__':
    run_main(main, __name__)
