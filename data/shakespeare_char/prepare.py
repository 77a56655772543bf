"""
Shakespeare, one token per character. Downloads the text unless you give a copy of it.

    python data/shakespeare_char/prepare.py [--input=tinyshakespeare.txt]
"""
import os
import sys

sys.path.insert(0, os.path.abspath(__file__ + '/../../..'))  # the project's folder
from configurator import run_main
from data.build import write_dataset
from data.shakespeare.prepare import shakespeare

input = ''  # UTF-8 text to use instead of the download


def main():
    write_dataset('shakespeare_char', input or shakespeare(), 'char')


if __name__ == '__main__':
    run_main(main, __name__)
