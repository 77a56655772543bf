"""
TinyStories (https://arxiv.org/abs/2305.07759), with a vocabulary of byte pairs trained on it. Even
a small model learns to write from these simple stories. Downloads 2.2 GB, or a part of it.

    python data/tinystories/prepare.py --mb=200

Run the same command again to continue after an interruption.
"""
import os
import sys

sys.path.insert(0, os.path.abspath(__file__ + '/../../..'))  # the project's folder
from configurator import fail, run_main
from data.build import Texts, write_dataset
from data.downloads import DownloadError, download_resumable, hub_address
from data.files import DATA_DIR

mb = 0  # megabytes of stories to train on; 0: all of them
vocab_size = 4096  # number of tokens

SEPARATOR = '<|endoftext|>'  # between two stories


def main():
    if mb < 0 or not 257 <= vocab_size <= 65536:
        fail(f'--mb={mb} --vocab_size={vocab_size}: mb is at least 0, vocab_size is at least 257 '
             'and at most 65,536')
    train = download_stories('train', mb)
    val = download_stories('valid')
    texts = Texts(train, val, separator=SEPARATOR)
    write_dataset('tinystories', texts, 'bpe', vocab_size=vocab_size, val_paths=[val])
    print('now train on it: python train.py config/train_tinystories.py')


def download_stories(kind, mb=0):
    """Return the path of the stories, downloaded if they are missing: all, or so many megabytes."""
    name = f'TinyStoriesV2-GPT4-{kind}'
    part = f'-{mb}MB' if mb else ''
    path = os.path.join(DATA_DIR, 'tinystories', f'{name}{part}.txt')
    url = f'{hub_address()}/datasets/roneneldan/TinyStories/resolve/main/{name}.txt'
    try:
        download_resumable(url, path, end=mb * 1_000_000)
    except DownloadError as e:
        fail(str(e))
    end_with_a_story(path)
    return path


def end_with_a_story(path):
    """Remove what follows the last separator in a file: the beginning of a story."""
    with open(path, 'r+b') as f:
        begin = f.seek(max(0, os.path.getsize(path) - 1_000_000))
        before, found, rest = f.read().rpartition(SEPARATOR.encode())
        if rest.strip():
            f.truncate(begin + len(before) + len(found))
    if not found:
        os.remove(path)
        fail(f'{path}: there was no {SEPARATOR} near its end, so it is removed: run this again')


if __name__ == '__main__':
    run_main(main, __name__)
