# GPT-2 medium (350M) on OpenWebText; FSDP shards the parameters over the GPUs
#     torchrun --nproc_per_node=8 train.py config/train_gpt2_medium_fsdp.py
# Never run: no GPU was available.
out_dir = 'out-gpt2-medium'
dataset = 'openwebtext'
eval_interval = 1000
eval_iters = 200
sample_prompt = 'Hello, I am a language model,'

parallel = 'fsdp'
activation_checkpointing = True

# 8 sequences x 1,024 tokens x 60 micro-batches = 491,520 tokens per update
batch_size = 8
block_size = 1024
gradient_accumulation_steps = 60
n_layer = 24
n_head = 16
n_embd = 1024
bias = True

learning_rate = 3e-4
min_lr = 3e-5
max_iters = 600000
warmup_iters = 2000
