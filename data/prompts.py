"""
Prompts: the texts that a model continues.
"""
import re

import numpy as np
import torch

from configurator import fail
from data.tokenizers import CharTokenizer


def encode_prompt(tokenizer, text, device='cpu'):
    """Return the ids of text as a tensor (1, T) on the device, with T > 0.

    An empty text becomes the end-of-text token. Without such a token it becomes a newline, or
    id 0 if the vocabulary has no newline. ValueError names characters without an id.
    """
    if text:
        ids = tokenizer.encode(text)
    elif tokenizer.eot is not None:
        ids = [tokenizer.eot]
    elif isinstance(tokenizer, CharTokenizer) and tokenizer.missing('\n'):
        ids = [0]
    else:
        ids = tokenizer.encode('\n')
    return torch.tensor(np.array(ids, dtype=np.int64), device=device)[None]


def pick_prompt(tokenizer, prompt, given):
    """Return the unescaped prompt if the vocabulary can write it, otherwise an empty one.

    given: the user asked for this prompt, so fail instead.
    """
    prompt = unescape(prompt)
    try:
        encode_prompt(tokenizer, prompt)
        return prompt
    except ValueError as e:
        if given:
            fail(f'--sample_prompt={prompt}: {e}')
        return ''


def unescape(text):
    r"""Return text with \n, \t and \\ replaced by a newline, a tab and a backslash."""
    names = {'n': '\n', 't': '\t', '\\': '\\'}
    return re.sub(r'\\([nt\\])', lambda match: names[match[1]], text)


def bracketed(prompt):
    """Return the prompt in brackets, which show where the model's text begins; '' stays ''."""
    return f'[{prompt}]' if prompt else ''


def continue_text(model, tokenizer, prompt, n, generator):
    """Return the prompt in brackets and n tokens that the model generates after it."""
    training = model.training
    model.eval()
    idx = encode_prompt(tokenizer, prompt, generator.device)
    new = model.generate(idx, n, temperature=0.8, top_k=200, generator=generator,
                         vocab_size=tokenizer.vocab_size)
    text = bracketed(prompt) + tokenizer.decode([token.item() for token in new])
    model.train(training)
    return text
