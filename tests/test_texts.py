"""Datasets from texts of any size: what is read, how it is divided, tokens of one's own."""
import gzip
import hashlib
import io
import json
import os
import random
import subprocess
import sys
import time

import data.text.prepare as own_text
import sample
from configurator import configure
from data import build, dataset, files
from data.build import Texts, find_files
from data.tokenizers import CharTokenizer, tokenizer_from_dict

import numpy as np
import pytest
import torch
from conftest import made_up_text, script, snapshot

SCRIPTS = {
    'latin': 'Où est l’élève naïf ? Ça va très bien, merci.\n',
    'cyrillic': 'Съешь ещё этих мягких французских булок.\n',
    'arabic': 'نص عربي قصير للاختبار.\n',
    'devanagari': 'यह हिन्दी में एक वाक्य है।\n',
    'chinese': '這是一個簡短的中文句子。\n',
    'emoji': 'Family 👨‍👩‍👧‍👦, flag 🏳️‍🌈, thumb 👍🏽!\n',
}


def prepare(source, name, *more):
    """Run data/text/prepare.py in this process; return (meta, ids for training, for validation)."""
    try:
        configure('data.text.prepare', [f'--input={source}', f'--name={name}', *more])
        own_text.main()
    finally:
        configure('data.text.prepare', [])
    return read_dataset(name)


def read_dataset(name):
    meta = dataset.read_meta(name)
    return meta, *(np.fromfile(os.path.join(dataset.DATA_DIR, name, f'{split}.bin'), meta['dtype'])
                   for split in dataset.SPLITS)


def dataset_folder(name):
    return os.path.join(dataset.DATA_DIR, name)


def texts_of(ids, tokenizer):
    """Return the texts that end with an end-of-text token, and what follows the last of these."""
    parts = np.split(ids, np.flatnonzero(ids == tokenizer.eot) + 1)
    return [tokenizer.decode(part[part != tokenizer.eot]) for part in parts]


def refused(capsys, *arguments):
    """Return the error line of prepare.py."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        prepare(*arguments)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith('error: ') and err.count('\n') == 1
    return err


# -----------------------------------------------------------------------------
# what is read

def test_a_file_and_its_gz_are_one_dataset(text, tmp_path):
    whole = text.read_bytes()
    with gzip.open(tmp_path / 'topics.txt.gz', 'wb') as f:
        f.write(whole[:70_000])
    with gzip.open(tmp_path / 'topics.txt.gz', 'ab') as f:  # a file may have several parts
        f.write(whole[70_000:])
    meta, *ids = prepare(text, 'one')
    packed_meta, *packed_ids = prepare(tmp_path / 'topics.txt.gz', 'one')
    assert meta['source'] == 'topics.txt'
    assert meta['sha256'] == packed_meta['sha256'] == hashlib.sha256(whole).hexdigest()
    assert all(map(np.array_equal, ids, packed_ids))
    assert sorted(os.listdir(dataset_folder('one'))) == ['meta.json', 'train.bin', 'val.bin']


@pytest.mark.parametrize('kind', ['-', 'pipe'])
def test_what_can_be_read_only_once_is_refused(tmp_path, capsys, kind):
    source = '-'
    if kind == 'pipe':
        source = tmp_path / 'pipe'
        os.mkfifo(source)
    assert f'{source}: No such file' in (err := refused(capsys, source, 'once'))
    assert 'A pipe cannot be read twice' in err


def test_the_files_of_a_folder_or_a_pattern_are_found(tmp_path):
    for name in ('b.txt', 'a.txt', 'sub/c.txt', 'sub/d.md', '.hidden', '.git/x', 'odd[1].txt'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('x')

    def names(source):
        return [os.path.relpath(path, tmp_path) for path in find_files(str(source))]
    assert names(tmp_path) == ['a.txt', 'b.txt', 'odd[1].txt', 'sub/c.txt', 'sub/d.md']
    assert names(tmp_path / '*.txt') == ['a.txt', 'b.txt', 'odd[1].txt']
    assert names(tmp_path / '**' / '*.txt') == ['a.txt', 'b.txt', 'odd[1].txt', 'sub/c.txt']
    assert names(tmp_path / 'odd[1].txt') == ['odd[1].txt']
    assert names(tmp_path / 'sub' / '..' / 'a*') == ['a.txt']
    assert names(tmp_path / '.git' / '*') == ['.git/x']  # named by the user


def test_links_between_folders_form_no_endless_cycle(tmp_path, monkeypatch):
    for name in ('a', 'b', 'c'):
        (tmp_path / name).mkdir()
        (tmp_path / name / f'{name}.txt').write_text(name)
        for target in ('a', 'b', 'c'):  # with so many links, glob would find 3**40 paths
            (tmp_path / name / f'to-{target}').symlink_to(tmp_path / target)
    expected = ['a/a.txt', 'b/b.txt', 'c/c.txt']
    for source in (tmp_path, tmp_path / '**' / '*.txt'):
        assert [os.path.relpath(path, tmp_path) for path in find_files(str(source))] == expected
    monkeypatch.chdir(tmp_path)
    assert find_files('.') == find_files('*/?.txt') == find_files('**/?.txt') == expected
    assert find_files('c/to-a') == ['c/to-a/a.txt']  # a link that the user names
    with pytest.raises(SystemExit) as e:
        find_files('c**')
    assert e.value.code == 2


def test_each_file_and_each_line_of_jsonl_is_a_document(tmp_path):
    (tmp_path / 'b.txt').write_bytes(b'\xef\xbb\xbfThe second\r\nfile.')
    (tmp_path / 'c.jsonl').write_text('{"text": "a line\\r\\n"}\n\n{"id": 1, "text": "caf\\u00e9"}')
    with gzip.open(tmp_path / 'd.jsonl.gz', 'wt', encoding='utf-8') as f:
        f.write('{"text": "packed"}\n')
    (tmp_path / 'a.txt').write_text('The first file.')
    expected = ['The first file.', 'The second\nfile.', 'a line\n', 'café', 'packed']
    meta, train, val = prepare(tmp_path, 'documents', '--tokenizer=bpe', '--vocab_size=257')
    tokenizer = tokenizer_from_dict(meta['tokenizer'])
    assert tokenizer.eot == 256 and meta['vocab_size'] == 257
    assert texts_of(np.concatenate([train, val]), tokenizer) == [*expected, '']
    assert sum(meta['bytes'].values()) == len(''.join(expected).encode())
    # the end-of-text token of characters lies behind them
    meta, train, val = prepare(tmp_path, 'documents')
    tokenizer = tokenizer_from_dict(meta['tokenizer'])
    assert tokenizer.eot == len(tokenizer.chars) == meta['vocab_size'] - 1
    assert texts_of(np.concatenate([train, val]), tokenizer) == [*expected, '']
    assert sum(meta['bytes'].values()) == len(''.join(expected).encode())
    # a tokenizer of an older dataset has none, so a line break follows each document
    old = CharTokenizer(''.join(expected) + '\n').to_dict()
    build.write_dataset('old', build.Texts(str(tmp_path)), old)
    train, val = (np.fromfile(os.path.join(dataset_folder('old'), f'{split}.bin'), np.uint16)
                  for split in ('train', 'val'))
    tokenizer = tokenizer_from_dict(old)
    written = tokenizer.decode(train) + tokenizer.decode(val)
    assert written == ''.join(document + '\n' for document in expected)


def test_a_single_text_of_characters_has_no_end_of_text_and_the_same_ids_as_before(tmp_path):
    text = ''.join(f'{i} times {i} is {i * i}\n' for i in range(100))
    (tmp_path / 'x.txt').write_text(text)
    meta, train, val = prepare(tmp_path / 'x.txt', 'single')
    ids, eot = np.concatenate([train, val]), meta['tokenizer']['eot']
    assert eot == meta['vocab_size'] - 1 and eot not in ids
    assert ids.tolist() == CharTokenizer(text).encode(text).tolist()


def test_a_single_document_of_json_has_no_end_of_text_either(tmp_path):
    (tmp_path / 'x.jsonl').write_text('{"text": "one two three"}\n')
    meta, train, val = prepare(tmp_path / 'x.jsonl', 'single')
    tokenizer = tokenizer_from_dict(meta['tokenizer'])
    ids = np.concatenate([train, val])
    assert tokenizer.eot not in ids and tokenizer.decode(ids) == 'one two three'


@pytest.mark.parametrize('step', [1, 2, 3, 7, 1000])
def test_a_text_is_the_same_in_chunks_of_any_size(tmp_path, monkeypatch, capsys, step):
    raw = b'\xef\xbb\xbf' + 'é\r\n\r\r\n中\r👍🏽\n'.encode() * 3 + b'\r'
    (tmp_path / 'x.txt').write_bytes(raw)
    monkeypatch.setattr('data.build.BLOCK', step)
    *blocks, end = Texts(str(tmp_path / 'x.txt')).blocks('reading')
    lines = raw.decode('utf-8-sig').replace('\r\n', '\n').replace('\r', '\n')
    assert ''.join(blocks) == lines and end is None
    (tmp_path / 'x.txt').write_bytes(raw + b'abc\xff')
    with pytest.raises(SystemExit):
        list(Texts(str(tmp_path / 'x.txt')).blocks('reading'))
    assert f'not UTF-8 at byte {len(raw) + 3}:' in capsys.readouterr().err


def test_a_long_line_without_a_space_is_cut_somewhere(tmp_path, monkeypatch):
    monkeypatch.setattr('data.build.LONGEST', 160)
    monkeypatch.setattr('data.build.BLOCK', 10)
    (tmp_path / 'x.txt').write_text('x' * 1000)
    *blocks, end = Texts(str(tmp_path / 'x.txt')).blocks('reading')
    assert len(blocks) == 7 and ''.join(blocks) == 'x' * 1000 and end is None


def test_what_cannot_be_read_is_one_line_and_leaves_nothing(tmp_path, capsys):
    before = snapshot(dataset.DATA_DIR)
    (tmp_path / 'empty').mkdir()
    with gzip.open(tmp_path / 'cut.gz', 'wb') as f:
        f.write(os.urandom(5000))
    (tmp_path / 'cut.gz').write_bytes((tmp_path / 'cut.gz').read_bytes()[:3000])
    (tmp_path / 'late.txt').write_bytes(b'a\n' * (1 << 20) + b'caf\xe9')
    good = b'{"text": "good"}\n'
    lines = {'deep.jsonl': b'[' * 200_000, 'list.jsonl': b'["text"]', 'other.jsonl':
             b'{"content": "x"}', 'number.jsonl': b'{"text": 3}',
             'broken.jsonl': b'{"text": "x', 'half.jsonl': b'{"text": "\\ud800"}'}
    for name, line in lines.items():
        (tmp_path / name).write_bytes(good + line)
    for name, words in [('empty', 'No such file'), ('none*', 'No such file'),
                        ('cut.gz', 'cut.gz: '),
                        ('late.txt', f'not UTF-8 at byte {2 * (1 << 20) + 3}'),
                        *((name, f'{name}: document 2 is not JSON') for name in lines)]:
        assert words in refused(capsys, tmp_path / name, 'bad')
    for flag, words in (('--vocab_size=256', 'at least 257'),
                        ('--vocab_size=300', 'is for --tokenizer=bpe'),
                        ('--val_fraction=-0.1', 'must be between 0 and 1'),
                        ('--val_fraction=1.1', 'must be between 0 and 1')):
        more = ['--tokenizer=bpe'] if '=256' in flag else []
        assert words in refused(capsys, tmp_path / 'late.txt', 'bad', flag, *more)
    assert snapshot(dataset.DATA_DIR) == before


# name: a file whose texts are 'one é' and 'two'
OBJECTS = '{"id": 1, "text": "one \\u00e9"}\n\n{"text": "two"}'
READ_AS_JSON = {
    'lines.json': OBJECTS, 'LINES.JSONL': OBJECTS, 'lines.ndjson': OBJECTS, 'lines.txt': OBJECTS,
    'list.json': '[' + OBJECTS.replace('\n\n', ',\n\n') + ']\n', 'strings.json': '["one é", "two"]',
    'pretty.Json': json.dumps([{'text': 'one é'}, {'text': 'two'}], indent=1),
    'list.txt': ' [ {"text": "one é"}, {"text": "two"}]', 'strings.jsonl': '"one é"\n"two"',
    'strings.txt': '[ "one é", "two"]', 'mark.txt': '\ufeff' + OBJECTS}


@pytest.mark.parametrize('name', READ_AS_JSON)
@pytest.mark.parametrize('packed', ['', '.gz', 'in silence'])
def test_json_is_read_as_documents_whatever_its_name_is(tmp_path, name, packed):
    content = READ_AS_JSON[name].encode()
    path = tmp_path / (name if packed == 'in silence' else name + packed)
    path.write_bytes(gzip.compress(content) if packed else content)
    texts = Texts(str(path))
    assert list(texts.blocks('reading')) == ['one é', None, 'two', None]


def test_another_field_of_json_is_read_or_all_of_it(tmp_path, capsys):
    line = '{"text": "no", "content": "yes yes yes yes"}\n'
    (tmp_path / 'x.json').write_text(line * 2)
    meta, *ids = prepare(tmp_path / 'x.json', 'field', '--field=content')
    tokenizer = tokenizer_from_dict(meta['tokenizer'])
    assert ''.join(map(tokenizer.decode, ids)) == 'yes yes yes yes' * 2
    meta, *ids = prepare(tmp_path / 'x.json', 'field', '--field=')
    assert ''.join(map(tokenizer_from_dict(meta['tokenizer']).decode, ids)) == line * 2
    err = refused(capsys, tmp_path / 'x.json', 'field', '--field=body')
    assert 'document 1 is not JSON with a text in its field "body": give another --field' in err
    assert build.read_text(str(tmp_path / 'x.json')) == line * 2  # a prompt is no dataset


@pytest.mark.parametrize('prose', ['"Hello", she said.', '[Enter a king]', '{ braces } and more',
                                   '[[1, 2], 3]', '{x}'])
def test_prose_is_not_taken_for_json(tmp_path, prose):
    (tmp_path / 'x.txt').write_text(prose)
    texts = Texts(str(tmp_path / 'x.txt'))
    assert list(texts.blocks('reading')) == [prose, None]


def test_the_first_bytes_tell_a_packed_file_not_its_name(tmp_path):
    (tmp_path / 'plain.gz').write_bytes(b'not packed')
    (tmp_path / 'packed.txt').write_bytes(gzip.compress(b'packed'))
    assert build.read_text(str(tmp_path / 'plain.gz')) == 'not packed'
    assert build.read_text(str(tmp_path / 'packed.txt')) == 'packed'


CHINESE = '我能吞下玻璃而不伤身体。'
# name: (bytes of a file, words of its error)
NO_TEXT = {
    'book.docx': (b'PK\3\4' + bytes(50), 'a NUL at byte 4: save it as UTF-8'),
    'table.parquet': (b'PAR1' + bytes(50), 'a NUL at byte 4: '),
    'paper.txt': (b'%PDF-1.7\n%\xe2\xe3\xcf\xd3', 'not UTF-8 at byte 10: save its text as UTF-8'),
    'paper.txt.gz': (gzip.compress(b'%PDF-1.7\n%\xe2\xe3\xcf\xd3'), 'not UTF-8 at byte 10: '),
    'windows.txt': ('Déjà vu'.encode('utf-16'), 'a NUL at byte 3: '),
    'big.txt': (b'\xfe\xff' + 'Déjà vu'.encode('utf-16-be'), 'a NUL at byte 2: '),
    'little.txt': ('Plain words'.encode('utf-16-le'), 'a NUL at byte 1: '),
    'zeros.txt': (b'words ' * 50_000 + b'\0', 'a NUL at byte 300000:'),
    'chinese.txt': (CHINESE.encode('utf-16-le'), 'not UTF-8 at byte 2: '),
    'mark.txt': (CHINESE.encode('utf-16'), 'not UTF-8 at byte 0: '),
    'gbk.txt': (CHINESE.encode('gbk'), 'not UTF-8 at byte 0: '),
    'list.json': (b'[{"text": "one"}, {"text": "two"', 'list.json: document 1 is not JSON with a'),
    'item.json': (b'["one", {"text": 2}]', 'item.json: document 2 is not JSON with a text'),
    'object.json': (b'{\n "text": "one"\n}', 'object.json: document 1 is not JSON with a text'),
    'table.CSV': (b'id,text\n1,one\n', 'is a table: write its texts to a .jsonl file'),
    'table.tsv.gz': (gzip.compress(b'id\ttext\n1\tone\n'), 'is a table'),
}


@pytest.mark.parametrize('name', NO_TEXT)
def test_what_is_no_plain_text_is_refused_with_the_way_out(tmp_path, capsys, name):
    before = snapshot(dataset.DATA_DIR)
    content, words = NO_TEXT[name]
    (tmp_path / name).write_bytes(content)
    err = refused(capsys, tmp_path / name, 'foreign')
    assert words in err and name in err and 'iconv' not in err
    assert snapshot(dataset.DATA_DIR) == before


# -----------------------------------------------------------------------------
# training and validation

@pytest.mark.parametrize('fraction, n', [('0.1', 900), ('0.25', 750), ('0.001', 999)])
def test_the_end_of_a_text_is_for_validation(tmp_path, fraction, n):
    letters = ''.join(random.Random(1).choices('abc \n', k=1000))
    (tmp_path / 'x.txt').write_text(letters)
    meta, train, val = prepare(tmp_path / 'x.txt', 'end', f'--val_fraction={fraction}')
    tokenizer = tokenizer_from_dict(meta['tokenizer'])
    assert tokenizer.decode(train) == letters[:n] and tokenizer.decode(val) == letters[n:]


def test_of_few_documents_the_end_is_for_validation(tmp_path):
    for i in range(4):
        (tmp_path / f'{i}.txt').write_text(str(i) * 25)
    meta, train, val = prepare(tmp_path, 'few', '--tokenizer=bpe', '--vocab_size=257',
                               '--val_fraction=0.25')
    tokenizer = tokenizer_from_dict(meta['tokenizer'])
    assert texts_of(train, tokenizer) == ['0' * 25, '1' * 25, '2' * 25, '']
    assert texts_of(val, tokenizer) == ['3' * 25, '']


def test_of_many_documents_a_hash_chooses_those_for_validation(tmp_path, monkeypatch):
    documents = [f'Document {i} is here.' for i in range(500)]
    chosen = []
    for order in (documents, documents[::-1]):
        path = tmp_path / 'x.jsonl'
        path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in order))
        meta, train, val = prepare(path, 'many', '--tokenizer=bpe', '--vocab_size=300')
        tokenizer = tokenizer_from_dict(meta['tokenizer'])
        *train, _ = texts_of(train, tokenizer)
        *val, _ = texts_of(val, tokenizer)
        assert train == [text for text in order if text not in val] and 25 < len(val) < 80
        chosen.append(set(val))
        assert meta['bytes']['val'] == len(''.join(val))
    assert chosen[0] == chosen[1]
    _, _, more = prepare(path, 'many', '--tokenizer=bpe', '--vocab_size=300', '--val_fraction=0.5')
    assert chosen[0] < set(texts_of(more, tokenizer)) and 200 < len(texts_of(more, tokenizer)) < 300
    # a long document is for one of the two as a whole
    monkeypatch.setattr('data.build.BLOCK', 10)
    meta, train, val = prepare(path, 'many', '--tokenizer=bpe', '--vocab_size=300')
    tokenizer = tokenizer_from_dict(meta['tokenizer'])
    assert sorted(texts_of(train, tokenizer)[:-1] + texts_of(val, tokenizer)[:-1]) \
        == sorted(documents)


def test_a_very_long_space_is_tokenized(tmp_path):
    text = 'word' + ' ' * 1_200_000 + 'word'  # tiktoken fails at a million
    (tmp_path / 'x.txt').write_text(text)
    meta, train, val = prepare(tmp_path / 'x.txt', 'space', '--tokenizer=bpe', '--vocab_size=270')
    tokenizer = tokenizer_from_dict(meta['tokenizer'])
    assert tokenizer.decode(train) + tokenizer.decode(val) == text


def test_files_of_a_killed_process_are_removed(tmp_path):
    folder = dataset_folder('killed')
    os.makedirs(folder)
    open(os.path.join(folder, 'train.bin.123.tmp'), 'w').close()
    (tmp_path / 'x.txt').write_text('some text\n' * 100)
    prepare(tmp_path / 'x.txt', 'killed')
    assert sorted(os.listdir(folder)) == ['meta.json', 'train.bin', 'val.bin']


def test_while_one_process_writes_a_dataset_another_waits(project, text, tmp_path):
    command = [sys.executable, '-c', f"""
import sys, time
sys.path.insert(0, {str(project)!r})
from data import build
write_meta = build.write_meta
def slow(*arguments):
    print('writing', flush=True)
    time.sleep(1)
    write_meta(*arguments)
    print('written', flush=True)
build.write_meta = slow
build.write_dataset('shared', {str(text)!r}, 'char')"""]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while 'writing' not in first.stdout.readline():
        pass
    second = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert 'written' in first.communicate()[0] and first.returncode == 0
    assert 'written' in second.communicate()[0] and second.returncode == 0
    assert sorted(os.listdir(dataset_folder('shared'))) == ['meta.json', 'train.bin', 'val.bin']
    meta, train, val = read_dataset('shared')
    assert meta['tokens'] == {'train': len(train), 'val': len(val)} and len(train) == 135_000


def test_a_split_without_text_is_refused(tmp_path, capsys):
    (tmp_path / 'x.txt').write_text('abc' * 10)
    assert 'there is no text for train' in refused(capsys, tmp_path / 'x.txt', 'none',
                                                 '--val_fraction=0.999')
    assert os.listdir(dataset_folder('none')) == []


# -----------------------------------------------------------------------------
# tokens

def test_tokens_of_ones_own_hold_any_text(project, tmp_path, capsys, train_run):
    mixed = ''.join(SCRIPTS.values()) * 40
    (tmp_path / 'mixed.txt').write_text(mixed, encoding='utf-8')
    meta, train, val = prepare(tmp_path / 'mixed.txt', 'mixed', '--tokenizer=bpe',
                               '--vocab_size=400')
    tokenizer = tokenizer_from_dict(meta['tokenizer'])
    assert tokenizer.vocab_size == meta['vocab_size'] == 400 and tokenizer.eot == 399
    assert tokenizer.decode(train) + tokenizer.decode(val) == mixed
    assert len(train) + len(val) < len(mixed.encode()) / 2.5
    # a model of these tokens needs no dataset to write, and another text can take the same tokens
    train_run('--dataset=mixed', '--max_iters=2', '--sample_tokens=4', out=tmp_path / 'out')
    (tmp_path / 'new.txt').write_text('Any other text: naïve 中文 👍🏽.\n' * 9, encoding='utf-8')
    again, *ids = prepare(tmp_path / 'new.txt', 'mixed', f'--tokenizer={tmp_path / "out"}')
    assert again['tokenizer'] == meta['tokenizer']
    assert ''.join(map(tokenizer.decode, ids)) == 'Any other text: naïve 中文 👍🏽.\n' * 9
    capsys.readouterr()
    configure('sample', [f'--out_dir={tmp_path / "out"}', '--num_samples=1',
                             '--max_new_tokens=5', '--start=Où 中'])
    sample.main()
    configure('sample', [])
    assert '[Où 中]' in capsys.readouterr().out


def test_transformers_reads_and_writes_tokens_of_ones_own(tmp_path, train_run):
    transformers = pytest.importorskip('transformers')
    (tmp_path / 'mixed.txt').write_text(''.join(SCRIPTS.values()) * 40, encoding='utf-8')
    prepare(tmp_path / 'mixed.txt', 'mixed', '--tokenizer=bpe', '--vocab_size=500')
    train_run('--dataset=mixed', '--max_iters=2', '--sample_tokens=0', out=tmp_path / 'out')
    configure('sample', [f'--out_dir={tmp_path / "out"}', f'--export={tmp_path / "hf"}'])
    sample.main()
    configure('sample', [])
    model, ours = sample.load(str(tmp_path / 'out'))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
    for text in (*SCRIPTS.values(), '\n\n  two\n lines  \n', '   leading', 'naïve\t\tcafé', "I'll",
                 '1234567 89', 'a\r\nb', '👨‍👩‍👧‍👦', 'क्षि'):
        ids = ours.encode(text).tolist()
        assert theirs(text)['input_ids'] == ids and theirs.decode(ids) == text
    assert theirs.eos_token_id == ours.eot
    write = transformers.pipeline('text-generation', model=str(tmp_path / 'hf'))
    text = write('Où est', max_new_tokens=5, do_sample=False)[0]['generated_text']
    idx = torch.from_numpy(ours.encode('Où est').astype(np.int64))[None]
    tokens = [token.item() for token in model.generate(idx, 5, temperature=0)]
    assert text == 'Où est' + ours.decode(tokens)


def test_the_command_that_follows_trains_for_two_and_a_half_epochs(tmp_path, capsys):
    for length, updates in ((455_112, 250), (10_000, 100)):
        (tmp_path / 'x.txt').write_text('abcdefgh' * (length // 8))
        prepare(tmp_path / 'x.txt', 'novel')
        assert capsys.readouterr().out.splitlines()[-1] == (
            'now train on it: python train.py config/speedrun_shakespeare_char.py --dataset=novel '
            f'--out_dir=out-novel --max_iters={updates}')


def test_a_small_text_has_fewer_tokens_than_asked_for(tmp_path, capsys):
    (tmp_path / 'x.txt').write_text('abababab ' * 20)
    meta, *_ = prepare(tmp_path / 'x.txt', 'small', '--tokenizer=bpe')
    assert 257 < meta['vocab_size'] < 280
    assert f'vocabulary: {meta["vocab_size"]} byte pairs' in capsys.readouterr().out


def test_a_tokenizer_of_a_large_text_is_trained_on_a_sample(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, 'SAMPLE', 20_000)
    monkeypatch.setattr('data.build.BLOCK', 1000)
    (tmp_path / 'x.txt').write_text('begin ' * 8000 + 'end ' * 12_000)
    meta, *_ = prepare(tmp_path / 'x.txt', 'sampled', '--tokenizer=bpe', '--vocab_size=300')
    sampled = capsys.readouterr().out.split('training 300 tokens on ')[1].split()[0]
    assert 18_000 < int(sampled.replace(',', '')) < 24_000
    assert {'Ġbegin', 'Ġend'} < set(meta['tokenizer']['tokens'])  # it is spread over the text


def test_more_than_65536_characters_take_four_bytes(tmp_path, process):
    characters = [chr(i) for i in (*range(0x4e00, 0xa000), *range(0x20000, 0x2c000))]
    text = ''.join(characters * 2)
    (tmp_path / 'x.txt').write_text(text, encoding='utf-8')
    meta, train, val = prepare(tmp_path / 'x.txt', 'wide')
    assert meta['dtype'] == 'uint32' and meta['vocab_size'] == len(characters) + 1 > 65536
    tokenizer = tokenizer_from_dict(meta['tokenizer'])
    assert tokenizer.decode(train) + tokenizer.decode(val) == text
    assert train.max() > 65536
    _, opened, _ = dataset.open_dataset('wide', 16, process)
    x, y = opened.read([70_000])
    assert tokenizer.decode(x[0]) == text[70_000:70_016] and (x[0, 1:] == y[0, :-1]).all()


# -----------------------------------------------------------------------------
# interruptions, progress, memory

@pytest.mark.parametrize('kind', ['interrupted', 'full'])
def test_an_interruption_leaves_the_older_dataset_as_it_was(text, tmp_path, capsys, monkeypatch,
                                                            kind):
    prepare(text, 'older')
    folder = dataset_folder('older')
    before = snapshot(folder)
    (tmp_path / 'x.txt').write_text('another text\n' * 1000)

    def stop(*_):
        raise KeyboardInterrupt if kind == 'interrupted' else OSError(28, 'No space left')
    monkeypatch.setattr(build, 'encode', stop)
    with pytest.raises(KeyboardInterrupt if kind == 'interrupted' else SystemExit):
        prepare(tmp_path / 'x.txt', 'older')
    if kind == 'full':
        assert 'error: cannot write' in capsys.readouterr().err
    assert snapshot(folder) == before


def test_progress_tells_the_fraction_and_the_time_left(monkeypatch, tmp_path):
    err = io.StringIO()
    err.isatty = lambda: True
    monkeypatch.setattr(sys, 'stderr', err)
    monkeypatch.setattr(time, 'monotonic', iter(range(100)).__next__)  # every look takes 1 s
    done = iter([3_000_000, 6_000_000])
    list(files.show_progress(iter('abc'), 'reading', 12_000_000, lambda: next(done)))
    lines = [line.strip() for line in err.getvalue().split('\r')]
    assert [line for line in lines if line] == [
        'reading: 25%, 6 s left', 'reading: 50%, 3 s left']


@pytest.mark.slow
@pytest.mark.parametrize('kind', [['--tokenizer=char'], ['--tokenizer=bpe', '--vocab_size=300']])
def test_the_memory_does_not_grow_with_the_text(project, tmp_path, kind):
    part = made_up_text(1_000_000).encode()
    peaks = []
    for n in (1, 150):
        with open(tmp_path / 'x.txt', 'wb') as f:
            f.writelines([part] * n)
        (tmp_path / 'peak.py').write_text(f"""
import resource, subprocess, sys
subprocess.run([sys.executable, 'data/text/prepare.py', '--input={tmp_path / "x.txt"}',
                '--name=big', *{kind}], check=True)
print('peak', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
""")
        out, _ = script(project, tmp_path / 'peak.py')
        peaks.append(int(out.split('peak ')[1]) // 1000)
    assert peaks[1] < peaks[0] + 150, peaks  # MB; the text alone has 150
    assert peaks[1] < 1000


# -----------------------------------------------------------------------------
# small mistakes that no other test would notice

def test_an_empty_document_is_none(tmp_path):
    (tmp_path / 'a.txt').write_text('first')
    (tmp_path / 'b.txt').write_bytes(b'')
    (tmp_path / 'c.jsonl').write_text('{"text": ""}\n{"text": "second"}\n')
    texts = Texts(str(tmp_path))
    assert list(texts.blocks('reading')) == ['first', None, 'second', None]
    assert texts.documents == 2


@pytest.mark.parametrize('n', [99, 100])
def test_a_hash_chooses_from_100_documents_on(tmp_path, n):
    documents = [f'Document {i} is here.' for i in range(n)]
    (tmp_path / 'x.jsonl').write_text(''.join(f'{{"text": "{text}"}}\n' for text in documents))
    meta, train, val = prepare(tmp_path / 'x.jsonl', 'hundred', '--tokenizer=bpe',
                               '--vocab_size=300', '--val_fraction=0.5')
    chosen = texts_of(val, tokenizer_from_dict(meta['tokenizer']))
    assert (set(documents[-20:]) <= set(chosen)) == (n == 99)  # the end, or half of all


def test_the_fraction_for_validation_is_one_of_the_characters_that_are_kept(tmp_path):
    (tmp_path / 'x.txt').write_text('?' * 100 + 'ab' * 50)
    build.write_dataset('kept', str(tmp_path / 'x.txt'), {'kind': 'char', 'chars': 'ab'}, drop=True)
    assert read_dataset('kept')[0]['tokens'] == {'train': 90, 'val': 10}
