"""
Generate text with trained weights.

    python sample.py --start="What is an LLM?"
    python sample.py --out_dir=out-shakespeare-char --num_samples=1 --temperature=0.5
"""
import codecs
import os
import re

import configurator
from configurator import DTYPES, fail, one_line_errors, pick_device, run_main, setup
from data.build import read_text
from data.checkpoints import checkpoint_path, load_model, read_weights, usable
from data.gguf import write_gguf
from data.huggingface import write_pretrained
from data.runs import read_runs
from data.tokenizers import CharTokenizer, tokenizer_from_dict

import numpy as np
import torch
from torch import nn

# -----------------------------------------------------------------------------
# settings

# what to load
init_from = 'resume'  # resume (weights of train.py) | gpt2 ... gpt2-xl | OWNER/NAME | DIR
out_dir = ''  # folder of the run; empty: the latest run
weights = 'best'  # best: model.pth, the lowest val loss | last: ckpt.pt, the end of training
export = ''  # write the weights to this new folder, for transformers and llama.cpp, and exit
gguf_dtype = 'float16'  # data type of the matrices for llama.cpp
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
dtype = 'auto'  # data type of the weights; auto is the fastest for this device

LIMITS = dict(  # all other numbers: at least 0
    num_samples=(1, 1e9), max_new_tokens=(1, 1e9), top_p=(1e-9, 1), seed=(0, 2**63 - 1))
CHOICES = {'weights': ('best', 'last'), 'dtype': DTYPES, 'gguf_dtype': ('float16', 'float32')}

@torch.inference_mode()
def main():
    # mistakes that need no weights
    prompt = read_text(start[5:]) if start.startswith('FILE:') else unescape(start)
    if os.path.exists(export) and (not os.path.isdir(export) or os.listdir(export)):
        fail(f'--export={export}: it exists and is not an empty folder, name another')
    kind = pick_device(device).type

    # weights
    source = find_weights()
    with usable(source):
        model, tokenizer = load(source, tell=True)
    if export:
        return export_model(model, tokenizer)
    count = 1 if interactive else num_samples
    process = setup(device=device, dtype=pick_dtype(kind, dtype, count), seed=seed)
    place_for_generation(model, process.device, process.dtype)

    # text
    generator = process.generator('sample', device=process.device)
    if interactive:
        return answer_lines(model, tokenizer, generator)
    with one_line_errors('--start: '):
        idx = encode_prompt(tokenizer, prompt, process.device)
    t0 = process.clock()
    n = write_samples(model, tokenizer, prompt, idx.repeat(count, 1), generator)
    seconds = process.clock() - t0
    print(f'{count} x {n} tokens in {seconds:.2f} s: {count * n / seconds:.0f} tokens/s')

# -----------------------------------------------------------------------------
# weights with their tokenizer

def load(source, device='cpu', tell=False):
    """Return the model, in eval mode, and its tokenizer. ValueError or OSError say what is wrong.

    source: as in read_weights. tell: print when a run saved these weights, and how good they are.
    """
    checkpoint = read_weights(source)
    model = load_model(checkpoint).eval().to(device)
    if tell and 'iter_num' in checkpoint:  # trained by quill
        which = 'best' if 'val_loss' in checkpoint else 'last'
        loss = checkpoint.get('val_loss', checkpoint.get('best_val_loss'))
        print(f'{which} weights: {source}, step {checkpoint["iter_num"]}, best val loss {loss:.4f}')
    return model, tokenizer_from_dict(checkpoint['tokenizer'])

def find_weights():
    """Return the weights that the settings name, as a source for load()."""
    folder = out_dir if init_from == 'resume' else init_from
    if not folder:
        runs = [run for run in read_runs() if checkpoint_path(run)]
        if not runs:
            fail('nothing has been trained yet: give --out_dir, or run '
                 'python train.py config/train_shakespeare_char.py --max_seconds=300')
        folder = runs[-1]
    if weights == 'last':
        return os.path.join(folder, 'ckpt.pt')
    missing = os.path.join(folder, 'model.pth') if init_from == 'resume' else folder
    return checkpoint_path(folder) or missing  # ckpt.pt before the first evaluation

def export_model(model, tokenizer):
    """Write the model and its tokenizer to `export`."""
    with one_line_errors(f'--export={export}: '):
        write_pretrained(export, model, tokenizer)
        try:
            write_gguf(os.path.join(export, 'model.gguf'), model, tokenizer, gguf_dtype)
        except ValueError as e:  # a tokenizer that llama.cpp cannot read
            print(f'note: no model.gguf: {e}')
    print(f'exported to {export}: from_pretrained({export!r}) of transformers loads it')

# -----------------------------------------------------------------------------
# prompts

def encode_prompt(tokenizer, text, device='cpu'):
    """Return the ids of text, at least one, as a tensor (1, T). ValueError: unknown characters.

    The text of a special token becomes that token. An empty text becomes the end-of-text token, or
    a newline if the tokens are characters or there is no such token.
    """
    ids = tokenizer.encode(text, special=True)
    if not len(ids):
        if isinstance(tokenizer, CharTokenizer):
            ids = [max(0, tokenizer.chars.find('\n'))]
        elif tokenizer.eot is not None:
            ids = [tokenizer.eot]
        else:
            ids = tokenizer.encode('\n')
    return torch.tensor(np.array(ids, dtype=np.int64), device=device)[None]

def pick_prompt(tokenizer, prompt, given):
    """Return the unescaped prompt. If it has no ids: fail if the user gave it, or return ''."""
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

# -----------------------------------------------------------------------------
# samples

def write_samples(model, tokenizer, prompt, idx, generator):
    """Print a sample for each row of idx (B, T), a single one as it grows; return their length."""
    begin = f'[{prompt}]' if prompt else ''  # brackets show where the model's text begins
    texts = [Text(tokenizer, unescape(stop)) for _ in idx]
    single = len(texts) == 1
    if single:
        print(begin, end='', flush=True)
    new = model.generate(idx, max_new_tokens, temperature, top_k, top_p, generator,
                         tokenizer.vocab_size)
    for n, tokens in enumerate(new, 1):
        for text, token in zip(texts, tokens.tolist()):
            text.add(token)
        if single:
            print(texts[0].new(), end='', flush=True)
        if all(text.done for text in texts):
            break
    for text in texts:
        print(text.new(end=True) if single else f'{begin}{text.text}\n{"-" * 15}')
    return n

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

def answer_lines(model, tokenizer, generator):
    """Continue each line of standard input, until it ends. Ctrl-C ends one continuation."""
    while True:
        try:
            prompt = unescape(input('> '))
            try:
                idx = encode_prompt(tokenizer, prompt, generator.device)
            except ValueError as e:  # characters that the vocabulary lacks
                print(f'error: {e}')
                continue
            write_samples(model, tokenizer, prompt, idx, generator)
        except KeyboardInterrupt:
            print()
        except EOFError:  # Ctrl-D
            return print()

def continue_text(model, tokenizer, prompt, n, generator):
    """Return the prompt in brackets and n tokens after it, by a model that is in training."""
    model.eval()
    idx = encode_prompt(tokenizer, prompt, generator.device)
    new = model.generate(idx, n, temperature=0.8, top_k=200, generator=generator,
                         vocab_size=tokenizer.vocab_size)
    text = tokenizer.decode([token.item() for token in new])
    model.train()
    return f'[{prompt}]{text}' if prompt else text

# -----------------------------------------------------------------------------
# weights for generation

# libraries whose products are fastest on a CPU: in float16 on x86, in bfloat16 on some CPUs
FBGEMM = 'fbgemm' in torch.backends.quantized.supported_engines
ONEDNN = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()

def pick_dtype(kind, dtype, num_samples):
    """Return the name of the dtype of weights in which a device of this kind generates fastest."""
    if dtype != 'auto' or kind != 'cpu':
        return dtype
    if num_samples > 1 and configurator.cpu_multiplies_bfloat16():
        return 'bfloat16'
    return 'float16' if FBGEMM else 'float32'

def place_for_generation(model, device, dtype):
    """Move the model to the device, in eval mode, with its weights in dtype."""
    model.eval().to(device)
    library = {torch.float16: FBGEMM, torch.bfloat16: ONEDNN}.get(dtype)
    # oneDNN makes GELU of a few rows slower
    torch.backends.mkldnn.enabled = dtype != torch.float16
    if device.type != 'cpu' or not library:
        return model.to(dtype)
    for module in list(model.modules()):  # all but the Linear layers is fastest in float32
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                delattr(module, name)
                setattr(module, name, stored_linear(child, dtype))

def stored_linear(linear, dtype):
    """Return a function that computes what `linear` does, with its weights stored for a library.

    Input (B, T, in) and output (B, T, out) are float32. Calling an nn.Module would take 2 us more.
    """
    bias = linear.bias
    if dtype == torch.float16:
        packed = torch.ops.quantized.linear_prepack_fp16(linear.weight.float(), bias)
        product = torch.ops.quantized.linear_dynamic_fp16._op  # _op saves 5 us of checks
        return lambda x: product(x, packed)
    packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.bfloat16())

    def product(x):
        y = torch.ops.mkldnn._linear_pointwise(x.bfloat16(), packed, None, 'none', [], '')
        return y.float() if bias is None else y.float() + bias
    return product

if __name__ == '__main__':
    run_main(main, __name__)
