"""
Shakespeare, one token per character. Downloads the text unless you give a copy of it.

    python data/shakespeare_char/prepare.py [--input=tinyshakespeare.txt]

For your own text, copy this folder to data/NAME, and put the text beside this file as input.txt.
"""
import os
import sys

sys.path.insert(0, os.path.abspath(__file__ + '/../../..'))  # the project's folder
from configurator import run_main
from data.shakespeare.prepare import prepare_folder

input = ''  # UTF-8 text to use instead of the download


def main():
    prepare_folder(__name__, input, 'char', 'config/train_shakespeare_char.py --max_iters=500')


if __name__ == '__main__':
    run_main(main, __name__)
