# The Shakespeare speedrun: to the val loss of nanoGPT's best, 1.4697, in as little training as we know how
#     python train.py config/speedrun_shakespeare_char.py
# 2-core Intel Xeon with AMX: val loss 1.4519 (mean of ten seeds, the highest 1.4642) on the whole val split, in non-overlapping
# windows of 256, after 84 s of training, 96 s in all; what each choice gives is in the README
out_dir = 'out-speedrun-shakespeare-char'
eval_interval = 200
eval_iters = 28  # 28 x 16 windows of 256: all of the val split
sample_tokens = 0

# many small updates of a small model beat few large ones of a large one: 2.5 passes over the text in all
n_layer = 3
n_head = 2  # of 128 channels: fewer attention weights to compute
n_embd = 256
batch_size = 16
max_iters = 600

# the usual modern parts; LayerNorm, since RMSNorm takes five times as long on a CPU
activation = 'relu2'
rotary = True
qk_norm = True
tie_weights = False
zero_init = True
token_shift = True

# no dropout and no input_noise: in so few passes they only cost (input_noise=0.05 0.05 of val loss after 300 updates)
optimizer = 'muon'
learning_rate = 3e-3
muon_lr = 0.03
beta2 = 0.99
lr_schedule = 'linear'
decay_frac = 0.7
warmup_iters = 0
min_lr = 1e-4
