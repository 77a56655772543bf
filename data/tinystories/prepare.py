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
from data.files import DATA_DIR, need_space

mb = 0  # megabytes of stories to train on; 0: all of them
vocab_size = 4096  # number of tokens

SIZES = 2_230_000_000, 23_000_000  # bytes of the stories for training and validation, about
SEPARATOR = '<|endoftext|>'  # between two stories


def main():
    if mb < 0 or not 257 <= vocab_size <= 65536:
        fail(f'--mb={mb} --vocab_size={vocab_size}: mb is at least 0, vocab_size is at least 257 '
             'and at most 65,536')
    end = mb * 1_000_000
    folder = os.path.join(DATA_DIR, 'tinystories')
    have = sum(os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder)
               if name.startswith('TinyStories'))
    size = (end or SIZES[0]) + SIZES[1]
    need_space(folder, max(0, size - have) + 0.6 * size, 'the stories and their tokens take')
    train = download_stories('train', end)
    val = download_stories('valid')
    texts = Texts(train, val, separator=SEPARATOR)
    write_dataset('tinystories', texts, 'bpe', vocab_size=vocab_size, val_paths=[val])
    print('now train on it: python train.py config/train_tinystories.py')


def download_stories(kind, end=0):
    """Return the path of the stories, downloaded if they are missing: all, or up to byte `end`."""
    name = f'TinyStoriesV2-GPT4-{kind}'
    url = f'{hub_address()}/datasets/roneneldan/TinyStories/resolve/main/{name}.txt'
    part = f'-{end // 1_000_000}MB' if end else ''
    path = os.path.join(DATA_DIR, 'tinystories', f'{name}{part}.txt')
    try:
        if not os.path.exists(path):
            download_resumable(url, path, end=end)
    except DownloadError as e:
        fail(f'{e}: run this again to continue')
    end_with_a_story(path)
    return path


def end_with_a_story(path):
    """Remove what follows the last separator in a file: the beginning of a story."""
    size = os.path.getsize(path)
    with open(path, 'rb') as f:
        begin = f.seek(max(0, size - 1_000_000))
        before, found, rest = f.read().rpartition(SEPARATOR.encode())
    if not found:
        os.remove(path)
        fail(f'{path}: there was no {SEPARATOR} near its end, so it is removed: run this again')
    if rest.strip():
        os.truncate(path, begin + len(before) + len(found))


if __name__ == '__main__':
    run_main(main, __name__)
