# The Shakespeare speedrun
out_dir = 'out-speedrun-shakespeare-char'
eval_interval = 1000
eval_iters = 14  # 14 x 32 windows of 256: all of the val split
sample_tokens = 0
log_interval = 10

batch_size = 32
max_iters = 300
n_head = 3
activation = 'relu2'
norm = 'rmsnorm'
rotary = True
qk_norm = True
tie_weights = False
zero_init = True
input_noise = 0.05

optimizer = 'muon'
muon_lr = 0.02
learning_rate = 3e-3
lr_schedule = 'linear'
decay_frac = 0.7
warmup_iters = 0
min_lr = 1e-4
beta2 = 0.99
