# A character GPT for a laptop's CPU: 0.8M parameters, minutes instead of hours
#     python train.py config/train_shakespeare_char_cpu.py
# 2-core Intel Xeon with AMX: 2,000 updates in 35 s of training (AMD EPYC, Zen 4: 71 s), val loss 1.893 on the whole val split
out_dir = 'out-shakespeare-char-cpu'
eval_interval = 250
eval_iters = 145  # 145 x 12 windows of 64: all of the val split

batch_size = 12
block_size = 64
n_layer = 4
n_head = 4
n_embd = 128
max_iters = 2000
beta2 = 0.99  # few tokens in a batch: average over more of them
