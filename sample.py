"""
Generate text with trained weights.

    python sample.py --start="What is an LLM?"
    python sample.py --out_dir=out-shakespeare-char --num_samples=1 --temperature=0.5
"""
import codecs
import os
import shutil
import time

import torch

from configurator import cannot_write, configure, cpu_multiplies_bfloat16, fail, pick_device, setup
from data.common import GPT2_NAMES, read_text, tokenizer_from_dict
from model import FBGEMM, GPT, Dropout, GPTConfig, SkipInit, store_weights
from train import encode_prompt, load_checkpoint, load_gpt2, read_runs, read_shards

# -----------------------------------------------------------------------------
# settings

# what to load
init_from = 'resume'  # resume: weights that train.py saved | gpt2, -medium, -large, -xl | a folder
out_dir = ''  # where train.py saved them; '': the most recent run in checkpoints.log
weights = 'best'  # best: model.pth, the lowest val loss | last: ckpt.pt, the end of training
export = ''  # write the weights to this new folder, for Hugging Face's transformers, instead of generating
# what to generate
start = ''  # the prompt; FILE:path takes it from a file; '': a newline or end-of-text
num_samples = 10  # generated together as one batch; a single one is shown as it grows
max_new_tokens = 500  # tokens in each
temperature = 0.8  # below 1: more likely, above 1: more varied; 0: always the likeliest token
top_k = 200  # only the so many likeliest tokens, 0: all
top_p = 1.0  # only the likeliest tokens that reach this probability together
stop = ''  # end a sample before this text
seed = 1337  # of the draws
# machine
device = 'auto'  # auto (env TORCH_DEVICE, else cuda, mps, cpu in this order) | cpu | cuda | cuda:1 | mps
dtype = 'auto'  # of the weights: auto (what the device reads and multiplies fastest) | float32 | bfloat16 | float16
quantize = ''  # int8: weights of one byte each, on a cpu; logits change by about 1 percent of their spread


def check_settings(c):
    """Return what is wrong with the settings in dict c, as a list of sentences."""
    rules = [('num_samples', 'at least 1', c['num_samples'] >= 1),
             ('max_new_tokens', 'at least 1', c['max_new_tokens'] >= 1),
             ('temperature', 'at least 0 and finite', 0 <= c['temperature'] < float('inf')),
             ('top_k', 'at least 0', c['top_k'] >= 0),
             ('top_p', 'above 0 and at most 1', 0 < c['top_p'] <= 1),
             ('weights', 'best or last', c['weights'] in ('best', 'last')),
             ('quantize', 'int8 or nothing', c['quantize'] in ('', 'int8')),
             ('seed', 'at least 0 and below 2**63', 0 <= c['seed'] < 2**63),
             ('init_from', f'resume, {", ".join(GPT2_NAMES)}, or a folder with config.json and model.safetensors',
              c['init_from'] in ('resume', *GPT2_NAMES) or os.path.isdir(c['init_from']))]
    return [f'{key}={c[key]}: {key} is {rule}' for key, rule, holds in rules if not holds]


def pick_dtype(device, num_samples):
    """Return the name of the dtype for the weights in which device generates so many samples together fastest."""
    if device != 'cpu':
        return 'auto'
    if num_samples == 1 or cpu_multiplies_bfloat16():  # one sample takes as long as its weights take to read
        return 'bfloat16'
    return 'float16' if FBGEMM else 'float32'


def place_for_generation(model, device, dtype, quantize, num_samples):
    """Move model to device, in eval mode, with its weights in dtype, or int8 where quantize says so."""
    model.eval().to(device)
    stored = device.type == 'cpu' and (quantize or dtype != torch.float32)
    # oneDNN slows GELU of one row down, and is of no use to products of stored weights but to those of rows in bfloat16
    torch.backends.mkldnn.enabled = not stored or dtype == torch.bfloat16 and num_samples > 1 and not quantize
    if stored:
        store_weights(model, torch.int8 if quantize else dtype, num_samples)
    else:
        model.to(dtype)
    for module in model.modules():
        # as plain attributes, and the smallest called directly: nn.Module's __getattr__ takes 0.5 us each time, its __call__,
        # which looks for hooks, 1 us, together 10 percent of a token on a CPU
        parts = {name: part.forward if isinstance(part, (Dropout, torch.nn.LayerNorm, torch.nn.RMSNorm)) else part
                 for name, part in module._modules.items()}
        vars(module).update(module._parameters, **parts)


def last_run():
    """Return the directory of the most recent run."""
    runs = read_runs()
    if not runs:
        fail('nothing has been trained yet (no checkpoints.log): run python train.py, or give --out_dir')
    return runs[-1]


class Text:
    """The text of one sample, as far as its tokens make whole characters and `stop` allows."""

    def __init__(self, tokenizer, stop):
        self.tokenizer, self.stop = tokenizer, stop
        self.decoder = codecs.getincrementaldecoder('utf-8')('replace')  # a character may take several tokens
        self.text, self.shown, self.done = '', 0, False

    def add(self, token):
        if not self.done:
            self.text += self.decoder.decode(self.tokenizer.token_bytes(token))
            if self.stop and self.stop in self.text:
                self.text, self.done = self.text[:self.text.index(self.stop)], True

    def new(self, end=False):
        """Return what came since the last call; holds back what may be the beginning of `stop`, until the end."""
        hold = 0 if end or self.done or not self.stop else len(self.stop) - 1
        until = max(self.shown, len(self.text) - hold)
        new, self.shown = self.text[self.shown:until], until
        return new


def export_model(model, tokenizer):
    """Write config.json, model.safetensors and, for byte pairs, the tokenizer's files to the folder `export`."""
    try:
        os.makedirs(export, exist_ok=True)
    except OSError as e:
        fail(f'--export={export}: {e.strerror}')
    try:
        model.save_pretrained(export)
        tokenizer.save_pretrained(export)
    except (ValueError, OSError) as e:
        shutil.rmtree(export, ignore_errors=True)
        if isinstance(e, OSError):
            cannot_write(export, e)
        fail(f'--export={export}: {e}')
    print(f'exported to {export}: transformers.GPT2LMHeadModel.from_pretrained({export!r}) loads it'
          + (', without a tokenizer: Hugging Face has none for characters' if tokenizer.eot is None else ''))


@torch.inference_mode()
def main():
    prompt = read_text(start[5:]) if start.startswith('FILE:') else start
    if os.path.exists(export) and (not os.path.isdir(export) or os.listdir(export)):
        fail(f'--export={export}: it exists and is not an empty folder, name another')
    if init_from == 'resume':
        path = os.path.join(out_dir or last_run(), {'best': 'model.pth', 'last': 'ckpt.pt'}[weights])
        checkpoint = load_checkpoint(path)
    kind = pick_device(device).split(':')[0]
    if quantize and (kind != 'cpu' or dtype != 'auto'):
        fail(f'--quantize={quantize} is for --device=cpu, without --dtype')
    weights_dtype = dtype if dtype != 'auto' else 'float32' if quantize else pick_dtype(kind, num_samples)
    run = setup(device, weights_dtype, compile=False, seed=seed)
    if init_from == 'resume':
        with SkipInit():
            model = GPT(GPTConfig(**checkpoint['model_args']))
        if 'shards' in checkpoint:
            read_shards(path, checkpoint, model, (), run)
        else:
            model.load_state_dict(checkpoint['model'])
        tokenizer = tokenizer_from_dict(checkpoint['tokenizer'])
        loss = f'val loss {checkpoint["val_loss"]:.4f}' if 'val_loss' in checkpoint else \
            f'best val loss until then {checkpoint["best_val_loss"]:.4f}'
        run.print(f'{weights} weights: {path}, step {checkpoint["iter_num"]}, {loss}' + f', as {quantize}' * bool(quantize))
    else:
        tokenizer = tokenizer_from_dict({'kind': 'gpt2'})
        model = load_gpt2(init_from, 0, 0.0, run, tokenizer)
        run.print(f'weights of {init_from}, {model.num_params(False):,} parameters')
    if export:
        return export_model(model, tokenizer)
    place_for_generation(model, run.device, run.dtype, quantize, num_samples)

    try:
        idx = encode_prompt(tokenizer, prompt, run.device)
    except ValueError as e:
        fail(f'--start: {e}')
    if idx.size(1) > model.config.block_size:
        run.print(f'note: the prompt has {idx.size(1)} tokens, the model sees the last {model.config.block_size}')

    run.sync()
    t0 = time.perf_counter()
    texts = [Text(tokenizer, stop) for _ in range(num_samples)]
    n = 0
    if num_samples == 1:
        print(prompt, end='', flush=True)
    for tokens in model.generate(idx.repeat(num_samples, 1), max_new_tokens, temperature, top_k, top_p,
                                 run.generator('sample', device=run.device), tokenizer.vocab_size):
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
            print(f'{prompt}{text.text}\n---------------')
    print(f'{num_samples} x {n} tokens in {seconds:.2f} s: {num_samples * n / seconds:.0f} tokens/s')


if __name__ == '__main__':
    _config = configure(globals())
    if _problems := check_settings(_config):
        fail(*_problems)
    main()
