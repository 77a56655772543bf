# The Shakespeare speedrun: to the val loss of nanoGPT's best, 1.4697, in as little training as we know how
#     python train.py config/speedrun_shakespeare_char.py
# 2-core Intel Xeon with AMX: val loss 1.4519 (mean of ten seeds, the highest 1.4642) on the whole val split, in non-overlapping
# windows of 256, after 84 s of training, 96 s in all. Losses below are of 300 updates, mean of two seeds: 1.526 for all of it
out_dir = 'out-speedrun-shakespeare-char'
eval_interval = 200
eval_iters = 28  # 28 x 16 windows of 256: all of the val split
sample_tokens = 0

# many small updates of a small model beat few large ones of a large one: 2.5 passes over the text in all
n_layer = 3  # an update of 4 takes a third longer
n_head = 2  # of 128 channels: fewer attention weights to compute
n_embd = 256
batch_size = 16  # 8, 12 and 24 ended higher in the same time
max_iters = 600

# the usual modern parts; LayerNorm, since RMSNorm (1.528) takes five times as long on a CPU
activation = 'relu2'  # as good as GELU (1.530), and faster
rotary = True  # 1.590 with learned positions
qk_norm = True  # 1.553 without
tie_weights = False  # 1.528 tied
zero_init = True  # 1.530 without
token_shift = True  # 1.625 without: the largest of them

# no dropout and no input_noise: in so few passes they only cost (1.577 with input_noise=0.05)
optimizer = 'muon'  # 1.890 with AdamW
learning_rate = 3e-3  # of embedding and head; 5e-3 was as good
muon_lr = 0.03  # .02 and .04 were as good
beta2 = 0.99  # few tokens in a batch: average over more of them
lr_schedule = 'linear'
decay_frac = 0.7  # 1.0 was as good
warmup_iters = 0  # a warmup of Muon's momentum gave nothing; of the rate, not tried
min_lr = 1e-4
