"""
OpenWebText in GPT-2's tokens: train.bin (17 GB), val.bin and meta.json from 21 subsets of 0.6 GB.

    python data/openwebtext/prepare.py --subsets=21

Each subset becomes a dataset of its own, in data/openwebtext/subset00 and so on. At the end they
are joined. Run the same command again to continue after an interruption.
"""
import glob
import hashlib
import io
import lzma
import os
import shutil
import sys
import tarfile

import numpy as np

sys.path.insert(0, os.path.abspath(__file__ + '/../../..'))  # the project's folder
from configurator import fail, run_main
from data.build import tokenize, write_tokens
from data.dataset import SPLITS, is_val, read_meta
from data.downloads import DownloadError, download_resumable, hub_address
from data.files import DATA_DIR, need_space
from data.tokenizers import GPT2Tokenizer

subsets = 21  # number of subsets, at most 21

VAL_FRACTION = 0.0005  # of the documents
SOURCE = 'Skylion007/openwebtext'


def main():
    if not 1 <= subsets <= 21:
        fail(f'--subsets={subsets}: subsets is at least 1 and at most 21')
    whole = os.path.join(DATA_DIR, 'openwebtext')
    folders = [os.path.join(whole, f'subset{i:02}') for i in range(subsets)]
    # the tokens of the subsets, the same tokens joined, and the text of one subset
    have = sum(map(os.path.getsize, glob.glob(f'{whole}/subset*/*.bin')))
    need_space(whole, max(0, 860_000_000 * subsets - have) + 860_000_000 * subsets + 625_000_000)
    tokenizer = GPT2Tokenizer()
    for folder in folders:
        if not os.path.exists(os.path.join(folder, 'train.bin')):  # the last file to be complete
            prepare_subset(folder, tokenizer)
    metas = [read_meta(f'openwebtext/{os.path.basename(folder)}') for folder in folders]
    tokens = {split: sum(meta['tokens'][split] for meta in metas) for split in SPLITS}
    identity = hashlib.sha256(repr((subsets, tokens)).encode()).hexdigest()
    write_tokens(whole, read_tokens(folders, metas), tokenizer, SOURCE, identity)
    for folder in folders:
        shutil.rmtree(folder)
    print('now train on it: python train.py config/train_gpt2.py')


def prepare_subset(folder, tokenizer):
    """Download a subset and write its tokens to folder."""
    name = f'urlsf_{os.path.basename(folder)}.tar'
    url = f'{hub_address()}/datasets/{SOURCE}/resolve/main/subsets/{name}'
    tar = os.path.join(folder, name)
    try:
        download_resumable(url, tar)
        write_tokens(folder, tokenize(read_documents(tar), tokenizer), tokenizer, SOURCE, name)
    except DownloadError as e:
        fail(str(e))
    except (tarfile.TarError, lzma.LZMAError, EOFError) as e:
        os.remove(tar)
        fail(f'{tar} was damaged ({e}) and is removed: run this again to continue')
    os.remove(tar)


def read_documents(tar):
    """Yield (split, text) of each document in a subset; then None instead of its text."""
    with tarfile.open(tar, 'r|') as archives:
        for member in archives:
            if member.name.endswith('.xz'):
                archive = archives.extractfile(member).read()
                yield from read_archive(io.BytesIO(archive))


def read_archive(archive):
    """Do the same for an archive of a subset."""
    with tarfile.open(fileobj=archive, mode='r|xz') as documents:
        for member in documents:
            if member.name.endswith('.txt'):
                text = documents.extractfile(member).read()
                split = 'val' if is_val(text, VAL_FRACTION) else 'train'
                yield split, text.decode('utf-8', errors='replace')
                yield split, None


def read_tokens(folders, metas):
    """Yield (split, ids, bytes of text) of the subsets in the folders."""
    for folder, meta in zip(folders, metas):
        for split in SPLITS:
            ids = np.fromfile(os.path.join(folder, f'{split}.bin'), np.uint16)
            yield split, ids, meta['bytes'][split]


if __name__ == '__main__':
    run_main(main, __name__)
