"""
OpenWebText in GPT-2's tokens: train.bin (17 GB), val.bin and meta.json from 21 subsets of 0.6 GB.

    python data/openwebtext/prepare.py --subsets=21

Each subset becomes a dataset of its own, in data/openwebtext/subset00 and so on. At the end they
are joined. Run the same command again to continue after an interruption.
"""
import hashlib
import lzma
import os
import shutil
import sys
import tarfile

import numpy as np

sys.path.insert(0, os.path.abspath(__file__ + '/../../..'))  # the project's folder
from configurator import fail, one_line_errors, run_main
from data.build import tokenize, write_tokens
from data.dataset import SPLITS, is_val, read_meta
from data.downloads import download, hub_address
from data.files import DATA_DIR
from data.tokenizers import GPT2Tokenizer

subsets = 21  # number of subsets
LIMITS = {'subsets': (1, 21)}

VAL_FRACTION = 0.0005  # of the documents
SOURCE = 'Skylion007/openwebtext'


def main():
    whole = os.path.join(DATA_DIR, 'openwebtext')
    folders = [os.path.join(whole, f'subset{i:02}') for i in range(subsets)]
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
    whole, name = os.path.split(folder)
    tar = os.path.join(whole, f'urlsf_{name}.tar')
    base = f'{hub_address()}/datasets/{SOURCE}/resolve/main/subsets'
    with one_line_errors():
        download(f'{base}/urlsf_{name}.tar', tar)
    try:
        write_tokens(folder, tokenize(read_documents(tar), tokenizer), tokenizer, SOURCE, name)
    except (tarfile.TarError, lzma.LZMAError, EOFError) as e:
        os.remove(tar)
        fail(f'{tar} was damaged ({e}) and is removed: run this again to continue')
    os.remove(tar)


def read_documents(tar):
    """Yield (split, text) of each document in a subset; then None instead of its text."""
    for archive in members('.xz', name=tar, mode='r|'):
        for document in members('.txt', fileobj=archive, mode='r|xz'):
            text = document.read()
            split = 'val' if is_val(text, VAL_FRACTION) else 'train'
            yield split, text.decode('utf-8', errors='replace')
            yield split, None


def members(suffix, **source):
    """Yield the files in a tar archive whose names end with suffix."""
    with tarfile.open(**source) as archive:
        for member in archive:
            if member.name.endswith(suffix):
                yield archive.extractfile(member)


def read_tokens(folders, metas):
    """Yield (split, ids, bytes of text) of the subsets in the folders."""
    for folder, meta in zip(folders, metas):
        for split in SPLITS:
            ids = np.fromfile(os.path.join(folder, f'{split}.bin'), np.uint16)
            yield split, ids, meta['bytes'][split]


if __name__ == '__main__':
    run_main(main, __name__)
