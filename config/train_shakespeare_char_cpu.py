# A character GPT for a laptop's CPU: 0.8M parameters, a minute of training
#     python train.py config/train_shakespeare_char_cpu.py
# 2-core AMD EPYC (Zen 3): val loss 1.906 on the whole validation split after 2,000 updates, 84 s of
# training.
out_dir = 'out-shakespeare-char-cpu'
eval_interval = 250
eval_iters = 145  # 145 x 12 windows of 64 tokens: the whole validation split

batch_size = 12
block_size = 64
n_layer = 4
n_head = 4
n_embd = 128
max_iters = 2000
beta2 = 0.99  # an update has few tokens, so average over more updates
