"""
Generate text with trained weights.

    python sample.py --start="What is an LLM?"
    python sample.py --out_dir=out-shakespeare-char --num_samples=1 --temperature=0.5
"""
import codecs
import math
import os
import shutil
import sys
import time

import torch

import configurator
from configurator import fail, one_line_errors, pick_device, run_main, setup
from data.checkpoints import load_checkpoint, load_model
from data.files import cannot_write
from data.gpt2 import gpt2_folder, load_gpt2, save_gpt2
from data.linears import pick_dtype, place_for_generation
from data.prompts import bracketed, encode_prompt, unescape
from data.runs import read_runs
from data.texts import read_text
from data.tokenizers import pretrained_tokenizer, tokenizer_from_dict
from data.weights import checkpoint_path

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

LIMITS = {(1, 1e9): 'num_samples max_new_tokens', (0, 1e9): 'temperature top_k',
          (1e-9, 1): 'top_p', (0, 2**63 - 1): 'seed'}
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
    return load_model(path, checkpoint), tokenizer_from_dict(checkpoint['tokenizer']), words

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

if __name__ == '__main__':
    run_main(main, globals())
