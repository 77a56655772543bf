# The main job: a character GPT of 10.67M parameters with modern parts, in minutes on two CPU cores
#     python train.py config/train_shakespeare_char.py
# 2-core AMD EPYC (Zen 3, no bfloat16): val loss 1.434 on the whole validation split after 18
# minutes of training (one seed). With --max_seconds=300, it is 1.683 after 128 updates. In this
# time, config/speedrun_shakespeare_char.py reaches 1.461: take that one on a slow machine.
# A longer run needs dropout and more weight decay: --max_iters=1130 --dropout=0.05
# --weight_decay=0.2
out_dir = 'out-shakespeare-char'
eval_interval = 250
eval_iters = 28  # 28 x 16 windows of 256 tokens: the whole validation split

# 6 layers of 384 channels, as in nanoGPT; 3 heads of 128 channels have fewer attention weights
n_head = 3
batch_size = 16
activation = 'relu2'
rotary = True
qk_norm = True
tie_weights = False
zero_init = True
token_shift = True
max_iters = 500  # two epochs

optimizer = 'muon'
learning_rate = 3e-3  # applies to the embedding and the output matrix
muon_lr = 0.03
beta2 = 0.99  # an update has few tokens, so average over more updates
lr_schedule = 'linear'
decay_frac = 0.7  # decay over the last 70% of the run
warmup_iters = 0
min_lr = 1e-4
