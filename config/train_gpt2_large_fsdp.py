# GPT-2 large (774M) on OpenWebText; FSDP shards the parameters over the GPUs
#     torchrun --nproc_per_node=8 train.py config/train_gpt2_large_fsdp.py
# Never run: no GPU was available.
out_dir = 'out-gpt2-large'
dataset = 'openwebtext'
eval_interval = 1000
eval_iters = 200
sample_prompt = 'Hello, I am a language model,'

parallel = 'fsdp'
activation_checkpointing = True

# 4 sequences x 1,024 tokens x 120 micro-batches = 491,520 tokens per update
batch_size = 4
block_size = 1024
gradient_accumulation_steps = 120
n_layer = 36
n_head = 20
n_embd = 1280
bias = True

learning_rate = 2.5e-4
min_lr = 2.5e-5
max_iters = 600000
warmup_iters = 2000
