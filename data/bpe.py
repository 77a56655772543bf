r"""
Byte pair encoding (BPE): how a tokenizer is trained on text.

    from data.bpe import PATTERN, count_pieces, train_bpe
    tokens = train_bpe(count_pieces(['some text', 'another text']), vocab_size=1024)
    ranks = {token: i for i, token in enumerate(tokens)}
    bpe = tiktoken.Encoding('mine', pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})

count_pieces splits the text into pieces: a typical piece is a word with the space before it.
train_bpe starts with one token per byte, so the tokens can encode any text. It merges the most
frequent pair of adjacent tokens into a new token, in all pieces, and repeats this.

Sources: https://arxiv.org/abs/1508.07909 (BPE for words), and GPT-2's paper, "Language Models are
Unsupervised Multitask Learners" (BPE for bytes).
"""
import heapq
from collections import Counter, defaultdict
from operator import add

import regex  # tiktoken requires this package; Python's re does not know \p{L}

# -----------------------------------------------------------------------------
# tokens as text: one letter for each byte, as in GPT-2's files

VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # a letter stands for itself
OTHERS = [byte for byte in range(256) if byte not in VISIBLE]
LETTERS = ''.join(chr(byte if byte in VISIBLE else 256 + OTHERS.index(byte)) for byte in range(256))
TO_BYTES = {ord(letter): byte for byte, letter in enumerate(LETTERS)}


def to_letters(token):
    """Return the letters of a token, which is given as bytes."""
    return token.decode('latin-1').translate(LETTERS)


def to_bytes(letters):
    """Return the bytes of a token, which is given as letters."""
    return letters.translate(TO_BYTES).encode('latin-1')

# -----------------------------------------------------------------------------
# training

# GPT-4's pattern (cl100k_base in tiktoken 0.3). Newer versions of tiktoken write \p{N}{1,3}+ and
# \s++$, which other regex engines read differently.
PATTERN = '|'.join([
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # English contractions
    r'[^\r\n\p{L}\p{N}]?\p{L}+',      # letters, with one space or symbol before them
    r'\p{N}{1,3}',                    # at most three digits
    r' ?[^\s\p{L}\p{N}]+[\r\n]*',     # symbols, with one space before and line breaks after them
    r'\s*[\r\n]+',                    # line breaks, with the white space before them
    r'\s+(?!\S)',                     # white space, without the last space before a word
    r'\s+',                           # other white space
])

# All bytes, in the order of GPT-2's vocabulary: that of the letters which stand for them.
# Training uses this order only to choose between equally frequent pairs.
BYTE_ORDER = bytes(sorted(range(256), key=LETTERS.__getitem__))


def count_pieces(texts):
    """Count the pieces of an iterable of strings. Returns a Counter of piece (bytes) -> count.

    The counts of parts of a text may be added. A part must begin with a visible character and
    follow a line break, or the cut may divide a piece.
    """
    split = regex.compile(PATTERN)
    pieces = Counter()
    for text in texts:
        # one piece at a time: a list of all pieces would need ten times the memory of the text
        pieces.update(match.group() for match in split.finditer(text))
    return Counter({piece.encode('utf-8'): count for piece, count in pieces.items()})


def train_bpe(pieces, vocab_size):
    """Return the tokens that BPE learns from pieces, as a list of bytes. The index is the token id.

    pieces: dict of piece (bytes) -> count. The first 256 tokens are the single bytes, in order of
    value, so vocab_size is at least 256. The others follow in the order of the merges. There are
    fewer than vocab_size tokens if each piece becomes a single token.

    Among equally frequent pairs, the pair of the earliest tokens is merged first. The first token
    of the pair counts more than the second. Single bytes come in BYTE_ORDER. So the tokens are the
    same as those of BpeTrainer in Hugging Face's tokenizers.
    """
    # a word is a piece as a string with one character per token: chr(i) is token i. A pair is a
    # string of two such characters. Python's string methods find and merge a pair fast
    tokens = [bytes([byte]) for byte in BYTE_ORDER]
    token_of_byte = bytes(BYTE_ORDER.index(byte) for byte in range(256))
    words = [piece.translate(token_of_byte).decode('latin-1') for piece in pieces]
    counts = list(pieces.values())

    # count each pair, and note the indices of the words that contain it
    pair_counts, places = defaultdict(int), defaultdict(list)
    for i, word in enumerate(words):
        for pair, n in pairs_of(word).items():
            pair_counts[pair] += n * counts[i]
            places[pair].append(i)

    # One entry for each pair that is not yet merged. heappop returns the smallest entry, which is
    # the pair with the highest count.
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)
    while heap and len(tokens) < vocab_size:
        negative_count, pair = heapq.heappop(heap)
        count = pair_counts[pair]
        if count != -negative_count:
            # other merges have lowered the count of this pair: put it back with its present count
            if count > 0:
                heapq.heappush(heap, (-count, pair))
            continue
        # no other pair makes the same token, because equal bytes are merged in the same way
        new_token, new_pairs = chr(len(tokens)), set()
        tokens.append(tokens[ord(pair[0])] + tokens[ord(pair[1])])
        # visit only the words that contain the pair: counting all pairs again after each merge
        # would take hundreds of times as long
        for i in places.pop(pair):
            for old_pair, n in pairs_of(words[i]).items():
                pair_counts[old_pair] -= n * counts[i]
            words[i] = words[i].replace(pair, new_token)
            for new_pair, n in pairs_of(words[i]).items():
                pair_counts[new_pair] += n * counts[i]
                if new_token in new_pair:
                    places[new_pair].append(i)
                    new_pairs.add(new_pair)
        for new_pair in new_pairs:
            heapq.heappush(heap, (-pair_counts[new_pair], new_pair))
    return [bytes([byte]) for byte in range(256)] + tokens[256:]


def pairs_of(word):
    """Count the pairs in a word."""
    return Counter(map(add, word, word[1:]))
