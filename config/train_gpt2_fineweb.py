# A modern GPT of GPT-2's size on FineWeb: rotary positions, QK-norm, squared ReLU, Muon
#     python data/fineweb/prepare.py --shards=18
#     torchrun --nproc_per_node=8 train.py config/train_gpt2_fineweb.py
# Never run: no GPU was available. Model, learning rates, schedule and validation tokens are those
# of modded-nanogpt's train_gpt_simple.py, which reaches val loss 3.28 after 1.7B tokens. It differs
# in these points: 12 cubic steps in Muon for 5 quintic ones, a bias of the output matrix, which
# also decays less, its own softcap instead of tanh, and RMSNorm of queries and keys for LayerNorm.
# The micro-batch is for GPUs of 80 GB by an estimate: a compiled update takes 0.6 GB for each
# sequence, and 3 GB for weights, gradients and optimizers, so 22 GB in all. Without compilation
# it takes more than twice as much.
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
n_head = 6  # of 128 channels: the same work in fewer, larger matrix products
n_embd = 768
bias = True
activation = 'relu2'
norm = 'rmsnorm'
rotary = half_rotary = qk_norm = embed_norm = zero_init = True
tie_weights = False
attn_scale = 0.12
softcap = 15.0

optimizer = 'muon'
muon_lr = 0.025
learning_rate = 0.015
embed_lr = 0.014  # 0.7 for embeddings of standard deviation 1; here it is 0.02
head_lr = 0.004
weight_decay = 0.05
beta1 = 0.8
grad_clip = 0.0
lr_schedule = 'linear'
decay_frac = 0.7
warmup_iters = 0
min_lr = 0.0
