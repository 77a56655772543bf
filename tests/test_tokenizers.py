"""Tokenizers and Hugging Face's files of them, checked against transformers and tokenizers."""
import json
import os
import re

import numpy as np
import pytest
import torch
from conftest import TINY

import data.text.prepare as own_text
import sample
import train
from configurator import configure
from data import bpe as bpe_training
from data import dataset, huggingface
from data.tokenizers import (
    BytePairTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    pretrained_tokenizer,
    tokenizer_from_dict,
    tokenizer_size,
)
from sample import encode_prompt

transformers = pytest.importorskip('transformers')
tokenizers = pytest.importorskip('tokenizers')

GPT4_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+')
TEXTS = [
    'What is an LLM?\n\n  Two spaces,\ttab  \n', ' leading', 'Ça fait déjà 1234 œufs à l’été.',
    'Съешь же ещё этих мягких булок, да выпей чаю', 'نص حكيم له سر قاطع',
    'हिन्दी में एक वाक्य', '我能吞下玻璃而不伤身体。',
    'family 👩\u200d👩\u200d👧\u200d👦 flag 🏳️\u200d🌈!', '<|endoftext|>', '\x00\r\n\u2028\ufeff',
    "don't DON'T we'll", '', ' ', '\n', 'a' * 1000, '.' * 300, ' ' * 99]


def trained(pattern, size, special=()):
    """Return byte-level BPE that the library tokenizers trained on TEXTS."""
    whole = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False,
                                                     use_regex=pattern is None)
    whole.pre_tokenizer = byte_level
    if pattern:
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), 'isolated')
        whole.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    whole.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    whole.train_from_iterator(TEXTS * 3 + [bpe_training.__doc__] * 2, trainer)
    return whole


@pytest.fixture
def folder(tmp_path):
    """A folder with the tokenizer.json of 400 byte pairs in GPT-4's pieces."""
    trained(GPT4_PATTERN, 400, ['<|endoftext|>', '[PAD]']).save(str(tmp_path / 'tokenizer.json'))
    return tmp_path


@pytest.mark.parametrize('pattern', [None, GPT4_PATTERN], ids=['gpt2', 'gpt4'])
@pytest.mark.parametrize('special', [(), ('<|endoftext|>', '[PAD]')], ids=['plain', 'special'])
def test_byte_pairs_of_ones_own_equal_those_of_tokenizers(tmp_path, pattern, special):
    theirs = trained(pattern, 500, special)
    theirs.save(str(tmp_path / 'tokenizer.json'))
    saved = pretrained_tokenizer(str(tmp_path), 512)
    ours = tokenizer_from_dict(json.loads(json.dumps(saved)))
    assert ours.vocab_size == theirs.get_vocab_size() == tokenizer_size(saved)
    assert ours.to_dict() == saved and ours.eot == (0 if special else None)
    assert len(huggingface.merges_of(saved)) == ours.vocab_size - 256 - len(special)
    theirs.encode_special_tokens = True  # texts of special tokens are plain text in quill
    for text in TEXTS:
        ids = ours.encode(text)
        assert isinstance(ids, np.ndarray) and ids.tolist() == theirs.encode(text).ids
        assert ours.decode(ids) == text
        assert b''.join(map(ours.token_bytes, ids.tolist())) == text.encode()
    if special:
        assert ours.decode([0, 1]) == '<|endoftext|>[PAD]' and ours.token_bytes(1) == b'[PAD]'
    assert encode_prompt(ours, '').tolist() == [[0] if special else ours.encode('\n').tolist()]


def test_byte_pairs_travel_through_checkpoints_and_exports(folder, tmp_path):
    saved = pretrained_tokenizer(str(folder), 400)
    torch.save({'tokenizer': saved}, tmp_path / 'x.pth')
    assert torch.load(tmp_path / 'x.pth', weights_only=True)['tokenizer'] == saved
    (tmp_path / 'hf').mkdir()
    ours = tokenizer_from_dict(saved)
    ours.save_pretrained(tmp_path / 'hf')
    assert pretrained_tokenizer(str(tmp_path / 'hf'), 400) == saved
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
    for text in TEXTS:
        if '<|' not in text:
            assert theirs(text)['input_ids'] == ours.encode(text).tolist()
            assert theirs.decode(ours.encode(text).tolist()) == text
    assert theirs.eos_token_id == ours.eot == 0 and theirs.decode([0]) == '<|endoftext|>'
    assert theirs.decode([0, 300, 0], skip_special_tokens=True) == ours.decode([300])


def test_vocab_json_with_merges_txt_is_read(tmp_path):
    theirs = trained(None, 450)
    theirs.model.save(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ['merges.txt', 'vocab.json']
    (tmp_path / 'added_tokens.json').write_text('{"</s>": 450}')
    (tmp_path / 'tokenizer_config.json').write_text('{"eos_token": {"content": "</s>"}}')
    ours = tokenizer_from_dict(pretrained_tokenizer(str(tmp_path), 451))
    assert (ours.vocab_size, ours.eot) == (451, 450)
    for text in TEXTS:
        assert ours.encode(text).tolist() == theirs.encode(text).ids


def test_end_of_text_is_a_special_token_and_not_gpt2s_default(folder):
    # transformers writes 50256 into the config.json of any GPT-2; here a smaller case
    whole = json.loads((folder / 'tokenizer.json').read_text())
    text = json.dumps(whole).replace('<|endoftext|>', '</s>')
    (folder / 'tokenizer.json').write_text(text)
    for end, eot in ((300, None), (0, 0), (None, None)):
        (folder / 'config.json').write_text(json.dumps({'eos_token_id': end}))
        assert pretrained_tokenizer(str(folder), 400)['eot'] == eot
    (folder / 'tokenizer_config.json').write_text('{"eos_token": "[PAD]"}')
    assert pretrained_tokenizer(str(folder), 400)['eot'] == 1


def test_gpt2s_own_tokenizer_is_known_by_its_tokens(bpe, tmp_path, capsys):
    ours = GPT2Tokenizer()
    ours.save_pretrained(tmp_path)
    assert pretrained_tokenizer(str(tmp_path), 50257) == {'kind': 'gpt2'} == ours.to_dict()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for name, pad, size in (('plain', [], 50257), ('pad', ['[PAD]'], 50258)):
        theirs.add_special_tokens({'pad_token': pad[0]} if pad else {})
        theirs.save_pretrained(tmp_path / name)
        assert (tmp_path / name / 'tokenizer.json').exists()
        assert pretrained_tokenizer(str(tmp_path / name), size) == {'kind': 'gpt2'}
        assert ("without 1 special ones added to them: '[PAD]'" in capsys.readouterr().out) == \
            bool(pad)
    for text in TEXTS:
        if '<|' not in text:
            assert theirs(text)['input_ids'] == ours.encode(text).tolist()
    # the same tokens in other pieces are another tokenizer
    whole = json.loads((tmp_path / 'plain' / 'tokenizer.json').read_text())
    byte_level = whole['pre_tokenizer'] | {'use_regex': False}
    split = huggingface.ONE_BY_ONE | {'pattern': {'Regex': GPT4_PATTERN}}
    whole['pre_tokenizer'] = {'type': 'Sequence', 'pretokenizers': [split, byte_level]}
    (tmp_path / 'plain' / 'tokenizer.json').write_text(json.dumps(whole))
    assert pretrained_tokenizer(str(tmp_path / 'plain'), 50257)['kind'] == 'bpe'


def test_a_folder_without_a_tokenizer_has_gpt2s_only_if_its_size_fits(tmp_path):
    for name in ('gpt2', 'gpt2-xl'):
        assert pretrained_tokenizer(name, 50257) == {'kind': 'gpt2'}
    for size in (50257, 50258, 50304):
        assert pretrained_tokenizer(str(tmp_path), size) == {'kind': 'gpt2'}
    for size in (65, 50256, 50305, None):
        with pytest.raises(ValueError, match='put the tokenizer.json that belongs'):
            pretrained_tokenizer(str(tmp_path), size)


def swap_ids(whole):
    vocab = whole['model']['vocab']
    last = sorted(vocab, key=vocab.get)[-2:]
    vocab[last[0]], vocab[last[1]] = vocab[last[1]], vocab[last[0]]


def lose_a_byte(whole):
    merges = [m if isinstance(m, list) else m.split(' ') for m in whole['model']['merges']]
    whole['model']['merges'] = [m for m in merges if 'Q' not in ''.join(m)]
    tokens = sorted(whole['model']['vocab'], key=whole['model']['vocab'].get)
    tokens = [token for token in tokens if 'Q' not in token]
    whole['model']['vocab'] = {token: i for i, token in enumerate(tokens)}


def split(whole):
    return whole['pre_tokenizer']['pretokenizers'][0]


# kind: (change of tokenizer.json, words of the error)
UNLIKE = {
    'normalizer': (lambda w: w.update(normalizer={'type': 'NFC'}), 'changes a text first .NFC'),
    'unigram': (lambda w: w['model'].update(type='Unigram'), 'its model is Unigram'),
    'words': (lambda w: w.update(model={'type': 'WordLevel', 'vocab': {'the': 0, 'a': 1}}),
              'vocabulary is words'),
    'prefix': (lambda w: w['model'].update(continuing_subword_prefix='##'), 'prefix=.##'),
    'space': (lambda w: w['pre_tokenizer']['pretokenizers'][1].update(add_prefix_space=True),
              'puts a space before every text'),
    'order': (swap_ids, 'merges have another order than its ids|not made of two tokens'),
    'merges': (lambda w: w['model']['merges'].reverse(), 'merges have another order than its ids'),
    'byte': (lose_a_byte, 'lacks tokens for 1 of the 256 bytes'),
    'hole': (lambda w: w['model']['vocab'].pop(max(w['model']['vocab'], key=len)), 'are not 0 to'),
    'added': (lambda w: w['added_tokens'][1].update(special=False), 'PAD.* is not a special one'),
    'digits': (lambda w: w['pre_tokenizer']['pretokenizers'].insert(0, {'type': 'Digits'}),
               'splits texts in a way'),
    'metaspace': (lambda w: w.update(pre_tokenizer={'type': 'Metaspace'}), 'splits texts in a way'),
    'none': (lambda w: w.update(pre_tokenizer=None), 'splits texts in a way'),
    'merged': (lambda w: split(w).update(behavior='MergedWithNext'), 'splits texts in a way'),
    'anchor': (lambda w: split(w)['pattern'].update(Regex=r'\s+$|\s|\S+'), 'splits texts in a way'),
    'lossy': (lambda w: split(w)['pattern'].update(Regex=r'\p{L}+'), 'leaves out a part'),
    'form': (lambda w: w.pop('model'), "not the form of a tokenizer .KeyError.'model'"),
}


@pytest.mark.parametrize('kind', UNLIKE)
def test_what_cannot_be_represented_exactly_is_refused(folder, kind):
    change, words = UNLIKE[kind]
    path = folder / 'tokenizer.json'
    whole = json.loads(path.read_text())
    assert pretrained_tokenizer(str(folder), 400)
    change(whole)
    path.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=words) as e:
        pretrained_tokenizer(str(folder), 400)
    assert '\n' not in str(e.value)


def test_a_damaged_or_too_large_tokenizer_is_refused(folder, capsys):
    with pytest.raises(ValueError, match='400 tokens, but its weights only 399'):
        pretrained_tokenizer(str(folder), 399)
    whole = json.loads((folder / 'tokenizer.json').read_text())
    split(whole)['pattern']['Regex'] = '('
    (folder / 'tokenizer.json').write_text(json.dumps(whole))
    with pytest.raises(SystemExit):  # tiktoken refuses the pattern
        pretrained_tokenizer(str(folder), 400)
    assert "the pattern '(' of the tokenizer cannot be used" in capsys.readouterr().err
    (folder / 'tokenizer.json').write_text('version https://git-lfs.github.com/spec/v1\noid ...')
    with pytest.raises(ValueError, match="is not JSON: its text begins with 'version https://git"):
        pretrained_tokenizer(str(folder), 400)


def test_a_dict_that_describes_no_tokenizer_is_refused(folder):
    good = pretrained_tokenizer(str(folder), 400)
    assert tokenizer_size(good) == 400
    tokens = good['tokens']
    for change in ({'tokens': tokens[:-1] + tokens[-2:-1]}, {'tokens': tokens[:200]},
                   {'tokens': tokens + ['']}, {'tokens': tokens + ['日']}, {'tokens': 'abc'},
                   {'tokens': tokens + [7]}, {'tokens': None}, {'special': [400]},
                   {'special': [-1]}, {'special': None}, {'special': []}, {'eot': 300},
                   {'eot': 'x'}, {'pattern': None}, {'kind': 'word'}):
        with pytest.raises(ValueError, match='does not describe a tokenizer'):
            tokenizer_size(good | change)
    for bad in ({'kind': 'char', 'chars': ''}, {'kind': 'char', 'chars': 'aa'}, {},
                {'kind': 'char', 'chars': ['a']}, {'kind': 'char'}):
        with pytest.raises(ValueError, match='does not describe a tokenizer'):
            tokenizer_size(bad)


def test_byte_letters_are_those_of_gpt2():
    alphabet = set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert set(bpe_training.LETTERS) == alphabet and len(bpe_training.LETTERS) == 256
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in ('aÄß \n☕', ''.join(map(chr, range(2048)))):
        (letters, _), = level.pre_tokenize_str(text)
        assert bpe_training.to_letters(text.encode()) == letters
        assert bpe_training.to_bytes(letters) == text.encode()
    # abc comes before ab and bc, so nothing is merged to it
    with pytest.raises(ValueError, match="token 'abc' is not made of"):
        huggingface.merges_of({'special': [], 'tokens': [*bpe_training.LETTERS, 'abc', 'ab', 'bc']})


# -----------------------------------------------------------------------------
# characters

def test_characters_keep_the_order_of_their_ids():
    tokenizer = CharTokenizer(chars='hélo ')
    ids = tokenizer.encode('hello'.replace('e', 'é'))
    assert ids.tolist() == [0, 1, 2, 2, 3] and tokenizer.decode(ids) == 'héllo'
    assert tokenizer_from_dict(tokenizer.to_dict()).chars == 'hélo '
    assert tokenizer.missing('zhxx') == 'xz'


@pytest.mark.parametrize('ordered', [True, False])
def test_exported_characters_are_read_by_transformers_and_back(tmp_path, ordered):
    text = ''.join(t for t in TEXTS if '<|' not in t)
    ours = CharTokenizer(text)
    if not ordered:
        ours = CharTokenizer(chars=ours.chars[::-1])
    ours.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ['tokenizer.json', 'tokenizer_config.json']
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        if '<|' not in text:
            assert theirs(text)['input_ids'] == ours.encode(text).tolist()
            assert theirs.decode(ours.encode(text).tolist()) == text
    assert theirs.eos_token_id is None and len(theirs) == ours.vocab_size
    with pytest.raises(Exception, match='UNK'):  # an unknown character is not lost in silence
        theirs('Ω')
    assert pretrained_tokenizer(str(tmp_path), ours.vocab_size) == ours.to_dict()
    assert pretrained_tokenizer(str(tmp_path / 'tokenizer.json')) == ours.to_dict()


@pytest.fixture
def exported(train_run, tmp_path, capsys):
    """The folder of an exported character model; its run is in tmp_path/out."""
    train_run('--max_iters=5', '--dropout=0')
    configure('sample', [f'--out_dir={tmp_path / "out"}', f'--export={tmp_path / "hf"}'])
    sample.main()
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == (
        f'exported to {tmp_path / "hf"}: transformers.GPT2LMHeadModel.from_pretrained('
        f"'{tmp_path / 'hf'}') loads it, and AutoTokenizer its tokenizer")
    return tmp_path / 'hf'


def test_an_exported_character_model_writes_the_same_in_transformers(exported, tmp_path, capsys):
    def sampled(*arguments):
        configure('sample', [*arguments, '--start=The ', '--num_samples=1', '--temperature=0',
                                 '--max_new_tokens=20', '--dtype=float32'])
        sample.main()
        return re.search('\\[The \\](?s:.*)(?=\n1 x 20)', capsys.readouterr().out)[0]
    text = sampled(f'--init_from={exported}')
    assert text == sampled(f'--out_dir={tmp_path / "out"}')
    pipeline = transformers.pipeline('text-generation', model=str(exported))
    theirs = pipeline('The ', max_new_tokens=20, do_sample=False)[0]['generated_text']
    assert f'[The ]{theirs[4:]}' == text


def run(arguments):
    configure('data.text.prepare', arguments)
    own_text.main()


def test_an_export_is_not_trained_on_another_alphabet_of_the_same_size(
        exported, text, tmp_path, train_run, capsys):
    source = text.read_text()
    other = source.replace("'", '’')
    assert len(set(other)) == len(set(source)) and other != source
    (tmp_path / 'other.txt').write_text(other, encoding='utf-8')
    run([f'--input={tmp_path / "other.txt"}', '--name=curly'])
    tiny = [a for a in TINY if not a.startswith(('--n_', '--dropout', '--dataset'))]
    tiny += [f'--init_from={exported}', '--max_iters=0', f'--out_dir={tmp_path / "ft"}']
    with pytest.raises(SystemExit) as e:
        train.main([*tiny, '--dataset=curly'])
    remedy = f'--tokenizer={exported}'
    err = capsys.readouterr().err
    assert e.value.code == 2 and 'other tokens than' in err and remedy in err
    assert err.count('\n') == 1 and not (tmp_path / 'ft').exists()
    train.main([*tiny, '--dataset=topics'])
    # the remedy, which loses the new character only if that is asked for
    arguments = [f'--input={tmp_path / "other.txt"}', '--name=straight', remedy]
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        run(arguments)
    err = capsys.readouterr().err
    count = f"{other.count('’'):,} of {len(other):,} characters are not in the vocabulary: '’'"
    assert e.value.code == 2 and count in err and err.endswith('--unknown=drop\n')
    run([*arguments, '--unknown=drop'])
    assert f'note: {count}: they are left out' in capsys.readouterr().out
    meta = dataset.read_meta('straight')
    ids = np.fromfile(os.path.join(dataset.DATA_DIR, 'straight', 'train.bin'), dtype='uint16')
    tokenizer = tokenizer_from_dict(meta['tokenizer'])
    assert tokenizer.decode(ids) == other.replace('’', '')[:len(ids)]
    train.main([*tiny[:-1], f'--out_dir={tmp_path / "ft2"}', '--dataset=straight'])


def test_a_text_is_written_in_the_tokens_of_an_earlier_run(exported, folder, tmp_path, capsys):
    (tmp_path / 'new.txt').write_text('The new text, in old tokens.\n' * 20)
    topics = dataset.read_meta('topics')['tokenizer']
    own = {'out': topics, 'out/ckpt.pt': topics, 'hf': topics, 'hf/tokenizer.json': topics,
           'tokenizer.json': pretrained_tokenizer(str(folder))}
    for path, saved in own.items():
        run([f'--input={tmp_path / "new.txt"}', '--name=new', f'--tokenizer={tmp_path / path}'])
        meta = dataset.read_meta('new')
        assert meta['tokenizer'] == saved and meta['bytes'] == {'train': 522, 'val': 58}
        goes_on = f'train.py --init_from={tmp_path / path} --dataset=new' in capsys.readouterr().out
        assert goes_on == path.startswith('out')
        ids = np.fromfile(os.path.join(dataset.DATA_DIR, 'new', 'val.bin'), dtype='uint16')
        assert tokenizer_from_dict(saved).decode(ids) == ('The new text, in old tokens.\n' * 2)
    # weights in GPT-2's tokens may come without a tokenizer
    (tmp_path / 'bare').mkdir()
    (tmp_path / 'bare' / 'config.json').write_text('{"vocab_size": 50257}')
    for path in ('gpt2-medium', str(tmp_path / 'bare')):
        assert own_text.read_tokenizer(path) == {'kind': 'gpt2'}
    (tmp_path / 'junk.pth').write_bytes(b'junk')
    for path, words in (('none', 'or the path of'), ('junk.pth', 'no checkpoint at all'),
                        ('out/best', 'or the path of'), ('empty', 'it holds no tokenizer')):
        (tmp_path / 'empty').mkdir(exist_ok=True)
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            run([f'--input={tmp_path / "new.txt"}', '--name=x', f'--tokenizer={tmp_path / path}'])
        err = capsys.readouterr().err
        assert e.value.code == 2 and words in err and err.count('\n') == 1
        assert not os.path.exists(os.path.join(dataset.DATA_DIR, 'x'))


def test_a_model_of_byte_pairs_trains_samples_and_exports(folder, tmp_path, train_run, text,
                                                         capsys):
    run([f'--input={text}', '--name=pairs', f'--tokenizer={folder / "tokenizer.json"}'])
    saved = train_run('--dataset=pairs', '--max_iters=3', '--sample_tokens=8')
    assert saved['tokenizer'] == pretrained_tokenizer(str(folder))
    train_run('--init_from=resume', '--max_iters=4')
    configure('sample', [f'--out_dir={tmp_path / "out"}', f'--export={tmp_path / "hf"}'])
    sample.main()
    for source in (f'--out_dir={tmp_path / "out"}', f'--init_from={tmp_path / "hf"}'):
        configure('sample', [source, '--max_new_tokens=5', '--num_samples=1', '--start=Ünï'])
        sample.main()
    out = capsys.readouterr().out
    assert out.count('\n[Ünï]') == 2 and out.count('1 x 5 tokens') == 2
    config = json.loads((tmp_path / 'hf' / 'config.json').read_text())
    assert config['eos_token_id'] == 0 and config['vocab_size'] == 400


def gpt2_of_transformers(folder, vocab_size):
    """Save a tiny random model of transformers, with GPT-2's default id of end-of-text."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=vocab_size, n_positions=64, n_layer=1, n_head=1,
                                     n_embd=8, initializer_range=1.0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)


def test_weights_with_a_tokenizer_of_their_own_write_what_transformers_writes(folder, capsys):
    gpt2_of_transformers(folder, 400)
    configure('sample', [f'--init_from={folder}', '--max_new_tokens=20', '--num_samples=1',
                             '--start=Let us see', '--temperature=0', '--dtype=float32'])
    sample.main()
    pipeline = transformers.pipeline('text-generation', model=str(folder))
    theirs = pipeline('Let us see', max_new_tokens=20, do_sample=False)[0]['generated_text']
    assert len(theirs) > 15
    assert theirs.replace('Let us see', '[Let us see]') in capsys.readouterr().out


def test_gpt2_with_a_pad_token_trains_and_samples(bpe, tmp_path, text, capsys):
    gpt2_of_transformers(tmp_path / 'hf', 50258)
    GPT2Tokenizer().save_pretrained(tmp_path / 'hf')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
    theirs.add_special_tokens({'pad_token': '[PAD]'})
    theirs.save_pretrained(tmp_path / 'hf')
    run([f'--input={text}', '--name=padded', f'--tokenizer={tmp_path / "hf"}'])
    tiny = [a for a in TINY if not a.startswith(('--n_', '--dropout', '--dataset'))]
    train.main([*tiny, f'--init_from={tmp_path / "hf"}', '--dataset=padded', '--max_iters=1',
                f'--out_dir={tmp_path / "out"}'])
    configure('sample', [f'--init_from={tmp_path / "hf"}', '--max_new_tokens=5'])
    sample.main()
    assert '10 x 5 tokens' in capsys.readouterr().out


def test_a_tokenizer_in_a_checkpoint_whose_pattern_is_bad_is_one_line(folder, capsys):
    saved = pretrained_tokenizer(str(folder)) | {'pattern': '('}
    assert tokenizer_size(saved) == 400  # needs no tiktoken
    with pytest.raises(SystemExit) as e:
        tokenizer_from_dict(saved)
    assert e.value.code == 2 and capsys.readouterr().err.count('\n') == 1
    with pytest.raises(ValueError):
        BytePairTokenizer('(', saved['tokens'], saved['special'])
