"""
Datasets that nanoGPT prepared: train.bin, val.bin, and the vocabulary in meta.pkl.

nanoGPT writes uint16, and no meta.pkl if the ids are GPT-2's.
"""
import os
import pickle


class PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, strings and numbers. Nothing else in a pickle is run or made."""

    def find_class(self, module, name):
        raise ValueError(f'it needs {module}.{name}, and quill reads plain values only')


def prepared_here(folder):
    """Return whether the folder has a meta.pkl, or a prepare.py that writes no meta.json."""
    script = read_script(folder)
    ours = any(word in script for word in ('meta.json', 'write_dataset', 'write_meta'))
    return os.path.exists(os.path.join(folder, 'meta.pkl')) or bool(script) and not ours


def outdated(folder):
    """Return whether a folder of nanoGPT has both .bin files, and no meta.json as new as they."""
    if not prepared_here(folder):
        return False
    names = ('train.bin', 'val.bin', 'meta.json')
    train, val, meta = (os.path.join(folder, name) for name in names)
    if not os.path.isfile(train) or not os.path.isfile(val):
        return False
    # nanoGPT's prepare.py, run again, leaves the old meta.json
    newest = max(os.path.getmtime(train), os.path.getmtime(val))
    return not os.path.exists(meta) or os.path.getmtime(meta) < newest


def read_vocabulary(folder):
    """Return the tokenizer of a folder of nanoGPT, as to_dict of data/tokenizers.py returns it.

    ValueError says why quill cannot tell what the ids mean.
    """
    path = os.path.join(folder, 'meta.pkl')
    if not os.path.exists(path):
        if 'gpt2' in read_script(folder):
            return {'kind': 'gpt2'}
        raise ValueError('nothing in it tells what its ids mean: there is no meta.pkl, and its '
                         "prepare.py does not name GPT-2's tokens (gpt2)")
    try:
        with open(path, 'rb') as f:
            meta = PlainUnpickler(f).load()
    except Exception as e:  # a damaged pickle can raise anything
        raise ValueError(f'its meta.pkl cannot be read: {e}')
    if not isinstance(meta, dict):
        raise ValueError(f'its meta.pkl holds a {type(meta).__name__} instead of a dict')
    itos, stoi, size = (meta.get(key) for key in ('itos', 'stoi', 'vocab_size'))
    if not itos and not stoi and size in (50257, 50304):  # 50304: padded
        return {'kind': 'gpt2'}
    if isinstance(stoi, dict) and not itos:
        itos = {i: token for token, i in stoi.items()}
    if isinstance(itos, (list, tuple)):
        itos = dict(enumerate(itos))
    if not isinstance(itos, dict) or not itos:
        raise ValueError('its meta.pkl has no vocabulary (stoi, itos)')
    tokens = [itos.get(i) for i in range(len(itos))]
    if not all(isinstance(token, str) for token in tokens):
        raise ValueError(f'in its meta.pkl, itos has not a text for each id from 0 to '
                         f'{len(itos) - 1}')
    if words := [token for token in tokens if len(token) != 1]:
        raise ValueError(f'the vocabulary in its meta.pkl has {words[0]!r}, and quill reads '
                         'vocabularies of single characters only')
    if len(set(tokens)) < len(tokens) or size not in (None, len(tokens)) \
            or stoi not in (None, {token: i for i, token in enumerate(tokens)}):
        raise ValueError('in its meta.pkl, stoi, itos and vocab_size contradict each other')
    return {'kind': 'char', 'chars': ''.join(tokens)}


def read_script(folder):
    """Return the text of the folder's prepare.py, empty if there is none."""
    path = os.path.join(folder, 'prepare.py')
    if not os.path.exists(path):
        return ''
    with open(path, encoding='utf-8', errors='replace') as f:
        return f.read()
