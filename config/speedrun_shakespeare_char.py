# The Shakespeare speedrun: to the val loss of nanoGPT's best, 1.4697, in as little training as we know how
#     python train.py config/speedrun_shakespeare_char.py
# 2-core AMD EPYC (Zen 3: no bfloat16, 0.14 TFLOP/s in float32): val loss 1.459 (one seed) on the whole val split, in
# non-overlapping windows of 256, after 1,032 s of training, 1,124 s in all; what each choice gave is in the README
out_dir = 'out-speedrun-shakespeare-char'
eval_interval = 250
eval_iters = 28  # 28 x 16 windows of 256: all of the val split
sample_tokens = 0

# many small updates of a small model beat few large ones of a large one: 4 passes over the text in all
n_layer = 4
n_head = 2  # of 128 channels: fewer attention weights to compute
n_embd = 256
batch_size = 16
max_iters = 1000

# the usual modern parts; LayerNorm, since RMSNorm takes five times as long on a CPU
activation = 'relu2'
rotary = True
qk_norm = True
tie_weights = False
zero_init = True
token_shift = True  # after 150 updates 1.702 instead of 1.824
input_noise = 0.08  # instead of dropout, which costs time

optimizer = 'muon'
learning_rate = 3e-3
muon_lr = 0.02
beta2 = 0.99
lr_schedule = 'linear'
decay_frac = 0.7
warmup_iters = 0
min_lr = 1e-4
