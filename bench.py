"""
Time the train_step of train.py and the generate of sample.py for a configuration.

    python bench.py config/train_shakespeare_char.py
    python bench.py config/train_shakespeare_char_cpu.py --bench_steps=100 --profile=True
    python bench.py config/train_shakespeare_char_cpu.py --compare=3
    python bench.py config/train_gpt2.py --task=sample --compare=3
    python bench.py --task=hellaswag --init_from=gpt2

Takes all of train.py's settings; writes no checkpoint. The last line of output is one JSON object.

What was tried on a CPU (2-core AMD EPYC, Zen 4: avx512_bf16, no AMX; 64 x 256 tokens, 384 wide, where nothing else is said):
- keeping freed memory, in huge pages (keep_memory in configurator.py): an update from 6.5 to 4.7 s
- attention in bfloat16, forward and backward: 265 ms a layer by torch, 180 by torch's forward and five products backward, 110
  as products whose weights are kept (attention_by_products in model.py); the causal half alone, in two parts, 116; scale and mask
  within the product (baddbmm) 100 to 106, slower for small models. In float32 torch's takes 240 backward
- the residual stream in bfloat16: adding to one in float32 takes 3.8 ms instead of 0.9, and every LayerNorm a conversion more.
  Together with attention and the next line an update takes 4.2 s instead of 4.9
- dropout's mask compared into bfloat16: 1.4 ms, made of a Boolean one 8.9; x * Boolean or torch.where 6.4 to 7.1, slower backward
- relu(x).square(): its gradient takes 79 ms at 32 x 256 x 1536, that of pow(2) 8
- QK-norm by rms_norm: 19 ms forward and backward, by layer_norm, which has a kernel of its own, 5
- without bfloat16 products (Zen 3): torch.optim.Muon, which is always in bfloat16, took 13 of the 14.4 s of an update with 6
  layers, 256 wide, 16 x 256; in float32, the matrices of a shape together, 0.25 s
- RMSNorm is several operations on a CPU, 6 ms forward and backward in float32 at 16 x 256 x 256, LayerNorm one, 1.3
- squared ReLU with a backward of its own (SquaredReLU in model.py): 5 ms instead of 12 at 16 x 256 x 1024 in float32; with that,
  rotary in bfloat16 and the shift by chunk() instead of slices, an update of the speedrun takes 172 ms with AMX instead of 199
- avx512_bf16 of an Intel Xeon whose AMX is hidden: 512 x 512 products in bfloat16 1.6 ms, in float32 0.8, so an update takes 4.8 to
  5.1 s in float32, 8.9 in bfloat16, 5.6 in float16: dtype=auto times the two products (cpu_multiplies_bfloat16 in configurator.py)
- the same Xeon in bfloat16, where all passes that are no products take 0.50 s of an update at the least: softmax and mask 115 ms,
  GELU 92, LayerNorm 53, random bytes 45, masks and their products 44, the two sums 31. An update of 1 s, about 10
  times the plain way with AMX, leaves 0.5 s for products, as long as the Linear layers' alone took with AMX
- tried on that Xeon: mask and softmax 14 ms, torch._masked_softmax 98; random bytes by numpy's SFC64 1.6 ms instead of 3.7, but
  torch.compile cannot have them in its graph; q, k and v by unbind() of (B, T, 3, H, D): backward 8 of 94 ms less in float32, 1
  to 2 percent of an update, the same in bfloat16, and one sample 2 percent slower; float32 attention 34 ms forward and 80
  backward by torch, 47 and 68 by products
- torch.compile: 4.05 s instead of 3.96, but 2.4 GB instead of 3.0 (as one graph, with keep_memory, beside which torch 2.13 may
  crash unless AOTAutograd's cache is off), for 40 s of compilation; 4 layers, 128 wide, 12 x 64: 27 ms instead of 21. With AMX, as
  many graphs, 1.84 s instead of 1.55, for the speedrun 166 ms instead of 172. Its kernels are several passes each: LayerNorm
  with dropout and sum 10 ms, where five operations take 6, a mask's random bytes 5 instead of 2.4, GELU the same
- a single sequence of 128 tokens moves some 600 MB an update: weights to bfloat16, gradients to float32, norm, clipping, AdamW.
  Clipping within AdamW (its grad_scale) would save 3 to 4 of 59 ms; Muon and float16's scaler would need the other way as well
- the first update takes longer by what the machine takes to give memory out: 3 GB 0.6 s, in a virtual machine 6.5 the first time
- with AMX (2-core Intel Xeon) the reference's update is 1.5 s: 0.5 s of matrix products (weight gradients at 1.4 TFLOP/s, the
  others at 3 to 3.9), 0.4 attention, 0.16 GELU, the rest passes over activations. A quarter of the batch at a time, to fit the
  caches: 1.65 s. (Before the residual stream in bfloat16, attention by products and the mask above)
- one row times a matrix, which is what one sample consists of: float32 9 GB/s, bfloat16 8, float16 20, int8 17 (float32
  whole matrices are read at 46); attention with one query: 23 us in float32, 107 in bfloat16, 205 in float16. Hence
  StoredLinear in model.py: half precision for the weights alone
- 40 matrices of 768 x 3,072: one row in float32 32 ms, bfloat16 packed by oneDNN 9.4, float16 by FBGEMM 6.4 (by torch.mv 6.1, but
  with two conversions more), int8 by torch 7.3; ten rows: 46, 10.8, 12.1, 22; 2,560 rows of one: 67, 30, 59
- the same with AMX, all matrices of GPT-2 124M, one row: float32 16 ms, bfloat16 10.7, packed by oneDNN 9.3, int8 7.2, float16
  by torch.mv above 30; ten rows: 53, 17, 10.9, 29
- Intel Xeon without AMX, one row of 768 times 768 x 3,072: as a weighted sum of the matrix's columns, by embedding_bag, in half
  precision 178 us, by FBGEMM's product 238, by torch.mv 315 to 340; int8 66, by torch's _weight_int8pack_mm 150 to 240, and 84
  with the row in 8 bits, too. For ten rows it is the slower way: 657 by sums, 444 by FBGEMM. Parts of 1,536 outputs instead of
  256: 120 in int8. The smaller the matrix, the less there is to gain: 384 x 384 19 us instead of 21. GPT-2 124M 78 tokens/s
  instead of 64, in int8 127 instead of 77; with avx2 alone (by FBGEMM_ENABLE_INSTRUCTIONS) 68 instead of 62, and 85 instead
  of 68. Float16 is as fast as bfloat16, but sums beyond 65,504 are infinite
- nn.Module in generation: its parts as plain attributes save 7 percent of a token of 10.65M, products that are none 2, Dropout and
  LayerNorm without __call__ 3 (place_for_generation in sample.py)
- GELU of one row of 1,536: 10 us by oneDNN, 2 without it (place_for_generation in sample.py); without torch.multinomial's checks
  a token would take 0.05 ms less; no garbage collection: no gain
- Zen 5, all matrices of GPT-2 124M, one row: float16 6 ms, bfloat16 packed 4.9, int8 4.4. One query's attention by products
  instead of torch's kernel: 27 us instead of 11
- torch.multinomial over 50,257 probabilities: 1.3 ms; after topk(200), 0.2
- a bare functional loop instead of modules decodes one sample 20 to 30 percent faster; in bfloat16 throughout, with GELU and the
  sums inside oneDNN's products, 30 to 45: left out, since it would be a second path through the model
- other work on the same cores: threads that wait spin, so while two other processes compute, a sample of 1,000 tokens/s falls to
  6 to 90; with a lower GOMP_SPINCOUNT to 60 to 500, but then training falls from 40 steps/s to 6 instead of 17. Left as it is
- start-up 1.4 s instead of 2.5 (Zen 3), of which torch 1.3: torch.optim's decorators import torch._dynamo (Eager in train.py)
- inference_mode instead of no_grad, one fused cache for keys and values: nothing measurable
"""
import time
_started = time.perf_counter()

import copy
import json
import os
import statistics
import subprocess
import sys

import torch
from torch.nn import functional as F

import configurator
from configurator import configure, fail, setup
from data.common import DATA_DIR, DownloadError, GPT2Tokenizer, download_resumable
from model import GPT, CausalSelfAttention, Dropout, draw
from sample import pick_dtype, place_for_generation
from train import *
from train import check_settings, compile_model, divide, load_gpt2, make_optimizers, model_shape, open_dataset, \
    place_model, total_peak_flops, train_step

# -----------------------------------------------------------------------------
# settings

# benchmark
bench_steps = 10  # timed updates
bench_warmup = 2  # untimed ones before
bench_tokens = 200  # tokens to generate, 0 for none
real_tokens = False  # read batches of the dataset; False: random tokens of GPT-2's or Shakespeare's vocabulary
profile = False  # write a torch profiler trace of three updates to trace.json
baseline = False  # time the plain way instead: float32, eager, torch's dropout, AdamW not fused, no key-value cache
task = 'speed'  # speed | sample: generation alone | hellaswag: init_from's accuracy on HellaSwag's 10,042 questions
compare = 0  # run the baseline and the fast way in turn, so many times each, and print the ratios


class PlainDropout(Dropout):
    """torch's own dropout."""

    def forward(self, x):
        return F.dropout(x, self.threshold / 256, self.training)


class PlainAttention(CausalSelfAttention):
    """Attention with torch's own dropout of single weights."""

    def forward(self, x, rotation=None, cache=None):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in self.c_attn(x).split(C, dim=2))
        p = self.attn_dropout.threshold / 256 if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


def make_plain(model):
    """Give the modules of model their plain forward."""
    for module in model.modules():
        module.__class__ = {Dropout: PlainDropout, CausalSelfAttention: PlainAttention}.get(type(module), module.__class__)


def plain_generate(model, idx, n):
    """Sample n tokens after idx (1, T), with a forward pass over the whole context for each."""
    for _ in range(n):
        with torch.no_grad():
            logits, _ = model(idx[:, -model.config.block_size:])
        idx = torch.cat([idx, draw(logits[:, -1], temperature=0.8, top_k=200)[:, None]], dim=1)


HELLASWAG = dict(url='https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl',
                 sha256='0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588')


def score_endings(model, tokenizer, context, endings, run):
    """Return the log probabilities of endings after context: their sums over tokens and their means, (4,) each."""
    context = tokenizer.encode(context).tolist()
    tails = [tokenizer.encode(' ' + ending).tolist() for ending in endings]
    length = max(map(len, tails)) + len(context)
    ids = torch.zeros(len(tails), length, dtype=torch.int64)
    mask = torch.zeros(len(tails), length - 1)
    for row, (tail, keep) in enumerate(zip(tails, mask)):
        ids[row, :len(context) + len(tail)] = torch.tensor(context + tail)
        keep[len(context) - 1:len(context) + len(tail) - 1] = 1
    ids = ids.to(run.device)
    with torch.no_grad(), run.autocast():
        logits, _ = model(ids[:, :-1])
    loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction='none')
    sums = -(loss.view(len(tails), -1).cpu() * mask).sum(dim=1)
    return sums, sums / mask.sum(dim=1)


def hellaswag(model, tokenizer, rows, run):
    """Return (acc, acc_norm) over rows of HellaSwag: the ending of the highest sum, or mean, of log probabilities is taken.

    llm.c's method (https://github.com/karpathy/llm.c/blob/master/dev/data/hellaswag.py): no clean-up of the text, and
    the mean is over tokens. Each rank takes its part of the rows.
    """
    right = torch.zeros(3)
    for row in rows[run.rank::run.world_size]:
        sums, means = score_endings(model, tokenizer, row['ctx'], row['endings'], run)
        right += torch.tensor([sums.argmax() == row['label'], means.argmax() == row['label'], True])
    right = run.all_reduce(right.to(run.device)).cpu()
    return (right[0] / right[2]).item(), (right[1] / right[2]).item()


def run_hellaswag():
    run = setup(device, dtype, False, backend, seed, deterministic, timeout_s)
    path = os.path.join(DATA_DIR, 'hellaswag', 'hellaswag_val.jsonl')

    def get():
        if not os.path.exists(path):
            try:
                download_resumable(path=path, **HELLASWAG)
            except DownloadError as e:
                fail(f'no HellaSwag: {e}. Get it by other means and save it as {path}')
    run.once_per_node(get)
    with open(path, encoding='utf-8') as f:
        rows = [json.loads(line) for line in f]
    tokenizer = GPT2Tokenizer()
    model = load_gpt2(init_from, 0, 0.0, run, tokenizer).eval().to(run.device)
    acc, acc_norm = hellaswag(model, tokenizer, rows, run)
    run.print(f'{init_from} on {len(rows):,} questions of HellaSwag: acc={acc:.4f} acc_norm={acc_norm:.4f}')
    run.print(json.dumps(dict(task='hellaswag', init_from=init_from, n=len(rows), acc=acc, acc_norm=acc_norm)))
    run.close()


def peak_memory(run):
    """Peak memory in bytes: of the GPU's allocator, else of the process."""
    if run.device.type == 'cuda':
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


@torch.inference_mode()
def time_sampling(model, num_samples, n, run, quantize=''):
    """Return the tokens per second of generating n tokens for each of num_samples sequences, as sample.py does."""
    idx = torch.zeros(num_samples, 1, dtype=torch.int64, device=run.device)
    if not baseline and parallel != 'fsdp':
        model = copy.deepcopy(model)  # the next call wants other weights
        name = dtype if dtype != 'auto' else pick_dtype(run.device.type, num_samples)
        place_for_generation(model, run.device, run.dtype if name == 'auto' else getattr(torch, name), quantize, num_samples)
    model.eval()
    seconds = []
    for repeat in range(2 if baseline else 4):
        run.sync()
        t0 = time.perf_counter()
        if baseline:
            plain_generate(model, idx, n)
        else:
            generator = run.generator('sample', device=run.device)
            for _ in model.generate(idx, n, temperature=0.8, top_k=200, generator=generator):
                pass
        run.sync()
        seconds.append(time.perf_counter() - t0)
    return num_samples * n / statistics.median(seconds[1:])


def generation(model, run):
    """Return the tokens per second of one stream, of ten together, and of one with int8 weights where that exists."""
    n = min(bench_tokens, block_size - 1)
    one = time_sampling(model, 1, n, run)
    if baseline:  # which takes ten one after another, and has no int8
        return dict(sample_tps_1=one, sample_tps_1_int8=one, sample_tps_10=one)
    result = dict(sample_tps_1=one, sample_tps_10=time_sampling(model, 10, n, run))
    if run.device.type == 'cpu' and parallel != 'fsdp':
        result['sample_tps_1_int8'] = time_sampling(model, 1, n, run, 'int8')
    return result


def compare_with_baseline(argv):
    """Run this script with and without --baseline in turn; print the medians and ratios, and return them."""
    results = {True: [], False: []}
    for i in range(2 * compare):
        plain = i % 2 == 0
        command = [sys.executable, os.path.abspath(__file__), *argv, '--compare=0', f'--baseline={plain}',
                   *(['--dtype=float32', '--compile=False'] if plain else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(done.returncode)
        results[plain].append(json.loads(done.stdout.splitlines()[-1]))
        row = results[plain][-1]
        print(f'{"baseline" if plain else "quill":10} ' + ' '.join(f'{k}={row[k]:.6g}' for k in ('dt', 'sample_tps_1') if k in row),
              flush=True)
    print(f'{"":20} {"baseline":>12} {"quill":>12} {"ratio":>8}')
    table = {}
    for key in ('tps', 'sample_tps_1', 'sample_tps_1_int8', 'sample_tps_10', 'peak_memory_mb', 'dt', 'startup_seconds',
                'first_step_seconds'):
        if key in results[True][0] and key in results[False][0]:
            a, b = (statistics.median(r[key] for r in results[plain]) for plain in (True, False))
            table[key] = dict(baseline=a, quill=b, ratio=b / a)
            print(f'{key:20} {a:12.6g} {b:12.6g} {b / a:8.3g}')
    print(json.dumps(table))


def training(model, config, vocab_size, tokens, run):
    """Return what was measured of train_step: a dict of figures. tokens: to read from, or None for random ones."""
    micro_batches, part, parts = divide(config, run)
    rows = batch_size // parts
    optimizers = make_optimizers(model, run, config)
    if baseline:
        for group in optimizers[0].param_groups:
            group.update(fused=False, foreach=False)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    startup_seconds = time.perf_counter() - _started
    step_model = compile_model(model, rows, run)
    compile_seconds = time.perf_counter() - _started - startup_seconds

    def step(it, timed=False):
        batches = []
        for micro in micro_batches:
            if tokens:
                first = (it * gradient_accumulation_steps + micro) * batch_size + part * rows
                x, y = tokens.train_batch(first, rows, run, input_noise)
            else:
                generator = run.generator('bench', it, micro, part)
                ids = torch.randint(vocab_size, (rows, block_size + 1), generator=generator)
                x, y = ids[:, :-1].clone(), ids[:, 1:].clone()
            batches.append((run.derive_seed('dropout', it, micro), run.to_device(x), run.to_device(y)))
        run.sync()
        t0 = time.perf_counter()
        _, _, dtf, dtb, _ = train_step(step_model, optimizers, scaler, run, batches, len(batches), grad_clip, factor=1.0,
                                       timed=timed)
        run.sync()
        return time.perf_counter() - t0, dtf, dtb
    first_step_seconds = step(0)[0]
    for it in range(bench_warmup):
        step(1 + it)
    seconds = [step(1 + bench_warmup + i)[0] for i in range(bench_steps)]
    parts = [step(1 + bench_warmup + bench_steps + i, timed=True)[1:] for i in range(min(3, bench_steps))]  # forward, backward

    peak = total_peak_flops(run, peak_tflops)
    times = {}
    for key, column in zip(('dt', 'dtf', 'dtb'), (seconds, *zip(*parts))):
        times |= {key: statistics.median(column), f'{key}_min': min(column), f'{key}_max': max(column)}
    tps = gradient_accumulation_steps * batch_size * block_size / times['dt']
    if profile:
        with torch.profiler.profile() as profiler:
            for it in range(3):
                step(100 + it)
        if run.is_main:
            profiler.export_chrome_trace('trace.json')
            print(profiler.key_averages().table(sort_by='self_cpu_time_total', row_limit=12))
            print('wrote trace.json: open it at https://ui.perfetto.dev')
    return dict(steps=bench_steps, **times, tps=tps, mfu=peak and 100 * model.flops_per_token() * tps / peak,
                peak_tflops=peak and peak / 1e12, peak_memory_mb=peak_memory(run) / 1e6, startup_seconds=startup_seconds,
                compile_seconds=compile_seconds, first_step_seconds=first_step_seconds)


def main(config):
    if baseline:
        configurator.keep_memory = lambda: None  # malloc as it is
    run = setup(device, 'float32' if baseline else dtype, False if baseline else compile, backend, seed, deterministic,
                timeout_s)
    tokens, vocab_size = None, 65 if dataset.endswith('_char') else 50257
    if real_tokens:
        meta, tokens, _ = open_dataset(dataset, block_size, run)
        vocab_size = meta['vocab_size']
    model = GPT(model_shape(config, vocab_size))
    if baseline:
        make_plain(model)
    model = place_model(model, run, config, *divide(config, run)[1:])
    result = dict(device=str(run.device), dtype=str(run.dtype).removeprefix('torch.'), compile=run.compile,
                  world_size=run.world_size, params=model.num_params())
    if task == 'speed':
        result |= training(model, config, vocab_size, tokens, run)
    if bench_tokens and (run.is_main or parallel == 'fsdp'):  # sharded, all ranks compute together
        result |= generation(model, run)
    for key, value in result.items():
        run.print(f'{key:20} {value:.6g}' if isinstance(value, float) else f'{key:20} {value}')
    run.print(json.dumps(result))
    run.close()


if __name__ == '__main__':
    _config = configure(globals())
    _least = {'bench_steps': 1, 'bench_warmup': 0, 'bench_tokens': 0, 'compare': 0}
    if _problems := check_settings(_config) + [f'{k}={_config[k]}: {k} is at least {n}' for k, n in _least.items()
                                               if _config[k] < n]:
        fail(*_problems)
    if (baseline or compare) and (rotary or qk_norm or token_shift):
        fail('the baseline is GPT-2\'s attention: --baseline and --compare are without rotary, qk_norm and token_shift')
    if baseline and (dtype not in ('auto', 'float32') or compile is True):
        fail('--baseline is in float32, without --dtype and --compile')
    if task not in ('speed', 'sample', 'hellaswag') or task == 'hellaswag' and init_from in ('scratch', 'resume', 'auto'):
        fail(f'--task={task}: task is speed, sample, or hellaswag with --init_from=gpt2, -medium, -large, -xl or a folder')
    if task != 'hellaswag' and init_from != 'scratch':
        fail(f'--init_from={init_from} is for --task=hellaswag: speed is that of new weights, --init_from=scratch')
    if task == 'hellaswag':
        run_hellaswag()
    elif compare:
        compare_with_baseline(sys.argv[1:])
    else:
        main(_config)
