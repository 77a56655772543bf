"""Training of byte pair encoding, checked against Hugging Face's tokenizers and tiktoken."""
import os
import random
import subprocess
import sys
import time
from collections import Counter

from data.bpe import BYTE_ORDER, PATTERN, count_pieces, train_bpe

import pytest
import regex
import tiktoken
import tokenizers
from tiktoken_ext import openai_public
from tokenizers import models, pre_tokenizers, trainers

# for each script: words to make a text from, and a sentence that is not in the text
SCRIPTS = {
    'latin': (
        'été élève forêt où garçon naïve cœur façade Noël rivière château âme île très déjà für '
        'Straße Mädchen schön Übung größer Äpfel niño mañana corazón canción pingüino está você '
        "coração ação maçã l'école d'hiver aujourd'hui smörgås år źródło łódka žába říct",
        'L’été dernier, Zoë n’a pas trouvé où était né l’élève : 1 234 567 forêts, déjà !'),
    'cyrillic': (
        'река лес дорога старик рыба вода говорить смотреть белый зелёный вечером утром человек '
        'деревня зима снег письмо читать писать большой маленький ещё который потому что никогда '
        'їжак ґанок подъезд объём вьюга',
        'Вечером старый рыбак возвращался из лесу; снег ещё не растаял, и вода была тёмной.'),
    'arabic': (
        'بيت كتاب مدرسة شمس قمر نهر بحر طريق مدينة قرية رجل امرأة ولد صباح مساء كبير صغير جميل '
        'يكتب يقرأ يذهب الماء السماء الأرض إلى على في من مُعَلِّم سلامٌ فارسی چای گل پنجره',
        'ذهب الولدُ إلى المدرسة في الصباح، وقرأ كتابًا جميلاً عن البحر؛ ثم عاد إلى البيت.'),
    'devanagari': (
        'नदी पहाड़ रास्ता घर किताब पानी सूरज चाँद गाँव शहर बच्चा विद्यालय सुबह शाम बड़ा छोटा '
        'सुन्दर लिखना पढ़ना जाना क्योंकि और के में से को प्रश्न ज्ञान स्त्री कर्म श्री',
        'बच्चे सुबह नदी के रास्ते से विद्यालय जाते हैं, और शाम को किताबें पढ़ते हैं।'),
    'chinese': (
        '河流 山 道路 老人 鱼 水 说话 看见 白色 绿色 晚上 早上 人 村庄 冬天 雪 信 读书 写字 '
        '大 小 因为 所以 从来 没有 学校 城市 太阳 月亮 孩子 我们 他们 喜欢 東京 臺灣 書',
        '冬天的早上，老人和孩子们走在山间的道路上，看见太阳从河流那边升起来。'),
    'emoji': (
        '👩‍👩‍👧‍👦 👨‍💻 👩🏽‍🚀 🏳️‍🌈 🏴‍☠️ ❤️‍🔥 👍🏿 👍 🇫🇷 🇯🇵 1️⃣ 😀 😂 🎉 ✨ ☕️ 🧑‍🤝‍🧑 👁️‍🗨️ ok yes',
        'Yes 👩🏽‍💻👩🏽‍🚀! 🏳️‍🌈🎉🎉 ok👍🏻👍🏿 — 🇯🇵🇫🇷 ❤️‍🔥☕️ 2️⃣'),
    'code': (
        'def return self for in if else while print( ) [i] { } == != += -> "" # // /* */ 0 1 42 '
        "1000 3.14 don't we'll I'M \t \r\n x_1 __init__ foo.bar(baz)",
        'def f(self):\r\n\tif x_1 >= 12345.678:\n        return {"a": [1, 22]}  # don\'t\n\n\n'),
}


SEPARATORS = {' ': 50, '': 6, ', ': 6, '. ': 6, '\n': 4, '\n\n': 2, '  ': 2, '!? ': 1}


def make_text(words, seed, n=700):
    """Return a text of n words. The first words are frequent, the last words are rare."""
    rng = random.Random(seed)
    words = words.split(' ')
    weights = [1 / (rank + 1) for rank in range(len(words))]
    words = rng.choices(words, weights, k=n)
    separators = rng.choices([*SEPARATORS], SEPARATORS.values(), k=n)
    return ''.join(word + separator for word, separator in zip(words, separators))


TEXTS = {name: make_text(words, seed=name) for name, (words, _) in SCRIPTS.items()}
SAMPLES = {f'{name} sentence': sentence for name, (_, sentence) in SCRIPTS.items()}


# Hugging Face's two steps before BPE: split the text, and write each byte as a visible character
SPLIT = pre_tokenizers.Split(tokenizers.Regex(PATTERN), 'isolated')
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
ALPHABET = sorted(BYTE_LEVEL.alphabet())  # these characters, in the order of their ids


def train_reference(texts, vocab_size):
    """Return (tokenizer, tokens in the order of their ids), trained by Hugging Face's trainer."""
    reference = tokenizers.Tokenizer(models.BPE())
    reference.pre_tokenizer = pre_tokenizers.Sequence([SPLIT, BYTE_LEVEL])
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=0, show_progress=False,
                                  initial_alphabet=ALPHABET)
    reference.train_from_iterator(texts, trainer)
    vocab = reference.get_vocab()
    byte_of = dict(zip(ALPHABET, BYTE_ORDER))
    tokens = [bytes(byte_of[c] for c in token) for token in sorted(vocab, key=vocab.get)]
    return reference, tokens


def make_encoding(tokens):
    ranks = {token: i for i, token in enumerate(tokens)}
    return tiktoken.Encoding('test', pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})


# -----------------------------------------------------------------------------
# against Hugging Face

@pytest.fixture(scope='module')
def trained():
    """(our tokens, the reference's tokenizer, the reference's tokens) of all texts together."""
    tokens = train_bpe(count_pieces(TEXTS.values()), 1500)
    return tokens, *train_reference(TEXTS.values(), 1500)


def test_the_tokens_are_those_of_hugging_face(trained):
    tokens, _, expected = trained
    assert len(tokens) == 1500
    assert tokens[:256] == [bytes([byte]) for byte in range(256)]
    assert tokens[256:] == expected[256:]
    assert len(set(tokens)) == 1500


@pytest.mark.parametrize('name', SCRIPTS)
def test_the_tokens_of_one_script_are_those_of_hugging_face(name):
    tokens = train_bpe(count_pieces([TEXTS[name]]), 500)
    assert tokens[256:] == train_reference([TEXTS[name]], 500)[1][256:]


@pytest.mark.parametrize('name', [*TEXTS, *SAMPLES])
def test_the_ids_are_those_of_hugging_face(trained, name):
    text = (TEXTS | SAMPLES)[name]
    tokens, reference, expected_tokens = trained
    bpe = make_encoding(tokens)
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert max(ids) >= 256
    # the same ids, apart from the single bytes, which Hugging Face numbers in BYTE_ORDER
    assert ids == [i if i >= 256 else expected_tokens[i][0] for i in reference.encode(text).ids]


@pytest.mark.parametrize('alphabet', ['a', 'ab', 'abc', 'ab \n', 'aé日', '01a -='])
def test_short_repetitive_texts_give_the_tokens_of_hugging_face(alphabet):
    rng = random.Random(alphabet)
    for _ in range(20):
        texts = [''.join(rng.choices(alphabet, k=rng.randint(1, 60))) for _ in range(4)]
        tokens = train_bpe(count_pieces(texts), 400)
        assert tokens[256:] == train_reference(texts, 400)[1][256:], texts


def test_the_order_of_bytes_is_that_of_hugging_face():
    chars = map(chr, [*range(0xd800), *range(0xe000, 0x110000, 0x1000)])
    encoded = ''.join(chars).encode()  # all bytes that can occur in UTF-8
    in_alphabet = ''.join(part for part, _ in BYTE_LEVEL.pre_tokenize_str(encoded.decode()))
    pairs = sorted(set(zip(in_alphabet, encoded)))
    assert len(pairs) == 256 - 13
    assert pairs == [pair for pair in zip(ALPHABET, BYTE_ORDER) if pair[1] in encoded]
    assert sorted(BYTE_ORDER) == list(range(256))


# -----------------------------------------------------------------------------
# pieces

@pytest.mark.parametrize('string, expected', [
    ("I'll say: it's  4's", ['I', "'ll", ' say', ':', ' it', "'s", ' ', ' ', '4', "'s"]),
    ("a'Sx'Tx'REx'vex'Mx'llx'dx", ['a', *"'S x 'T x 'RE x 've x 'M x 'll x 'd x".split()]),
    ('12345 6', ['123', '45', ' ', '6']),
    ('x = [];\r\n\n  y', ['x', ' =', ' [];\r\n\n', ' ', ' y']),
    ('a \n \n\tb', ['a', ' \n \n', '\tb']),
    ('çà (ñ)', ['çà', ' (', 'ñ', ')'])])
def test_pieces_of_texts_split_by_hand(string, expected):
    assert count_pieces([string]) == Counter(piece.encode() for piece in expected)


@pytest.mark.parametrize('name', [*TEXTS, *SAMPLES])
def test_pieces_are_those_of_hugging_face(name):
    text = (TEXTS | SAMPLES)[name]
    expected = [piece.encode() for piece, _ in SPLIT.pre_tokenize_str(text)]
    assert count_pieces([text]) == Counter(expected)


def test_the_pattern_splits_as_that_of_gpt4(monkeypatch):
    """tiktoken's present pattern differs only in white space at the end of a text."""
    monkeypatch.setattr(openai_public, 'load_tiktoken_bpe', lambda *_, **__: {})  # no download
    pattern = openai_public.cl100k_base()['pat_str']
    for text in (TEXTS | SAMPLES).values():
        text = text.rstrip()
        assert count_pieces([text]) == Counter(
            piece.encode() for piece in regex.findall(pattern, text))


def test_pieces_of_parts_add_up():
    """A part may begin at any visible character that follows a line break."""
    for text in TEXTS.values():
        parts = regex.split(r'(?<=[\r\n])(?=\S)', text)
        assert len(parts) > 10 and ''.join(parts) == text
        assert sum((count_pieces([part]) for part in parts), Counter()) == count_pieces([text])
        assert count_pieces(parts) == count_pieces([text])


def test_tiktoken_splits_by_the_same_pattern():
    """All pairs of bytes are tokens here, so a token crosses each boundary that tiktoken misses."""
    single = [bytes([byte]) for byte in range(256)]
    bpe = make_encoding(single + [a + b for a in single for b in single])
    for text in (TEXTS | SAMPLES).values():
        pieces = regex.findall(PATTERN, text)
        assert bpe.encode(text) == [i for piece in pieces for i in bpe._encode_single_piece(piece)]


# -----------------------------------------------------------------------------
# worked by hand, and the edges

def test_an_example_worked_by_hand():
    tokens = train_bpe({b'aaabdaaabac': 1}, 1000)
    assert tokens[256:] == [
        b'aa',  # aa occurs four times, because aaa contains aa twice: aa a b d aa a b a c
        b'ab',  # a+b and aa+a occur twice, and a is before aa: aa ab d aa ab a c
        b'aaab',  # aa+ab occurs twice: aaab d aaab a c
        b'ac',  # all pairs occur once, and a is before d and aaab: aaab d aaab ac
        b'daaab',  # d is before aaab: aaab daaab ac
        b'aaabdaaab',  # aaab is before daaab: aaabdaaab ac
        b'aaabdaaabac']  # no pair is left


def test_counts_are_weights():
    assert train_bpe({b'ab': 2, b'cd': 3, b'ef': 2}, 259)[256:] == [b'cd', b'ab', b'ef']


def test_training_stops_when_no_pair_is_left():
    assert train_bpe({b'abc': 1, b'x': 9}, 5000)[256:] == [b'ab', b'abc']
    assert len(train_bpe({}, 5000)) == 256
    assert len(train_bpe(count_pieces(['', 'a b']), 256)) == 256


def test_any_bytes_can_be_encoded(trained):
    bpe = make_encoding(trained[0])
    text = ''.join(map(chr, [*range(0xd800), *range(0xe000, 0x11000), *range(0x1f000, 0x20000)]))
    assert bpe.decode(bpe.encode(text)) == text
    assert bpe.decode_bytes(list(range(256))) == bytes(range(256))


def test_the_order_of_the_dict_has_no_effect():
    pieces = count_pieces(TEXTS.values())
    expected = train_bpe(pieces, 800)
    names = sorted(pieces)
    random.Random(1).shuffle(names)
    for order in (names, names[::-1]):
        assert train_bpe({name: pieces[name] for name in order}, 800) == expected


def test_the_hash_seed_has_no_effect(project):
    program = ('import sys\n'
               'from data.bpe import count_pieces, train_bpe\n'
               'print(train_bpe(count_pieces([sys.argv[1]]), 700))')
    for seed in ('1', '2'):
        done = subprocess.run([sys.executable, '-c', program, TEXTS['cyrillic']], cwd=project,
                              env=os.environ | {'PYTHONHASHSEED': seed}, timeout=60, check=True,
                              capture_output=True, encoding='utf-8')
        assert done.stdout == f'{train_bpe(count_pieces([TEXTS["cyrillic"]]), 700)}\n'


def test_a_long_piece_takes_seconds():
    """Text without spaces is one piece. A merge must read it once, not once for each occurrence."""
    piece = ''.join(random.Random(1).choices('ACGT', k=200_000)).encode()
    begin = time.process_time()
    assert len(train_bpe({piece: 1}, 300)) == 300
    assert time.process_time() - begin < 5
