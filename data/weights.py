"""
The weights that a new run starts from: those of an earlier run, or GPT-2's; the memory they need.
"""
import os
from dataclasses import asdict

from configurator import fail, one_line_errors
from data.devices import total_memory
from data.gpt2 import GPT2_NAMES, gpt2_config, gpt2_folder, load_gpt2
from data.tokenizers import pretrained_tokenizer


def checkpoint_path(init_from):
    """Return the path of the weights if --init_from names a run's folder or checkpoint, or None."""
    if init_from in ('scratch', 'resume', 'auto', *GPT2_NAMES):
        return None
    names = [os.path.join(init_from, 'model.pth'), os.path.join(init_from, 'ckpt.pt'), init_from]
    return next(filter(os.path.isfile, names), None)


def find_gpt2(init_from, wanted, process):
    """Return (shape, tokenizer, load) of the GPT-2 that --init_from names.

    init_from: a name of GPT-2, or a folder with its weights. wanted: the GPTConfig of the settings;
    its dropout holds, and its block_size shortens the model. shape: the GPTConfig of the weights.
    tokenizer: as its to_dict returns it. load: a function that returns the model.
    """
    def load():
        with one_line_errors(f'--init_from={init_from}: '):
            folder = gpt2_folder(init_from, process=process)
            return load_gpt2(folder, wanted.block_size, wanted.dropout)
    with one_line_errors(f'--init_from={init_from}: '):
        folder = gpt2_folder(init_from, ['config.json'], process)  # the weights come later
        shape = gpt2_config(folder, wanted.block_size, wanted.dropout)
        return shape, pretrained_tokenizer(init_from, shape.vocab_size), load


def check_weights(shape, theirs, tokenizer, settings, given):
    """Fail if the settings or the data contradict loaded weights.

    shape: the GPTConfig of the weights. theirs: their tokenizer, as its to_dict returns it.
    tokenizer: of the data. given: the keys of the settings that the user gave.
    """
    source = settings['init_from']
    problems = [f'{key}={settings[key]} but the model of init_from={source} has {key}={value}'
                for key, value in asdict(shape).items() if key in given and settings[key] != value]
    if theirs != tokenizer.to_dict():
        problems.append(f'the data has a vocabulary of {tokenizer.vocab_size} other tokens than '
                        f'{source}: write it in the same tokens with python data/text/prepare.py '
                        f'--input=FILE --name=NAME --tokenizer={source}')
    if problems:
        fail(*problems)


def need_memory(shape, shards, process):
    """Fail if training a model of this GPTConfig can never fit into the memory of the device.

    shards: the number of processes that share the model.
    """
    c = shape
    tables = 1 if c.tie_weights else 2
    n = 12 * c.n_layer * c.n_embd**2 + (tables * c.vocab_size + c.block_size) * c.n_embd
    need = 16 * n / shards  # weights, gradients and two moments of AdamW, in float32
    have = total_memory(process.device)
    if need > have:
        fail(f'a model of {n / 1e6:,.0f}M parameters takes {need / 1e9:.1f} GB in training, '
             f'{process.device} has {have / 1e9:.1f} GB: use a smaller n_embd or n_layer, or '
             '--parallel=fsdp on more devices')
