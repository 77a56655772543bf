"""
Generate text with trained weights.

    python sample.py --start="What is an LLM?"
    python sample.py --out_dir=out-shakespeare-char --num_samples=1 --temperature=0.5
"""
import codecs
import math
import os
import shutil
import time

import torch

import configurator
from configurator import configure, fail, one_line_errors, pick_device, run_main, setup
from data.checkpoints import load_checkpoint, load_model
from data.files import cannot_write
from data.gpt2 import gpt2_folder, load_gpt2, save_gpt2
from data.linears import pick_dtype, place_for_generation
from data.prompts import bracketed, encode_prompt, unescape
from data.runs import read_runs
from data.texts import read_text
from data.tokenizers import pretrained_tokenizer, tokenizer_from_dict

# -----------------------------------------------------------------------------
# settings

# what to load
init_from = 'resume'  # resume (weights of train.py) | gpt2, gpt2-xl, ... | DIR with such weights
out_dir = ''  # folder of the run; empty: the latest run
weights = 'best'  # best: model.pth, the lowest val loss | last: ckpt.pt, the end of training
export = ''  # write the weights to this new folder, for Hugging Face's transformers, and exit
# what to generate
start = ''  # prompt, or FILE:path of its file; empty: a newline or end-of-text; \n is a newline
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

    # weights
    if init_from == 'resume':
        path = os.path.join(out_dir or last_run(), 'model.pth' if weights == 'best' else 'ckpt.pt')
        checkpoint = load_checkpoint(path)
    process = setup(device=device, dtype=pick_dtype(kind, dtype, quantize, num_samples), seed=seed)
    if init_from == 'resume':
        model = load_model(path, checkpoint)
        tokenizer = tokenizer_from_dict(checkpoint['tokenizer'])
        loss = checkpoint.get('val_loss', checkpoint.get('best_val_loss'))
        known = f', best val loss {loss:.4f}' if loss < math.inf else ''  # inf: not evaluated yet
        print(f'{weights} weights: {path}, step {checkpoint["iter_num"]}{known}'
              + f', as {quantize}' * bool(quantize))
    else:
        with one_line_errors(f'--init_from={init_from}: '):
            model = load_gpt2(gpt2_folder(init_from))
            saved = pretrained_tokenizer(init_from, model.config.vocab_size)
        tokenizer = tokenizer_from_dict(saved)
        print(f'weights of {init_from}, {model.num_params(False):,} parameters')
    if export:
        return export_model(model, tokenizer)
    place_for_generation(model, process.device, process.dtype, quantize, num_samples)

    # prompt
    with one_line_errors('--start: '):
        idx = encode_prompt(tokenizer, prompt, process.device)
    if idx.size(1) > model.config.block_size:
        print(f'note: the prompt has {idx.size(1)} tokens, '
              f'the model sees the last {model.config.block_size}')

    # text
    t0 = process.clock()
    texts = [Text(tokenizer, unescape(stop)) for _ in range(num_samples)]
    n = 0
    if num_samples == 1:
        print(bracketed(prompt), end='', flush=True)
    for tokens in model.generate(idx.repeat(num_samples, 1), max_new_tokens, temperature, top_k,
                                 top_p, process.generator('sample', device=process.device),
                                 tokenizer.vocab_size):
        n += 1
        for text, token in zip(texts, tokens.tolist()):
            text.add(token)
        if num_samples == 1:
            print(texts[0].new(), end='', flush=True)
        if all(text.done for text in texts):
            break
    seconds = time.perf_counter() - t0
    if num_samples == 1:
        print(texts[0].new(end=True))
    else:
        for text in texts:
            print(f'{bracketed(prompt)}{text.text}\n---------------')
    rate = num_samples * n / seconds
    print(f'{num_samples} x {n} tokens in {seconds:.2f} s: {rate:.0f} tokens/s')

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
        """Return the text since the last call, but before the end no beginning of `stop`."""
        hold = 0 if end or self.done or not self.stop else len(self.stop) - 1
        until = max(self.shown, len(self.text) - hold)
        new, self.shown = self.text[self.shown:until], until
        return new

if __name__ == '__main__':
    configure(globals())
    run_main(main)
