# GPT-2 large (774M) on OpenWebText; FSDP shards the parameters over the GPUs
#     torchrun --nproc_per_node=8 train.py config/train_gpt2_large_fsdp.py
# Never run: no GPU was available. The micro-batch is for eight GPUs of 80 GB by an estimate: a
# compiled update takes 1.7 GB for each sequence without activation checkpointing, and 7 GB for
# weights, gradients and AdamW, so 33 GB in all.
out_dir = 'out-gpt2-large'
dataset = 'openwebtext'
eval_interval = 1000
eval_iters = 200
sample_prompt = 'Hello, I am a language model,'

parallel = 'fsdp'

# 15 sequences x 1,024 tokens x 32 micro-batches = 491,520 tokens per update
batch_size = 15
block_size = 1024
gradient_accumulation_steps = 32
n_layer = 36
n_head = 20
n_embd = 1280
bias = True

learning_rate = 2.5e-4
min_lr = 2.5e-5
max_iters = 600000
warmup_iters = 2000
