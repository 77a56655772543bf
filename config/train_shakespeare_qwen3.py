# A character GPT of 10.7M parameters in the shape of Qwen3, which other programs can run
#     python train.py config/train_shakespeare_qwen3.py
# 2-core AMD EPYC (Zen 3, no bfloat16): val loss 1.883 with --max_seconds=300, after 133 updates
# (one seed). The settings are the main job's, without what other programs do not know; not tuned.
out_dir = 'out-shakespeare-qwen3'
eval_interval = 250
eval_iters = 28  # 28 x 16 windows of 256 tokens: the whole validation split

n_head = 3  # heads of 128 channels
activation = 'swiglu'
norm = 'rmsnorm'
norm_eps = 1e-6
rotary = True
qk_norm = True
tie_weights = False
zero_init = True
batch_size = 16
max_iters = 500

optimizer = 'muon'
learning_rate = 3e-3  # applies to the embedding and the output matrix
muon_lr = 0.03
beta2 = 0.99  # an update has few tokens, so average over more updates
lr_schedule = 'linear'
decay_frac = 0.7
warmup_iters = 0
min_lr = 1e-4
