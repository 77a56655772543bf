# The recipe of modded-nanogpt's train_gpt_simple.py: val loss 3.28 on FineWeb after 1.7B tokens
#     python data/fineweb/prepare.py --shards=18
#     torchrun --nproc_per_node=8 train.py config/train_gpt2_fineweb.py
# That loss is modded-nanogpt's. Never run here: no GPU was available. What differs: Muon takes 3
# steps, not 12, and gives all rows one length; softcap is a tanh; the norms of queries and keys
# have weights; the output matrix has no bias and decays like the matrices of the blocks.
# Estimated GPU memory: 22 GB for a compiled update, more than twice as much for an eager one.
out_dir = 'out-gpt2-fineweb'
dataset = 'fineweb'
eval_interval = 125
eval_iters = 320  # 320 x 32 windows of 1,024 tokens: the whole validation split
sample_prompt = 'Hello, I am a language model,'

# 32 sequences x 1,024 tokens x 16 micro-batches = 524,288 tokens per update, 1.7B in all
batch_size = 32
block_size = 1024
gradient_accumulation_steps = 16
max_iters = 3250

n_layer = 12
n_head = 6
n_embd = 768
bias = True
activation = 'relu2'
norm = 'rmsnorm'
rotary = half_rotary = qk_norm = embed_norm = zero_init = zero_head = True
tie_weights = False
attn_scale = 0.12
softcap = 15.0

optimizer = 'muon'
learning_rate = 0.015  # applies to vectors
embed_lr = 0.014  # the original: 0.7, for embeddings with 50 times the standard deviation
head_lr = 0.004
muon_lr = 0.025
weight_decay = 0.05
beta1 = 0.8
grad_clip = warmup_iters = min_lr = 0
lr_schedule = 'linear'
decay_frac = 0.7
