# The Shakespeare speedrun: reach nanoGPT's best val loss, 1.4697, in as little time as we can
#     python train.py config/speedrun_shakespeare_char.py
# 2-core AMD EPYC (Zen 3, no bfloat16): val loss 1.461 on the whole validation split after 278 s of
# training (one seed).
# All seeds, and what each part is worth: config/speedrun_shakespeare_char.md
out_dir = 'out-speedrun-shakespeare-char'
eval_interval = 200
eval_iters = 28  # 28 x 16 windows of 256 tokens: the whole validation split
sample_tokens = 0

# a small model and many small updates; 460 updates are nearly two epochs
n_layer = 3  # an update of 4 layers takes a third longer
n_head = 2  # heads of 128 channels: fewer attention weights to compute
n_embd = 256
batch_size = 16
max_iters = 460

# the usual modern parts
activation = 'relu2'
rotary = True
qk_norm = True
embed_norm = True
tie_weights = False
zero_init = True
token_shift = True

# no dropout: too few epochs to overfit
optimizer = 'muon'
learning_rate = 3e-3  # applies to the embedding and the output matrix
muon_lr = 0.04
beta2 = 0.99  # an update has few tokens, so average over more updates
lr_schedule = 'linear'
decay_frac = 1.0  # decay from the first update on
warmup_iters = 0
min_lr = 1e-4
