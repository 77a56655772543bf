# The Shakespeare speedrun: to the val loss of nanoGPT's best, 1.4697, in as little training as we know how
#     python train.py config/speedrun_shakespeare_char.py
# the result, ten seeds, and what each choice gave are in the README
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

# no dropout and no input_noise: in so few passes they only cost, 0.05 of noise 0.015
optimizer = 'muon'
learning_rate = 3e-3
muon_lr = 0.03
beta2 = 0.99
lr_schedule = 'linear'
decay_frac = 0.7
warmup_iters = 0
min_lr = 1e-4
