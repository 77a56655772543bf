# A character GPT of 10.7M parameters in the shape of Qwen3, which other programs can run
#     python train.py config/train_shakespeare_qwen3.py
# 2-core AMD EPYC (Zen 3, no bfloat16): val loss 1.485 on the whole validation split after 500
# updates (one seed). An update takes 2.3 s, so this takes 19 minutes, as the main job does.
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
batch_size = 16  # 8 sequences in the same time end at 1.515
max_iters = 500

optimizer = 'muon'
learning_rate = 3e-3  # applies to the embedding and the output matrix
muon_lr = 0.04
beta2 = 0.99  # an update has few tokens, so average over more updates
lr_schedule = 'linear'
decay_frac = 1.0  # decay from the first update on
warmup_iters = 0
min_lr = 1e-4
