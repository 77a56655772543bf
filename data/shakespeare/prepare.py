"""
Shakespeare in GPT-2's tokens: downloads the text, or takes your copy, and writes train.bin, val.bin, meta.json.

    python data/shakespeare/prepare.py [--input=tinyshakespeare.txt]
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))  # quill's folder
from configurator import configure
from data.common import shakespeare, write_dataset

input = ''  # a UTF-8 text to use instead of the download


def main():
    write_dataset('shakespeare', input or shakespeare(), 'gpt2')


if __name__ == '__main__':
    configure(globals())
    main()
