# GPT-2 xl (1558M) on OpenWebText; FSDP shards the parameters over the GPUs
#     torchrun --nproc_per_node=8 train.py config/train_gpt2_xl_fsdp.py
# Other sizes: add the flags of one line, and another --out_dir.
#     large (774M)    --n_layer=36 --n_head=20 --n_embd=1280 --learning_rate=2.5e-4
#     medium (350M)   --n_layer=24 --n_head=16 --n_embd=1024 --learning_rate=3e-4
# Never run: no GPU was available. Estimated memory of each of eight GPUs for a compiled update of
# the xl: 2.7 GB per sequence and 14 GB for weights, gradients and AdamW, 41 GB in all.
out_dir = 'out-gpt2-xl'
dataset = 'openwebtext'
eval_interval = 1000
eval_iters = 200
sample_prompt = 'Hello, I am a language model,'

parallel = 'fsdp'

# 10 sequences x 1,024 tokens x 48 micro-batches = 491,520 tokens per update
batch_size = 10
block_size = 1024
gradient_accumulation_steps = 48
n_layer = 48
n_head = 25
n_embd = 1600
bias = True

learning_rate = 2e-4
min_lr = 2e-5
max_iters = 600000
warmup_iters = 2000
