"""Tokenizers and Hugging Face's files of them, checked against transformers and tokenizers."""
import json
import os
import re
import sys

import data.text.prepare as own_text
import sample
import train
from configurator import configure
from data import bpe as bpe_training
from data import dataset
from data.huggingface import read_tokenizer
from data.tokenizers import (
    BytePairTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    HuggingFaceTokenizer,
    tokenizer_from_dict,
    tokenizer_size,
)
from sample import encode_prompt

import numpy as np
import pytest
import torch
from conftest import TINY

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


def own_byte_pairs(size=400):
    """Return byte pairs as data/build.py makes them of a text."""
    pieces = bpe_training.count_pieces(TEXTS * 3 + [bpe_training.__doc__] * 2)
    tokens = [bpe_training.to_letters(t) for t in bpe_training.train_bpe(pieces, size - 1)]
    return BytePairTokenizer(bpe_training.PATTERN, [*tokens, '<|endoftext|>'], [size - 1], size - 1)


@pytest.fixture
def no_library(monkeypatch):
    """Hide the libraries of Hugging Face from quill."""
    monkeypatch.setitem(sys.modules, 'tokenizers', None)
    monkeypatch.setitem(sys.modules, 'transformers', None)


@pytest.mark.parametrize('pattern', [None, GPT4_PATTERN], ids=['gpt2', 'gpt4'])
@pytest.mark.parametrize('special', [(), ('<|endoftext|>', '[PAD]')], ids=['plain', 'special'])
def test_a_byte_level_tokenizer_json_equals_the_library(tmp_path, pattern, special):
    theirs = trained(pattern, 500, special)
    theirs.save(str(tmp_path / 'tokenizer.json'))
    if special:
        (tmp_path / 'tokenizer_config.json').write_text('{"eos_token": "<|endoftext|>"}')
    saved = read_tokenizer(str(tmp_path))
    ours = tokenizer_from_dict(json.loads(json.dumps(saved)))
    assert saved['kind'] == 'huggingface' and ours.to_dict() == saved
    assert ours.vocab_size == theirs.get_vocab_size() == tokenizer_size(saved)
    assert ours.eot == (0 if special else None)
    theirs.encode_special_tokens = True  # texts of special tokens are plain text in quill
    for text in TEXTS:
        ids = ours.encode(text)
        assert isinstance(ids, np.ndarray) and ids.tolist() == theirs.encode(text).ids
        assert ours.decode(ids) == text
        assert b''.join(map(ours.token_bytes, ids.tolist())) == text.encode()
    if special:
        assert ours.decode([0, 1]) == '<|endoftext|>[PAD]' and ours.token_bytes(1) == b'[PAD]'
    assert encode_prompt(ours, '').tolist() == [[0] if special else ours.encode('\n').tolist()]


def sentencepiece_like():
    """Return BPE in the form of Llama 2: a space is a letter, unknown characters become bytes."""
    whole = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token='<unk>'))
    whole.normalizer = tokenizers.normalizers.Sequence([
        tokenizers.normalizers.Prepend('▁'), tokenizers.normalizers.Replace(' ', '▁')])
    whole.decoder = tokenizers.decoders.Sequence([
        tokenizers.decoders.Replace('▁', ' '), tokenizers.decoders.ByteFallback(),
        tokenizers.decoders.Fuse(), tokenizers.decoders.Strip(' ', 1, 0)])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, show_progress=False, limit_alphabet=60,
        special_tokens=['<unk>', '<s>', '</s>', *(f'<0x{i:02X}>' for i in range(256))])
    whole.train_from_iterator([bpe_training.__doc__], trainer)
    whole.post_processor = tokenizers.processors.TemplateProcessing(
        single='<s> $A', special_tokens=[('<s>', 1)])
    return whole


def test_the_bytes_of_sentencepiece_like_tokens_make_up_the_text(tmp_path):
    theirs = sentencepiece_like()
    theirs.enable_truncation(4)  # settings of someone's training, which would cut or fill texts
    theirs.enable_padding(length=99)
    theirs.save(str(tmp_path / 'tokenizer.json'))
    (tmp_path / 'tokenizer_config.json').write_text('{"eos_token": {"content": "</s>"}}')
    ours = tokenizer_from_dict(read_tokenizer(str(tmp_path)))
    assert ours.eot == 2
    for text in ('the most frequent pair', 'two  spaces\nand lines', 'naïve 👩‍🚀 日本'):
        ids = ours.encode(text).tolist()
        assert 1 not in ids and len(ids) > 4  # no special token is added
        assert ours.decode(ids) == text
        # only the first token of a text loses its space
        assert b''.join(map(ours.token_bytes, ids)).decode() == ' ' + text
    assert ours.token_bytes(2) == b'</s>' and ours.token_bytes(3 + 0xe2) == b'\xe2'


def test_the_bytes_of_word_pieces_are_joined_without_their_marks():
    vocab = {'[UNK]': 0, 'play': 1, '##ing': 2, 'the': 3}
    whole = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token='[UNK]'))
    whole.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    whole.decoder = tokenizers.decoders.WordPiece()
    ours = HuggingFaceTokenizer(whole.to_str())
    ids = ours.encode('the playing').tolist()
    assert ids == [3, 1, 2]
    assert b''.join(map(ours.token_bytes, ids)) == b' the playing'


def test_ids_may_have_gaps():
    vocab = {'a': 0, 'b': 5}
    ours = HuggingFaceTokenizer(tokenizers.Tokenizer(
        tokenizers.models.WordLevel(vocab, unk_token='a')).to_str())
    assert ours.vocab_size == 6 and ours.token_bytes(3) == b''


def test_a_tokenizer_of_the_library_travels_through_checkpoints_and_exports(folder, tmp_path):
    (folder / 'tokenizer_config.json').write_text('{"eos_token": "<|endoftext|>"}')
    saved = read_tokenizer(str(folder))
    torch.save({'tokenizer': saved}, tmp_path / 'x.pth')
    assert torch.load(tmp_path / 'x.pth', weights_only=True)['tokenizer'] == saved
    (tmp_path / 'hf').mkdir()
    ours = tokenizer_from_dict(saved)
    ours.save_pretrained(tmp_path / 'hf')
    assert read_tokenizer(str(tmp_path / 'hf')) == saved
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
    same_as_transformers(ours, theirs)
    assert theirs.eos_token_id == ours.eot == 0 and theirs.decode([0]) == '<|endoftext|>'


def same_as_transformers(ours, theirs):
    for text in TEXTS:
        if '<|' not in text:
            assert theirs(text)['input_ids'] == ours.encode(text).tolist()
            assert theirs.decode(ours.encode(text).tolist()) == text


def test_own_byte_pairs_are_read_by_transformers_and_back_without_a_library(tmp_path):
    ours = own_byte_pairs()
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    same_as_transformers(ours, theirs)
    assert theirs.eos_token_id == ours.eot == 399
    assert theirs.decode([399, 300], skip_special_tokens=True) == ours.decode([300])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, 'tokenizers', None)
        assert read_tokenizer(str(tmp_path)) == ours.to_dict()
    # what a client writes is in another form
    theirs.add_special_tokens({'pad_token': '[PAD]'})
    theirs.save_pretrained(tmp_path)
    again = tokenizer_from_dict(read_tokenizer(str(tmp_path)))
    assert (again.eot, again.vocab_size) == (399, 401)
    for text in TEXTS:
        assert again.encode(text).tolist() == ours.encode(text).tolist()


@pytest.mark.parametrize('change', [
    lambda whole: whole.update(normalizer={'type': 'NFC'}),
    lambda whole: whole['model']['merges'].reverse(),
    lambda whole: whole['added_tokens'][0].update(special=False),
    lambda whole: whole['pre_tokenizer']['pretokenizers'][0].update(behavior='Removed')],
    ids=['normalizer', 'merges', 'added', 'pieces'])
def test_an_export_that_was_changed_is_not_taken_for_ours(tmp_path, change):
    own_byte_pairs().save_pretrained(tmp_path)
    assert read_tokenizer(str(tmp_path))['kind'] == 'bpe'
    path = tmp_path / 'tokenizer.json'
    whole = json.loads(path.read_text())
    change(whole)
    path.write_text(json.dumps(whole))
    assert read_tokenizer(str(tmp_path))['kind'] == 'huggingface'


def test_the_end_of_text_is_the_eos_token_and_not_gpt2s_default(folder):
    (folder / 'config.json').write_text('{"eos_token_id": 300}')  # of transformers, in any GPT-2
    assert read_tokenizer(str(folder))['eot'] is None
    for end in ('"[PAD]"', '{"content": "[PAD]"}'):
        (folder / 'tokenizer_config.json').write_text(f'{{"eos_token": {end}}}')
        assert read_tokenizer(str(folder))['eot'] == 1


def test_gpt2s_own_tokenizer_is_known_by_its_tokens(bpe, tmp_path):
    ours = GPT2Tokenizer()
    ours.save_pretrained(tmp_path)
    assert read_tokenizer(str(tmp_path)) == {'kind': 'gpt2'} == ours.to_dict()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    same_as_transformers(ours, theirs)
    theirs.save_pretrained(tmp_path / 'plain')
    path = tmp_path / 'plain' / 'tokenizer.json'
    assert read_tokenizer(str(path)) == {'kind': 'gpt2'}
    whole = json.loads(path.read_text())
    whole['pre_tokenizer'].pop('use_regex')  # OpenAI's own file is older than this key
    path.write_text(json.dumps(whole))
    assert read_tokenizer(str(path)) == {'kind': 'gpt2'}
    # the same tokens in other pieces, or with another token, are another tokenizer
    for change in ({'pre_tokenizer': whole['pre_tokenizer'] | {'add_prefix_space': True}},
                   {'pre_tokenizer': whole['pre_tokenizer'] | {'use_regex': False}},
                   {'normalizer': {'type': 'Lowercase'}}):
        path.write_text(json.dumps(whole | change))
        assert read_tokenizer(str(path))['kind'] == 'huggingface'
    theirs.add_special_tokens({'pad_token': '[PAD]'})
    theirs.save_pretrained(tmp_path / 'pad')
    saved = read_tokenizer(str(tmp_path / 'pad'))
    assert saved['kind'] == 'huggingface' and saved['eot'] == 50256
    assert tokenizer_size(saved) == 50258


def test_a_folder_without_a_tokenizer_is_not_taken_for_gpt2s(tmp_path):
    for name in ('gpt2', 'gpt2-xl'):
        assert read_tokenizer(name) == {'kind': 'gpt2'}
    (tmp_path / 'config.json').write_text('{"vocab_size": 50257}')
    with pytest.raises(FileNotFoundError, match='tokenizer.json'):
        read_tokenizer(str(tmp_path))


def test_a_damaged_tokenizer_is_refused(folder):
    whole = json.loads((folder / 'tokenizer.json').read_text())
    whole['model']['type'] = 'Quux'
    (folder / 'tokenizer.json').write_text(json.dumps(whole))
    with pytest.raises(ValueError, match='the library tokenizers cannot read') as e:
        read_tokenizer(str(folder))
    assert '\n' not in str(e.value)
    (folder / 'tokenizer.json').write_text('version https://git-lfs.github.com/spec/v1\noid ...')
    with pytest.raises(ValueError, match='is not a JSON object.*git lfs pull'):
        read_tokenizer(str(folder))


def test_only_foreign_tokenizers_need_the_library_and_the_error_names_it(folder, no_library):
    with pytest.raises(ValueError, match='pip install tokenizers'):
        read_tokenizer(str(folder))
    CharTokenizer('abc').save_pretrained(folder)
    assert read_tokenizer(str(folder)) == {'kind': 'char', 'chars': 'abc'}
    assert read_tokenizer('gpt2') == {'kind': 'gpt2'}


def test_a_dict_that_describes_no_tokenizer_is_refused():
    good = own_byte_pairs().to_dict()
    assert tokenizer_size(good) == 400
    tokens = good['tokens']
    for bad in (good | {'tokens': tokens[:-1] + tokens[-2:-1]}, good | {'tokens': None},
                good | {'kind': 'word'}, {'kind': 'char', 'chars': ''}, {},
                {'kind': 'char', 'chars': 'aa'}, {'kind': 'char'}):
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


# -----------------------------------------------------------------------------
# characters

def test_characters_keep_the_order_of_their_ids():
    tokenizer = CharTokenizer(chars='hélo ')
    ids = tokenizer.encode('hello'.replace('e', 'é'))
    assert ids.tolist() == [0, 1, 2, 2, 3] and tokenizer.decode(ids) == 'héllo'
    assert tokenizer_from_dict(tokenizer.to_dict()).chars == 'hélo '


def test_characters_may_have_an_end_of_text_behind_them():
    plain, ended = CharTokenizer('abc'), CharTokenizer('abc', eot=True)
    assert plain.to_dict() == {'kind': 'char', 'chars': 'abc'}  # as in older datasets
    assert ended.to_dict() == {'kind': 'char', 'chars': 'abc', 'eot': 3}
    for tokenizer, size in (plain, 3), (ended, 4):
        saved = json.loads(json.dumps(tokenizer.to_dict()))
        assert tokenizer_size(saved) == tokenizer.vocab_size == size
        again = tokenizer_from_dict(saved)
        assert again.to_dict() == saved and again.encode('cab').tolist() == [2, 0, 1]
    assert ended.decode([0, 3, 1]) == 'ab' and ended.token_bytes(3) == b''
    assert ended.encode('', special=True).tolist() == []
    with pytest.raises(ValueError, match="'<'"):
        ended.encode('<|endoftext|>')


def test_in_a_prompt_the_text_of_a_special_token_is_that_token(bpe, folder):
    theirs = read_tokenizer(str(folder))
    for tokenizer, end in ((CharTokenizer('ab\n', eot=True), 3), (own_byte_pairs(), 399),
                           (GPT2Tokenizer(), 50256), (tokenizer_from_dict(theirs), 0)):
        a, b = tokenizer.encode('a').tolist(), tokenizer.encode('b\n').tolist()
        prompt = encode_prompt(tokenizer, '<|endoftext|>a<|endoftext|><|endoftext|>b\n')
        assert prompt.tolist() == [[end, *a, end, end, *b]]
    pad = tokenizer_from_dict(theirs)
    assert encode_prompt(pad, '[PAD]').tolist() == [[1]]
    assert 1 not in pad.encode('[PAD]')  # a text is plain text, before and after a prompt
    # a vocabulary without such a token takes the characters
    plain = CharTokenizer('<|endoftext|>')
    assert encode_prompt(plain, '<|endoftext|>').shape == (1, 13)


def test_an_empty_prompt_of_characters_is_a_newline_even_with_an_end_of_text(bpe):
    assert encode_prompt(CharTokenizer('ab\n', eot=True), '').tolist() == [[0]]
    assert encode_prompt(CharTokenizer('ab', eot=True), '').tolist() == [[0]]
    assert encode_prompt(CharTokenizer(chars='ab\n'), '').tolist() == [[2]]
    assert encode_prompt(GPT2Tokenizer(), '').tolist() == [[50256]]


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
    assert read_tokenizer(str(tmp_path)) == ours.to_dict()
    assert read_tokenizer(str(tmp_path / 'tokenizer.json')) == ours.to_dict()


@pytest.fixture
def exported(train_run, tmp_path, capsys):
    """The folder of an exported character model; its run is in tmp_path/out."""
    train_run('--max_iters=5', '--dropout=0')
    configure('sample', [f'--out_dir={tmp_path / "out"}', f'--export={tmp_path / "hf"}'])
    sample.main()
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == (
        f'exported to {tmp_path / "hf"}: from_pretrained({str(tmp_path / "hf")!r}) '
        'of transformers loads it')
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
           'tokenizer.json': read_tokenizer(str(folder))}
    for path, saved in own.items():
        run([f'--input={tmp_path / "new.txt"}', '--name=new', f'--tokenizer={tmp_path / path}'])
        meta = dataset.read_meta('new')
        assert meta['tokenizer'] == saved and meta['bytes'] == {'train': 522, 'val': 58}
        goes_on = f'train.py --init_from={tmp_path / path} --dataset=new' in capsys.readouterr().out
        assert goes_on == path.startswith('out')
        ids = np.fromfile(os.path.join(dataset.DATA_DIR, 'new', 'val.bin'), dtype='uint16')
        assert tokenizer_from_dict(saved).decode(ids) == ('The new text, in old tokens.\n' * 2)
    (tmp_path / 'junk.pth').write_bytes(b'junk')
    for path, words in (('none', 'it must be gpt2, '), ('junk.pth', 'no checkpoint at all'),
                        ('out/best', 'it must be gpt2, '), ('empty', 'tokenizer.json')):
        (tmp_path / 'empty').mkdir(exist_ok=True)
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            run([f'--input={tmp_path / "new.txt"}', '--name=x', f'--tokenizer={tmp_path / path}'])
        err = capsys.readouterr().err
        assert e.value.code == 2 and words in err and err.count('\n') == 1
        assert not os.path.exists(os.path.join(dataset.DATA_DIR, 'x'))


def test_a_model_of_byte_pairs_trains_samples_and_exports(folder, tmp_path, train_run, text,
                                                         capsys):
    (folder / 'tokenizer_config.json').write_text('{"eos_token": "<|endoftext|>"}')
    run([f'--input={text}', '--name=pairs', f'--tokenizer={folder / "tokenizer.json"}'])
    saved = train_run('--dataset=pairs', '--max_iters=3', '--sample_tokens=8')
    assert saved['tokenizer'] == read_tokenizer(str(folder))
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


def test_half_of_a_character_is_decoded_to_the_replacement_character():
    ours = own_byte_pairs()  # the first 256 tokens are the single bytes
    assert ours.decode([0xe2, *b'ab']) == '\ufffdab'
