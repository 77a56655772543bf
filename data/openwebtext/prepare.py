"""
OpenWebText in GPT-2's tokens: train.bin (17 GB), val.bin and meta.json from 21 subsets of 0.6 GB.

    python data/openwebtext/prepare.py --subsets=21

Run the same command again to continue after an interruption: what is downloaded stays, and the
tokens are written anew. Later, you can remove the subsets, urlsf_*.tar (13 GB).
"""
import hashlib
import lzma
import os
import sys
import tarfile

sys.path.insert(0, os.path.abspath(__file__ + '/../../..'))  # the project's folder
from configurator import fail, one_line_errors, run_main
from data.build import tokenize, write_tokens
from data.dataset import is_val
from data.downloads import download, hub_address
from data.tokenizers import GPT2Tokenizer

subsets = 21  # number of subsets
LIMITS = {'subsets': (1, 21)}

FOLDER = os.path.dirname(os.path.abspath(__file__))
VAL_FRACTION = 0.0005  # of the documents
SOURCE = 'Skylion007/openwebtext'


def main():
    tokenizer = GPT2Tokenizer()
    names = [f'urlsf_subset{i:02}.tar' for i in range(subsets)]
    base = f'{hub_address()}/datasets/{SOURCE}/resolve/main/subsets'
    with one_line_errors(f'{names[0]} to {names[-1]} of {base} belong in {FOLDER}: '):
        for name in names:
            download(f'{base}/{name}', os.path.join(FOLDER, name))
    write_tokens(FOLDER, tokenize(read_documents(names), tokenizer), tokenizer, SOURCE,
                 hashlib.sha256(repr(names).encode()).hexdigest())
    print('now train on it: python train.py config/train_gpt2.py')


def read_documents(names):
    """Yield (split, text) of each document in the subsets; then None instead of its text."""
    for name in names:
        path = os.path.join(FOLDER, name)
        try:
            for archive in members('.xz', name=path, mode='r|'):
                for document in members('.txt', fileobj=archive, mode='r|xz'):
                    text = document.read()
                    split = 'val' if is_val(text, VAL_FRACTION) else 'train'
                    yield split, text.decode('utf-8', errors='replace')
                    yield split, None
        except (tarfile.TarError, lzma.LZMAError, EOFError) as e:
            os.remove(path)
            fail(f'{path} was damaged ({e}) and is removed: run this again to continue')


def members(suffix, **source):
    """Yield the files in a tar archive whose names end with suffix."""
    with tarfile.open(**source) as archive:
        for member in archive:
            if member.name.endswith(suffix):
                yield archive.extractfile(member)


if __name__ == '__main__':
    run_main(main, __name__)
