"""
Checkpoints: ckpt.pt, from which training resumes, and model.pth, the best weights.

A checkpoint is a dict of plain values and tensors:
    in both files    format, iter_num, config, tokenizer, model, model_args
    in model.pth     val_loss
    in ckpt.pt       optimizer, scaler, best_val_loss, train_seconds, data, position
"""
import contextlib
import os
import re
import zipfile

from configurator import fail, first_line, say, torchrun
from data.dataset import read_meta
from data.files import cannot_write, replace_file
from data.huggingface import read_pretrained
from data.tokenizers import tokenizer_size
from model import GPT, GPTConfig, is_sharded

import numpy as np
import torch
from torch.utils._pytree import tree_map

VERSION = 1  # of the format
WTE, HEAD = 'transformer.wte.weight', 'lm_head.weight'
# what a pickle needs for numpy's numbers; numpy 1 has another name for the first function
SCALAR = np.float64(0).__reduce__()[0]
NUMPY_SCALARS = [np.dtype, *{type(np.dtype(code)) for code in '?bhilqBHILQefd'}, SCALAR,
                 (SCALAR, 'numpy.core.multiarray.scalar')]

# -----------------------------------------------------------------------------
# reading

def read_weights(source):
    """Return weights with their model_args and tokenizer, as a dict; a checkpoint has more keys.

    source: a run's folder, a checkpoint, a name on the hub, or a folder of transformers.
    """
    path = checkpoint_path(source)
    if path or source.endswith(('.pth', '.pt')):
        return read_checkpoint(path or source)
    return read_pretrained(source)

def checkpoint_path(source):
    """Return the path of the weights if source is a run's folder or a checkpoint, or None."""
    names = [os.path.join(source, 'model.pth'), os.path.join(source, 'ckpt.pt'), source]
    return next(filter(os.path.isfile, names), None)

@contextlib.contextmanager
def usable(source):
    """Fail if the weights at source cannot be read; name ckpt_prev.pt beside a bad ckpt.pt."""
    try:
        yield
    except (ValueError, OSError) as e:
        folder, name = os.path.split(source)
        hint = ''
        if name == 'ckpt.pt' and os.path.exists(os.path.join(folder, 'ckpt_prev.pt')):
            hint = '; the checkpoint before it is there: --ckpt=ckpt_prev.pt'
        fail(f'cannot use {source}: {first_line(e)}{hint}')

def read_checkpoint(path):
    """Return the checkpoint at path; ValueError says what is wrong with it.

    No code in the file is run, and nothing in it is used as a path.
    """
    if not os.path.isfile(path):
        raise ValueError('there is no such file: train first, or give another --out_dir')
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not check
    except zipfile.BadZipFile:
        damaged = True
    if damaged:
        raise ValueError('it is cut short, damaged, or no checkpoint at all')
    try:
        with torch.serialization.safe_globals(NUMPY_SCALARS):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except Exception as e:
        reason = first_line(e)
        if refused := re.search(r'GLOBAL (\S+)', str(e)):
            reason = f'{refused[1]} is code: save only tensors, numbers, strings, lists and dicts'
        raise ValueError(f'torch refuses it: {reason}')
    checkpoint = tree_map(lambda x: x.item() if isinstance(x, np.generic) else x, checkpoint)
    if not isinstance(checkpoint, dict) or 'format' not in checkpoint:
        adopt_nanogpt_checkpoint(checkpoint)
    elif checkpoint['format'] != VERSION:
        raise ValueError(f'its format is {checkpoint["format"]!r}: this quill reads {VERSION}')
    for key in ('model', 'model_args', 'config', 'tokenizer', 'iter_num'):
        if key not in checkpoint:
            raise ValueError(f'it has no {key}')
    return checkpoint

def adopt_nanogpt_checkpoint(checkpoint):
    """Complete a checkpoint of nanoGPT in place. Its optimizer state is not used."""
    try:
        # torch.compile and DistributedDataParallel put words in front of the names
        weights = {re.sub(r'^((_orig_mod|module)\.)*', '', name): tensor
                   for name, tensor in checkpoint['model'].items()}
        checkpoint['best_val_loss'] = float(checkpoint['best_val_loss'])
        name = os.path.basename(checkpoint['config']['dataset'])
        gpt2 = checkpoint['model_args']['vocab_size'] in (50257, 50304)
    except (LookupError, TypeError, AttributeError):
        raise ValueError('it is a checkpoint neither of quill nor of nanoGPT')
    # without the causal mask
    checkpoint['model'] = {k: v for k, v in weights.items() if not k.endswith('.attn.bias')}
    try:
        tokenizer = {'kind': 'gpt2'} if gpt2 else read_meta(name)['tokenizer']
    except SystemExit:
        raise ValueError(f"it is nanoGPT's and holds no tokenizer: prepare data/{name} first")
    if tokenizer_size(tokenizer) > checkpoint['model_args']['vocab_size']:
        tokenizer.pop('eot', None)  # nanoGPT's characters have no end-of-text token
    checkpoint['tokenizer'] = tokenizer
    checkpoint |= dict(optimizer=[], scaler={}, train_seconds=0.0, data={}, position=0)
    if torchrun('RANK', 0) == 0:
        say("note: this checkpoint is nanoGPT's: its optimizer starts anew, its data is unknown")

def load_model(checkpoint, **changes):
    """Return the GPT of a checkpoint; changes replace its model_args. ValueError: no fit."""
    weights = dict(checkpoint['model'])
    config = GPTConfig(**checkpoint['model_args'] | changes)
    if tokenizer_size(checkpoint['tokenizer']) > config.vocab_size:
        raise ValueError('its tokenizer has more tokens than its model')
    if config.n_layer > len(weights):
        raise ValueError(f'it has too few weights for n_layer={config.n_layer}')
    if config.block_size < checkpoint['model_args'].get('block_size', 0) and not config.rotary:
        key = 'transformer.wpe.weight'
        weights[key] = weights[key][:config.block_size]
    if config.tie_weights:  # one matrix, which files may hold under one of its names
        for name, other in (WTE, HEAD), (HEAD, WTE):
            if other in weights:
                weights.setdefault(name, weights[other])
    model = GPT(config)
    try:
        model.load_state_dict(weights)
    except RuntimeError as e:
        words = ' '.join(str(e).split()[:30])
        raise ValueError(f'its weights do not fit its model_args ({words})')
    if config.tie_weights and not torch.equal(model.lm_head.weight, weights[WTE].float()):
        raise ValueError('lm_head is not tied: config.json needs "tie_word_embeddings": false')
    for name, p in model.named_parameters():
        if not p.isfinite().all():
            raise ValueError(f'{name} has numbers that are not finite: take earlier weights')
    return model

def load_optimizer(optimizer, saved):
    """Load the moments and the last learning rate; other hyperparameters keep this run's values.

    ValueError: moments of another shape, beyond which fused AdamW would write.
    """
    params = [p for group in optimizer.param_groups for p in group['params']]
    state = {}
    for i, p in enumerate(params if saved['state'] else ()):  # empty before the first update
        # clone, or the tensor stays backed by the memory-mapped checkpoint
        state[i] = {name: t.clone() for name, t in saved['state'].get(i, {}).items()}
        if {t.shape for name, t in state[i].items() if name != 'step'} != {p.shape}:
            raise ValueError('the state of its optimizer does not fit: resume with its --optimizer')
        if is_sharded(p):
            from torch.distributed.tensor import distribute_tensor
            state[i] |= {name: distribute_tensor(t.to(p.device), p.device_mesh, p.placements,
                                                 src_data_rank=None)
                         for name, t in state[i].items() if name != 'step'}
    # the number of groups may differ, the order of the parameters does not
    lr = float(saved['param_groups'][-1]['lr'])
    groups = [own | {'lr': lr} for own in optimizer.state_dict()['param_groups']]
    optimizer.load_state_dict({'state': state, 'param_groups': groups})

# -----------------------------------------------------------------------------
# writing

def write_checkpoint(path, process, checkpoint):
    """Write a checkpoint so that `path` is always the old file or the new one, whole.

    All ranks call this together, rank 0 writes. The previous ckpt.pt stays as ckpt_prev.pt.
    """
    def gather(x):  # sharded tensors become whole, on the CPU of rank 0 only
        if is_sharded(x):
            x = x.full_tensor()
            x = x.cpu() if process.is_main else None
        return x
    checkpoint = tree_map(gather, checkpoint)
    if not process.is_main:
        return
    folder, name = os.path.split(path)
    keep = os.path.join(folder, 'ckpt_prev.pt') if name == 'ckpt.pt' else None
    try:
        with replace_file(path, keep) as f:
            torch.save(checkpoint, f)
    except (OSError, RuntimeError) as e:  # torch hides the OSError of the file in a RuntimeError
        reason = e if isinstance(e, OSError) else e.__context__
        cannot_write(path, reason or e)
    say(f'saved {path} (step {checkpoint["iter_num"]})')
