# GPT-2 medium (350M) on OpenWebText; FSDP shards the parameters over the GPUs
#     torchrun --nproc_per_node=8 train.py config/train_gpt2_medium_fsdp.py
# Never run: no GPU was available. The micro-batch is for eight GPUs of 80 GB by an estimate: a
# compiled update takes 1.0 GB for each sequence without activation checkpointing, and 4 GB for
# weights, gradients and AdamW, so 34 GB in all.
out_dir = 'out-gpt2-medium'
dataset = 'openwebtext'
eval_interval = 1000
eval_iters = 200
sample_prompt = 'Hello, I am a language model,'

parallel = 'fsdp'

# 30 sequences x 1,024 tokens x 16 micro-batches = 491,520 tokens per update
batch_size = 30
block_size = 1024
gradient_accumulation_steps = 16
n_layer = 24
n_head = 16
n_embd = 1024
bias = True

learning_rate = 3e-4
min_lr = 3e-5
max_iters = 600000
warmup_iters = 2000
