"""
Generate text with trained weights.

    python sample.py --start="What is an LLM?"
    python sample.py --out_dir=out-shakespeare-char --num_samples=1 --temperature=0.5
"""
import codecs
import math
import os
import re
import shutil
import sys
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import configurator
from configurator import (
    cpu_multiplies_bfloat16,
    fail,
    one_line_errors,
    pick_device,
    run_main,
    setup,
)
from data.build import read_text
from data.checkpoints import checkpoint_path, load_checkpoint, load_model
from data.files import cannot_write
from data.huggingface import gpt2_folder, load_gpt2, save_gpt2
from data.runs import read_runs
from data.tokenizers import CharTokenizer, pretrained_tokenizer, tokenizer_from_dict

# -----------------------------------------------------------------------------
# settings

# what to load
init_from = 'resume'  # resume (weights of train.py) | gpt2, gpt2-xl, ... | DIR with weights
out_dir = ''  # folder of the run; empty: the latest run
weights = 'best'  # best: model.pth, the lowest val loss | last: ckpt.pt, the end of training
export = ''  # write the weights to this new folder, for Hugging Face's transformers, and exit
# what to generate
start = ''  # prompt, or FILE:path of its file; empty: a newline or end-of-text; \n is a newline
interactive = False  # continue each line that you type; Ctrl-D ends
num_samples = 10  # samples, generated together; a single one is printed as it grows
max_new_tokens = 500  # tokens in each sample
temperature = 0.8  # below 1: more predictable, above 1: more varied; 0: the most likely token
top_k = 200  # sample from the k most likely tokens; 0 keeps all
top_p = 1.0  # sample from the most likely tokens that together reach this probability
stop = ''  # end a sample before this text; \n, \t and \\ mean newline, tab and backslash
seed = 1337  # seed of the samples
# machine
device = 'auto'  # auto (env TORCH_DEVICE, or the first of cuda, mps, cpu) | cuda:1 | ...
dtype = 'auto'  # of the weights; auto is the fastest for this device
quantize = ''  # int8: weights of one byte, on a CPU; changes logits by about 1% of their spread

LIMITS = dict(num_samples=(1, 1e9), max_new_tokens=(1, 1e9), temperature=(0, 1e9),
              top_k=(0, 1e9), top_p=(1e-9, 1), seed=(0, 2**63 - 1))
CHOICES = {'weights': ('best', 'last'), 'quantize': ('', 'int8'), 'dtype': configurator.DTYPES}

@torch.inference_mode()
def main():
    # mistakes that need no weights
    path = os.path.expanduser(start.removeprefix('FILE:'))
    prompt = read_text(path) if start.startswith('FILE:') else unescape(start)
    if os.path.exists(export) and (not os.path.isdir(export) or os.listdir(export)):
        fail(f'--export={export}: it exists and is not an empty folder, name another')
    kind = pick_device(device).type
    if quantize and (kind != 'cpu' or dtype != 'auto' or export):
        fail(f'--quantize={quantize} is for --device=cpu, without --dtype and --export')
    count = 1 if interactive else num_samples

    # weights
    source = (out_dir or last_run()) if init_from == 'resume' else init_from
    if init_from == 'resume' or os.path.isdir(source) and checkpoint_path(source):
        source = os.path.join(source, 'model.pth' if weights == 'best' else 'ckpt.pt')
    model, tokenizer, words = read_weights(source)
    print(words + f', as {quantize}' * bool(quantize))
    if export:
        return export_model(model, tokenizer)
    process = setup(device=device, dtype=pick_dtype(kind, dtype, quantize, count), seed=seed)
    place_for_generation(model, process.device, process.dtype, quantize, count)

    # text
    generator = process.generator('sample', device=process.device)
    if interactive:
        return answer_lines(model, tokenizer, generator)
    with one_line_errors('--start: '):
        idx = encode_prompt(tokenizer, prompt, process.device)
    if idx.size(1) > model.config.block_size:
        print(f'note: the prompt has {idx.size(1)} tokens, '
              f'the model sees the last {model.config.block_size}')
    t0 = process.clock()
    n = write(model, tokenizer, prompt, idx.repeat(count, 1), generator)
    seconds = time.perf_counter() - t0
    print(f'{count} x {n} tokens in {seconds:.2f} s: {count * n / seconds:.0f} tokens/s')

def load(source, device='cpu'):
    """Return (model, tokenizer) for use from Python; the model is in eval mode.

    source: a run's folder or checkpoint, a name of GPT-2, or a folder with its weights.
    """
    model, tokenizer, _ = read_weights(source)
    return model.eval().to(device), tokenizer

def read_weights(source):
    """Return the model, the tokenizer, and words that describe them."""
    path = checkpoint_path(source)
    if not path and not source.endswith(('.pth', '.pt')):
        with one_line_errors(f'--init_from={source}: '):
            model = load_gpt2(gpt2_folder(source))
            saved = pretrained_tokenizer(source, model.config.vocab_size)
        words = f'weights of {source}, {model.num_params(False):,} parameters'
        return model, tokenizer_from_dict(saved), words
    path = path or source
    checkpoint = load_checkpoint(path)
    loss = checkpoint.get('val_loss', checkpoint.get('best_val_loss'))
    words = f'{"last" if "optimizer" in checkpoint else "best"} weights: {path}, '
    words += f'step {checkpoint["iter_num"]}'
    if loss < math.inf:  # inf: not evaluated yet
        words += f', best val loss {loss:.4f}'
    return load_model(checkpoint), tokenizer_from_dict(checkpoint['tokenizer']), words

def write(model, tokenizer, prompt, idx, generator):
    """Print a sample for each row of idx (B, T); return the number of tokens of a sample.

    A single sample is printed as it grows.
    """
    texts = [Text(tokenizer, unescape(stop)) for _ in idx]
    n = 0
    if len(texts) == 1:
        print(bracketed(prompt), end='', flush=True)
    for tokens in model.generate(idx, max_new_tokens, temperature, top_k, top_p, generator,
                                 tokenizer.vocab_size):
        n += 1
        for text, token in zip(texts, tokens.tolist()):
            text.add(token)
        if len(texts) == 1:
            print(texts[0].new(), end='', flush=True)
        if all(text.done for text in texts):
            break
    if len(texts) == 1:
        print(texts[0].new(end=True))
    else:
        for text in texts:
            print(f'{bracketed(prompt)}{text.text}\n---------------')
    return n

def answer_lines(model, tokenizer, generator):
    """Continue each line of standard input, until it ends. Ctrl-C ends one continuation."""
    while True:
        try:
            prompt = unescape(input('> ' if sys.stdin.isatty() else ''))
            write(model, tokenizer, prompt, encode_prompt(tokenizer, prompt, generator.device),
                  generator)
        except EOFError:
            return print() if sys.stdin.isatty() else None
        except KeyboardInterrupt:
            print()
        except ValueError as e:  # characters that the vocabulary lacks
            print(f'error: {e}')

def last_run():
    """Return the folder of the latest run."""
    if runs := [run for run in read_runs() if os.path.isdir(run)]:
        return runs[-1]
    fail('nothing has been trained yet: run python train.py, or give --out_dir')

def export_model(model, tokenizer):
    """Write config.json, model.safetensors and the files of the tokenizer to `export`."""
    with one_line_errors(f'--export={export}: '):
        os.makedirs(export, exist_ok=True)
        try:
            save_gpt2(model, export, tokenizer.eot)
            tokenizer.save_pretrained(export)
        except (ValueError, OSError) as e:
            shutil.rmtree(export, ignore_errors=True)
            if isinstance(e, OSError):
                cannot_write(export, e)
            raise
    print(f'exported to {export}: transformers.GPT2LMHeadModel.from_pretrained({export!r}) '
          'loads it, and AutoTokenizer its tokenizer')

class Text:
    """The text of one sample: whole characters only, and nothing from `stop` on."""

    def __init__(self, tokenizer, stop):
        self.tokenizer, self.stop = tokenizer, stop
        self.decoder = codecs.getincrementaldecoder('utf-8')('replace')
        self.text, self.shown, self.done = '', 0, False

    def add(self, token):
        if not self.done:
            self.text += self.decoder.decode(self.tokenizer.token_bytes(token))
            if self.stop and self.stop in self.text:
                self.text, self.done = self.text[:self.text.index(self.stop)], True

    def new(self, end=False):
        """Return the new text; before the end, hold back what may be the beginning of `stop`."""
        hold = 0 if end or self.done or not self.stop else len(self.stop) - 1
        until = max(self.shown, len(self.text) - hold)
        new, self.shown = self.text[self.shown:until], until
        return new

# -----------------------------------------------------------------------------
# prompts

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

# -----------------------------------------------------------------------------
# weights for generation

FBGEMM = 'fbgemm' in torch.backends.quantized.supported_engines  # x86: weights in float16


def pick_dtype(kind, dtype, quantize, num_samples):
    """Return the name of the dtype of weights in which a device of this kind generates fastest."""
    if dtype != 'auto' or kind != 'cpu':
        return dtype
    if quantize:
        return 'float32'
    if num_samples > 1 and cpu_multiplies_bfloat16():
        return 'bfloat16'
    return 'float16' if FBGEMM else 'bfloat16' if num_samples == 1 else 'float32'


def place_for_generation(model, device, dtype, quantize, num_samples):
    """Move the model to the device, in eval mode, with its weights in dtype or int8.

    On a CPU, only Linear layers get it: all else is fastest in float32.
    """
    model.eval().to(device)
    if device.type != 'cpu':
        return model.to(dtype)
    # oneDNN makes GELU of a few rows slower, so use it only for its own products
    onednn = dtype == torch.bfloat16 and torch.backends.mkldnn.is_available() \
        and getattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: True)()
    torch.backends.mkldnn.enabled = onednn or dtype == torch.float32 and not quantize
    stored = {torch.bfloat16: OneDNNLinear if onednn else CastLinear,
              torch.float16: FBGEMMLinear if FBGEMM else CastLinear}.get(dtype)
    stored = Int8Linear if quantize else stored
    stored = stored and works(stored)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if stored and isinstance(child, nn.Linear):
                delattr(module, name)
                setattr(module, name, stored(child, dtype, num_samples))


def works(kind):
    """Return the class `kind` of those below if this torch has its private functions, or None."""
    try:
        kind(nn.Linear(16, 16), torch.bfloat16, 1)(torch.zeros(1, 1, 16))
        return kind
    except (AttributeError, RuntimeError, TypeError):
        print(f'note: {kind.__name__} does not work with torch {torch.__version__}: using float32')


class CastLinear:
    """A Linear with weights in any dtype, for any processor; inputs and outputs are float32.

    These classes are no nn.Modules, whose calls take 2 us longer.
    """
    def __init__(self, linear, dtype, rows):
        self.weight, self.bias = linear.weight.to(dtype), linear.bias

    def __call__(self, x):  # (B, T, in) -> (B, T, out)
        # float16 cannot hold large inputs
        dtype = torch.bfloat16 if self.weight.dtype == torch.bfloat16 else torch.float32
        y = F.linear(x.to(dtype), self.weight.to(dtype)).float()
        return y if self.bias is None else y + self.bias


class FBGEMMLinear:
    """float16: the fastest for one row, and for several rows if bfloat16 is slow."""
    def __init__(self, linear, dtype, rows):
        self.weight = torch.ops.quantized.linear_prepack_fp16(linear.weight.float(), linear.bias)
        # called directly, because a look through its arguments takes 5 us
        self.product = torch.ops.quantized.linear_dynamic_fp16._op

    def __call__(self, x):
        return self.product(x, self.weight)


class OneDNNLinear(CastLinear):
    """bfloat16 in the order in which oneDNN's kernel reads it: the fastest for several rows."""
    def __init__(self, linear, dtype, rows):
        super().__init__(linear, dtype, rows)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight)

    def __call__(self, x):
        y = torch.ops.mkldnn._linear_pointwise(x.bfloat16(), self.weight, None, 'none', [], '')
        return y.float() if self.bias is None else y.float() + self.bias


class Int8Linear:
    """One byte a weight, with a scale per output channel.

    One row times a matrix is a weighted sum of the matrix's columns. embedding_bag computes such
    sums several times as fast as torch's int8 products.
    """

    def __init__(self, linear, dtype, rows):
        weight, self.bias = linear.weight.float(), linear.bias
        self.n_out, n_in = weight.shape
        self.scale = weight.abs().amax(dim=1).clamp(min=1e-30)
        # parts of the outputs: equally many for each thread, and narrow, to sum in registers
        threads = torch.get_num_threads()
        parts = threads * math.ceil(self.n_out / 256 / threads)
        width = math.ceil(self.n_out / parts / 16) * 16
        self.parts = math.ceil(self.n_out / width)
        weight = F.pad(weight / self.scale[:, None], (0, 0, 0, self.parts * width - self.n_out))
        weight = weight.view(self.parts, width, n_in).transpose(1, 2)  # (parts, in, width)
        self.weight = torch.ops.quantized.embedding_bag_byte_prepack(weight.reshape(-1, width))
        # one sum per part and row, over all columns of the part
        self.rows = rows if rows <= 16 else 0  # more rows are faster as a product
        columns = torch.arange(self.parts * n_in, dtype=torch.int32).view(self.parts, 1, n_in)
        self.index = columns.repeat(1, self.rows, 1).flatten()
        self.offsets = torch.arange(0, len(self.index), n_in, dtype=torch.int32)

    def __call__(self, x):
        B, T, C = x.shape
        if T > 1 or B != self.rows:  # a prompt, or many rows
            weight = torch.ops.quantized.embedding_bag_byte_unpack(self.weight)
            y = x.reshape(B * T, C) @ weight.view(self.parts, C, -1)  # (parts, B * T, width)
        else:
            y = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
                self.weight, self.index, self.offsets, False, 0, False,
                torch.cat((x,) * self.parts).view(-1))  # (parts * B, width)
        y = y.view(self.parts, B * T, -1).transpose(0, 1).reshape(B, T, -1)[..., :self.n_out]
        y = y * self.scale
        return y if self.bias is None else y + self.bias

if __name__ == '__main__':
    run_main(main, __name__)
