# A modern GPT of GPT-2's size on FineWeb: rotary positions, QK-norm, squared ReLU, Muon
#     python data/fineweb/prepare.py --shards=18
#     torchrun --nproc_per_node=8 train.py config/train_gpt2_fineweb.py
# Never run: no GPU was available. The learning rates follow the published figures of
# modded-nanogpt's simple track (val loss 3.28 after 1.7B tokens). The micro-batch is for GPUs of
# 80 GB by an estimate: a compiled update takes 0.6 GB for each sequence, and 3 GB for weights,
# gradients and optimizers, so 22 GB in all. Without compilation it takes more than twice as much.
out_dir = 'out-gpt2-fineweb'
dataset = 'fineweb'
eval_interval = 125
eval_iters = 160
sample_prompt = 'Hello, I am a language model,'

# 32 sequences x 1,024 tokens x 16 micro-batches = 524,288 tokens per update, 1.7B in all
batch_size = 32
block_size = 1024
gradient_accumulation_steps = 16
max_iters = 3250

n_layer = 12
n_head = 6  # of 128 channels: the same work in fewer, larger matrix products
n_embd = 768
activation = 'relu2'
norm = 'rmsnorm'
rotary = True
qk_norm = True
tie_weights = False
zero_init = True
softcap = 15.0

optimizer = 'muon'
muon_lr = 0.025
learning_rate = 3e-3
weight_decay = 0.05
beta1 = 0.8
lr_schedule = 'linear'
decay_frac = 0.7
warmup_iters = 0
min_lr = 0.0
